#ifndef PRISMAQUANT_PROBE_PASSES_H_
#define PRISMAQUANT_PROBE_PASSES_H_

// Passes: which formats a run store prices, and by which pass of the probe. The first pass leaves
// the statistics and the costs of the formats that were asked for first; formats that are asked for
// later get a pass of their own, whose stages have names of their own, so that it too can be
// interrupted.

#include <string>
#include <vector>

#include "base/status.h"
#include "formats/format.h"
#include "store/run_store.h"

namespace prismaquant {

// Note of a store whose probe has finished once.
inline constexpr char kProbedNote[] = "probed";

struct PassFormats {
  std::vector<const Format*> formats;
  bool first = true;
  std::string forward_stage, head_stage, backward_stage;
};

// All passes of the store, begun or finished, and one more if `wanted` (empty: all formats) has
// formats that none of them prices. That one is recorded in the store.
Result<std::vector<PassFormats>> PlanPasses(RunStore& store,
                                            const std::vector<const Format*>& wanted);

}  // namespace prismaquant

#endif  // PRISMAQUANT_PROBE_PASSES_H_

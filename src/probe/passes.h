#ifndef PRISMAQUANT_PROBE_PASSES_H_
#define PRISMAQUANT_PROBE_PASSES_H_

// Passes: which formats a run store prices, of weights rounded how, and by which pass of the probe.
// The first pass leaves the statistics and the costs of the formats that were asked for first,
// rounded to nearest; what is asked for later gets a pass of its own, whose stages have names of
// their own, so that it too can be interrupted.

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
  Rounding rounding = Rounding::kNearest;  // or kGptq, which prices in sample too
  bool first = true;
  std::string forward_stage, head_stage, backward_stage;
};

// All passes of the store, begun or finished, and one more if `nearest` has formats that none of
// them prices rounded to nearest, and one if `gptq` has formats with a grid that none prices
// rounded by GPTQ. Those are recorded in the store.
Result<std::vector<PassFormats>> PlanPasses(RunStore& store,
                                            const std::vector<const Format*>& nearest,
                                            const std::vector<const Format*>& gptq);

}  // namespace prismaquant

#endif  // PRISMAQUANT_PROBE_PASSES_H_

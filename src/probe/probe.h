#ifndef PRISMAQUANT_PROBE_PROBE_H_
#define PRISMAQUANT_PROBE_PROBE_H_

// The probe: one forward and one backward pass over the calibration sequences, layer by layer
// through all parts of the model, that leaves in the run store the statistics and costs of every
// Linear for every priced format. Memory holds one layer's weights and errors and one sequence's
// activations; hidden states and gradients between layers lie in the store.
//
// Three losses are taken, each summed over its positions: the next token of the text windows, the
// next token of the captions, and the MTP head's next token but one of the text windows. The body's
// Linears move the first two, the vision tower's the second, the MTP head's the third.
//
// Stages, each committed per layer: "forward" (hidden states, largest inputs), "head" (per part:
// loss and its gradient), "backward" (statistics, from the last layer to the first). A finished
// stage is reused. Formats that are asked for later are priced by a further pass of all stages.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "base/status.h"
#include "data/calibration.h"
#include "formats/format.h"
#include "model/model.h"
#include "store/run_store.h"

namespace prismaquant {

// Which token the loss of a position is taken for.
enum class LabelRule {
  kSampled,  // drawn from the model's own distribution: true Fisher, the costs are nats of KL
  kData,     // the text's own: empirical Fisher, the costs are scores
};

struct ProbeOptions {
  LabelRule labels = LabelRule::kSampled;
  uint64_t seed = 0;
  std::vector<const Format*> formats = {};  // to price; empty: all
  // To price rounded by GPTQ too, with its default options; formats without a grid have no such
  // cost.
  std::vector<const Format*> gptq_formats = {};
  ComputeOptions compute;
};

// Runs what the store does not hold yet. The store must be bound to this model, this calibration
// and these options but for the formats.
Status RunProbe(const Model& model, const Calibration& calibration, const ProbeOptions& options,
                RunStore& store);

// Whether the store holds the statistics of all Linears.
Result<bool> IsProbed(RunStore& store);

// Positions with a loss: the divisors of the statistics.
struct LossTokens {
  int64_t text = 0, caption = 0, mtp = 0;
  int64_t windows = 0;  // sequences that are text windows; those behind them are captions
};
LossTokens CountLossTokens(const Model& model, const Calibration& calibration, LabelRule labels);

// What the probe leaves for guided rounding of a layer's Linears but the experts, which see other
// tokens when the model before them is quantized; a blob each, a tensor per Linear, by its name.
//
// |g_t|^2 of its tokens, all sequences joined; loaded as their weights in a Hessian, over their
// mean and cut at 10.
std::string TokenWeightBlob(int64_t layer);
Result<std::map<std::string, at::Tensor>> LoadTokenWeights(const RunStore& store, int64_t layer);
// What OutputSketch leaves of g_t, bfloat16; none where there was no gradient.
std::string OutputFactorBlob(int64_t layer);
Result<std::map<std::string, at::Tensor>> LoadOutputFactors(const RunStore& store, int64_t layer);

}  // namespace prismaquant

#endif  // PRISMAQUANT_PROBE_PROBE_H_

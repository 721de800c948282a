#ifndef PRISMAQUANT_PROBE_PROBE_H_
#define PRISMAQUANT_PROBE_PROBE_H_

// The probe: one forward and one backward pass over the calibration windows, layer by layer, that
// leaves in the run store the statistics and costs of every Linear for every format. Memory holds
// one layer's weights and errors and one sequence's activations; hidden states and gradients
// between layers lie in the store.
//
// Stages, each committed per layer: "forward" (hidden states, largest inputs), "head" (loss and its
// gradient), "backward" (statistics, from the last layer to the first). A finished stage is reused.

#include <cstdint>
#include <string>

#include "base/status.h"
#include "data/calibration.h"
#include "model/model.h"
#include "store/run_store.h"

namespace prismaquant {

// Which token the loss of a position is taken for.
enum class LabelRule {
  kSampled,  // drawn from the model's own distribution: true Fisher, the costs are nats of KL
  kData,     // the next token of the text: empirical Fisher, the costs are scores
};

struct ProbeOptions {
  LabelRule labels = LabelRule::kSampled;
  uint64_t seed = 0;
  ComputeOptions compute;
};

// Runs what the store does not hold yet. The store must be bound to this model, these windows and
// these options.
Status RunProbe(const Model& model, const TokenWindows& windows, const ProbeOptions& options,
                RunStore& store);

// Number of positions with a loss: the divisor of all statistics.
int64_t LossTokens(const TokenWindows& windows, LabelRule labels);

// Names of the probe's blobs in the store.
std::string HiddenBlob(int64_t layer);       // [sequences, tokens, hidden], the input of `layer`
std::string TokenWeightBlob(int64_t layer);  // per Linear of the layer, [sequences * tokens]

}  // namespace prismaquant

#endif  // PRISMAQUANT_PROBE_PROBE_H_

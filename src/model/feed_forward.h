#ifndef PRISMAQUANT_MODEL_FEED_FORWARD_H_
#define PRISMAQUANT_MODEL_FEED_FORWARD_H_

// FeedForward: the second half of a decoder layer, as stages of Linears like the layer itself. Two
// kinds: the gated MLP, and the mixture of experts, in which a router sends each token to its top k
// experts and a shared expert, if there is one, sees all tokens.
//
// An expert's Linears get the rows of the tokens that were routed to it, in the order of the
// tokens; an expert without tokens gets no rows. Objects are immutable and may be shared between
// threads.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "model/config.h"
#include "model/model.h"

namespace prismaquant {

// Activation of the gate: W_down(activation(W_gate n) * (W_up n)).
enum class MlpActivation { kSilu, kGeluTanh };

class FeedForward {
 public:
  virtual ~FeedForward() = default;
  // `state.held` is {x [sequences, tokens, hidden_size]} before the first stage, and {y}, of the
  // same shape, after the last. Stages run in order: Inputs(0), Outputs(0), Inputs(1), ...
  virtual std::vector<at::Tensor> Inputs(int stage, const LayerState& state) const = 0;
  virtual void Outputs(int stage, std::vector<at::Tensor> outputs, LayerState& state) const = 0;
};

// Stages {gate_proj, up_proj}, {down_proj}.
std::unique_ptr<FeedForward> MakeGatedMlp(MlpActivation activation);

// Stages {router, and with a shared expert its gate_proj, its up_proj, its gate}, {gate_proj and
// up_proj of every expert, then the shared down_proj}, {down_proj of every expert}. Leaves the
// experts of each token in `state.routing`.
std::unique_ptr<FeedForward> MakeMixture(const MixtureConfig& config, MlpActivation activation);

}  // namespace prismaquant

#endif  // PRISMAQUANT_MODEL_FEED_FORWARD_H_

#ifndef PRISMAQUANT_EVALUATE_FORWARD_H_
#define PRISMAQUANT_EVALUATE_FORWARD_H_

// The forward pass of a model over all evaluation sequences, layers streamed, Linears multiplied as
// its checkpoint says or as something else does.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/status.h"
#include "model/model.h"
#include "model/sequences.h"

namespace prismaquant {

struct BodyOutputs {
  std::vector<at::Tensor> hidden;  // per sequence [1, tokens, hidden_size], before the final norm
  // Of a mixture of experts: per layer, the experts of all text tokens, int64 [tokens, k].
  std::vector<at::Tensor> routing;
};

// Where a forward pass through the body is.
struct PassState {
  int64_t layers = 0;   // finished
  BodyOutputs outputs;  // what they left
};

// Keeps that outside of memory, so that a pass that was ended early goes on from there, with the
// same bits.
class PassKeeper {
 public:
  virtual ~PassKeeper() = default;
  // What was kept last, if anything.
  virtual Result<std::optional<PassState>> Load() = 0;
  // Called after each layer. `now`: the pass ends here; otherwise it may be left for a later layer.
  virtual Status Keep(const PassState& state, bool now) = 0;
};

// What multiplies the Linears of a layer.
using LayerLinears = std::function<Result<std::shared_ptr<LinearRunner>>(int layer)>;
// As the model's checkpoint stores them. The model must outlive it.
LayerLinears StoredLinears(const Model& model, const ComputeOptions& compute);

// The vision tower, if there are captions, and the body, from where `keeper`, if not null, has it.
Result<BodyOutputs> RunBody(const Model& model, const LayerLinears& linears,
                            const Calibration& data, const Sequences& sequences,
                            const ComputeOptions& compute, const std::string& title,
                            PassKeeper* keeper = nullptr);

// The output projection, for the heads of the body and of the MTP head alike; the embedding table
// if it is tied.
Result<std::shared_ptr<LinearRunner>> LoadProjection(const Model& model,
                                                     const LayerLinears& linears,
                                                     const ComputeOptions& compute);

}  // namespace prismaquant

#endif  // PRISMAQUANT_EVALUATE_FORWARD_H_

#ifndef PRISMAQUANT_EVALUATE_FORWARD_H_
#define PRISMAQUANT_EVALUATE_FORWARD_H_

// The forward pass of any checkpoint over all evaluation sequences, layers streamed, Linears
// multiplied as the checkpoint says.

#include <ATen/core/Tensor.h>

#include <memory>
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

// The vision tower, if there are captions, and the body.
Result<BodyOutputs> RunBody(const Model& model, const Calibration& data, const Sequences& sequences,
                            const ComputeOptions& compute, const std::string& title);

// The output projection as the checkpoint stores it, for the heads of the body and of the MTP head
// alike; the embedding table if it is tied.
Result<std::shared_ptr<LinearRunner>> LoadStoredProjection(const Model& model,
                                                           const ComputeOptions& compute);

}  // namespace prismaquant

#endif  // PRISMAQUANT_EVALUATE_FORWARD_H_

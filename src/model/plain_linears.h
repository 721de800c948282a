#ifndef PRISMAQUANT_MODEL_PLAIN_LINEARS_H_
#define PRISMAQUANT_MODEL_PLAIN_LINEARS_H_

// For tests and their tools. PlainLinears: multiplies the Linears of one layer with their weights
// as the source stores them, converted to the compute dtype. Owns the converted weights; dropping
// it frees them. Apply is const in effect, so one object may serve several threads.

#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <string>

#include "base/status.h"
#include "model/model.h"

namespace prismaquant {

class PlainLinears : public LinearRunner {
 public:
  // Reads and converts the weights and biases of all Linears of `layer`.
  static Result<std::unique_ptr<PlainLinears>> Load(const Model& model, int layer,
                                                    const ComputeOptions& options);
  at::Tensor Apply(const LinearInfo& linear, const at::Tensor& x) override;
  // [out, in] in the compute dtype. `linear` is the name of one of the layer's Linears.
  const at::Tensor& weight(const std::string& linear) const { return entries_.at(linear).weight; }

 private:
  struct Entry {
    at::Tensor weight, bias;  // bias undefined if there is none
  };
  std::map<std::string, Entry> entries_;
};

// ids [sequences, tokens] int64 -> logits [sequences, tokens, vocab_size] in the compute dtype. One
// layer's weights are in memory at a time. No gradients.
Result<at::Tensor> ForwardLogits(const Model& model, const at::Tensor& ids,
                                 const ComputeOptions& options);

}  // namespace prismaquant

#endif  // PRISMAQUANT_MODEL_PLAIN_LINEARS_H_

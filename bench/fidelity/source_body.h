#ifndef PRISMAQUANT_BENCH_FIDELITY_SOURCE_BODY_H_
#define PRISMAQUANT_BENCH_FIDELITY_SOURCE_BODY_H_

// SourceBody: the text body of a source checkpoint with its head, all of it in memory in float32,
// so that any layer can be run at any time. Const methods only; one thread.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "base/status.h"
#include "data/calibration.h"
#include "model/model.h"
#include "probe/layer_runners.h"

namespace prismaquant {

class SourceBody {
 public:
  // `model` must outlive the body.
  static Result<SourceBody> Load(const Model& model);

  const Model& model() const { return *model_; }
  int layers() const { return static_cast<int>(blocks_.size()); }
  const LayerWeights& weights(int layer) const { return weights_[static_cast<size_t>(layer)]; }
  const OutputHead& head() const { return *head_; }

  // Windows [first, first + count) as the input of layer 0, [count, tokens, hidden_size].
  Result<at::Tensor> Embed(const TokenWindows& windows, int64_t first, int64_t count) const;
  // The layer's output of hidden [sequences, tokens, hidden_size].
  at::Tensor Run(int layer, const SequenceContext& context, const at::Tensor& hidden,
                 LinearRunner& linears) const;
  SequenceContext Context(int64_t tokens) const { return model_->Context(tokens, {}); }

 private:
  explicit SourceBody(const Model& model) : model_(&model) {}

  const Model* model_;
  std::vector<std::unique_ptr<DecoderLayer>> blocks_;
  std::vector<LayerWeights> weights_;
  std::unique_ptr<OutputHead> head_;
};

class SourceLinears : public LinearRunner {
 public:
  explicit SourceLinears(const LayerWeights& weights) : weights_(weights) {}
  at::Tensor Apply(const LinearInfo& linear, const at::Tensor& x) override {
    return Multiply(weights_, linear.name, x);
  }

 private:
  const LayerWeights& weights_;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_BENCH_FIDELITY_SOURCE_BODY_H_

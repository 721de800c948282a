#include "bench/fidelity/source_body.h"

#include <torch/torch.h>

#include <utility>

namespace prismaquant {

Result<SourceBody> SourceBody::Load(const Model& model) {
  SourceBody body(model);
  const PartLayers& part = *model.FindPart(Part::kText);
  for (int layer = part.first; layer < part.end; ++layer) {
    PQ_ASSIGN_OR_RETURN(auto block, model.LoadLayer(layer, {}));
    PQ_ASSIGN_OR_RETURN(auto weights, LayerWeights::Load(model, layer, {}));
    body.blocks_.push_back(std::move(block));
    body.weights_.push_back(std::move(weights));
  }
  PQ_ASSIGN_OR_RETURN(body.head_, model.LoadHead(Part::kText, {}));
  return body;
}

Result<at::Tensor> SourceBody::Embed(const TokenWindows& windows, int64_t first,
                                     int64_t count) const {
  std::vector<int64_t> ids;
  for (int64_t n = first; n < first + count; ++n) {
    const std::vector<int32_t>& window = windows.windows[static_cast<size_t>(n)];
    ids.insert(ids.end(), window.begin(), window.end());
  }
  return model_->Embed(at::tensor(ids).view({count, windows.length()}), {});
}

at::Tensor SourceBody::Run(int layer, const SequenceContext& context, const at::Tensor& hidden,
                           LinearRunner& linears) const {
  return RunLayer(*blocks_[static_cast<size_t>(layer)], context, hidden, linears);
}

}  // namespace prismaquant

#include "model/plain_linears.h"

#include <torch/torch.h>

#include <utility>

#include "formats/torch_guard.h"
#include "model/layer_pages.h"

namespace prismaquant {
namespace {

Status RunBody(const Model& model, const at::Tensor& ids, const ComputeOptions& options,
               at::Tensor& logits) {
  const SequenceContext context = model.Context(ids.size(1), options);
  PQ_ASSIGN_OR_RETURN(at::Tensor hidden, model.Embed(ids, options));
  for (int layer = 0; layer < model.config().num_layers; ++layer) {
    const LayerPages pages(model, layer, layer + 1);
    PQ_ASSIGN_OR_RETURN(const auto block, model.LoadLayer(layer, options));
    PQ_ASSIGN_OR_RETURN(const auto linears, PlainLinears::Load(model, layer, options));
    hidden = RunLayer(*block, context, hidden, *linears);
  }
  PQ_ASSIGN_OR_RETURN(const auto head, model.LoadHead(Part::kText, options));
  logits = head->Logits(hidden);
  return {};
}

}  // namespace

Result<std::unique_ptr<PlainLinears>> PlainLinears::Load(const Model& model, int layer,
                                                         const ComputeOptions& options) {
  auto result = std::make_unique<PlainLinears>();
  for (const LinearInfo& linear : model.LayerLinears(layer)) {
    PQ_ASSIGN_OR_RETURN(const at::Tensor weight, model.LoadWeight(linear));
    PQ_ASSIGN_OR_RETURN(const at::Tensor bias, model.LoadBias(linear));
    Entry& entry = result->entries_[linear.name];
    entry.weight = weight.to(options.device, options.dtype);
    if (bias.defined()) entry.bias = bias.to(options.device, options.dtype);
  }
  return result;
}

at::Tensor PlainLinears::Apply(const LinearInfo& linear, const at::Tensor& x) {
  const Entry& entry = entries_.at(linear.name);
  return MultiplyLinear(x, entry.weight, entry.bias);
}

Result<at::Tensor> ForwardLogits(const Model& model, const at::Tensor& ids,
                                 const ComputeOptions& options) {
  const at::NoGradGuard no_grad;
  at::Tensor logits;
  PQ_RETURN_IF_ERROR(
      GuardTorch("forward pass", [&] { return RunBody(model, ids, options, logits); }));
  return logits;
}

}  // namespace prismaquant

#include "probe/forward_pass.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <optional>
#include <utility>
#include <vector>

#include "base/interrupt.h"
#include "base/progress.h"
#include "formats/extremes.h"
#include "model/layer_pages.h"
#include "probe/blob_tensors.h"

namespace prismaquant {

std::string HiddenBlob(const PartLayers& part, int layer) {
  return fmt::format("{}/{}-{}", kHiddenFolder, static_cast<int>(part.part), layer - part.first);
}

Status NotFinite(const Model& model, const std::string& what) {
  return Status::InvalidInput(fmt::format("{}: {} is not finite on the calibration data",
                                          model.checkpoint().folder().string(), what));
}

// The inputs of a part's first layer.
Status ForwardPass::PutInputs(const PartLayers& part) {
  const SequenceRange range = sequences_.Range(part.part);
  std::optional<StoredSequences> before;
  if (const std::optional<Part> source = sequences_.Before(part.part)) {
    const PartLayers& layers = *model_.FindPart(*source);
    PQ_ASSIGN_OR_RETURN(before, StoredSequences::Open(store_, HiddenBlob(layers, layers.end)));
  }
  std::vector<at::Tensor> inputs;
  for (int64_t n = range.first; n < range.end; ++n) {
    PQ_ASSIGN_OR_RETURN(at::Tensor input,
                        sequences_.Input(part.part, n, before ? before->Find(n) : at::Tensor()));
    inputs.push_back(std::move(input));
  }
  return PutSequences(store_, HiddenBlob(part, part.first), range.first, inputs);
}

Status ForwardPass::VisitLayer(const PartLayers& part, int layer, const Visit& visit) {
  const LayerPages pages(model_, layer, layer + 1);
  PQ_ASSIGN_OR_RETURN(const auto block, model_.LoadLayer(layer, compute_));
  PQ_ASSIGN_OR_RETURN(const LayerWeights weights, LayerWeights::Load(model_, layer, compute_));
  return visit(layer, weights, [&](LinearRunner& runner) -> Status {
    PQ_ASSIGN_OR_RETURN(const StoredSequences inputs,
                        StoredSequences::Open(store_, HiddenBlob(part, layer)));
    std::vector<at::Tensor> outputs;
    for (int64_t n = inputs.first(); n < inputs.first() + inputs.count(); ++n) {
      outputs.push_back(RunLayer(*block, sequences_.Context(part.part, n), inputs.of(n), runner));
      if (AllFinite(outputs.back())) continue;
      return NotFinite(model_, fmt::format("the output of layer {}", layer));
    }
    return PutSequences(store_, HiddenBlob(part, layer + 1), inputs.first(), outputs);
  });
}

Status ForwardPass::Run(const PartLayers& part, const std::string& title, const Visit& visit) {
  const at::NoGradGuard no_grad;
  Progress progress(title, part.end - part.first, "layers");
  for (int layer = part.first; layer < part.end; ++layer) {
    PQ_ASSIGN_OR_RETURN(const bool done, store_.IsDone(stage_, layer));
    if (done) {
      progress.Skip(1);
      continue;
    }
    PQ_RETURN_IF_ERROR(CheckInterrupted(store_.folder().string()));
    if (layer == part.first) PQ_RETURN_IF_ERROR(PutInputs(part));
    PQ_RETURN_IF_ERROR(VisitLayer(part, layer, visit));
    progress.Advance();
  }
  return {};
}

}  // namespace prismaquant

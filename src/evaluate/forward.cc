#include "evaluate/forward.h"

#include <torch/torch.h>

#include <utility>

#include "base/interrupt.h"
#include "base/progress.h"
#include "evaluate/quantized_linears.h"
#include "model/layer_pages.h"

namespace prismaquant {
namespace {

// `hidden` per sequence of the part, replaced by the output of its last layer. `routing`, if not
// null, gets the experts of the first `texts` sequences.
Status RunPart(const Model& model, const PartLayers& part, const LayerLinears& linears_of,
               const Sequences& sequences, const ComputeOptions& compute, const std::string& title,
               std::vector<at::Tensor>& hidden, int64_t texts, std::vector<at::Tensor>* routing) {
  const int64_t first = sequences.Range(part.part).first;
  Progress progress(title, part.end - part.first, "layers");
  for (int layer = part.first; layer < part.end; ++layer) {
    PQ_RETURN_IF_ERROR(CheckInterrupted());
    const LayerPages pages(model, layer, layer + 1);
    PQ_ASSIGN_OR_RETURN(const auto block, model.LoadLayer(layer, compute));
    PQ_ASSIGN_OR_RETURN(const auto linears, linears_of(layer));
    std::vector<at::Tensor> experts;
    for (size_t i = 0; i < hidden.size(); ++i) {
      const int64_t n = first + static_cast<int64_t>(i);
      at::Tensor own;
      hidden[i] = RunLayer(*block, sequences.Context(part.part, n), hidden[i], *linears, &own);
      if (own.defined() && n < texts) experts.push_back(own);
    }
    if (routing != nullptr && !experts.empty()) routing->push_back(at::cat(experts));
    progress.Advance();
  }
  return {};
}

class TiedProjection : public LinearRunner {
 public:
  explicit TiedProjection(std::unique_ptr<OutputHead> head) : head_(std::move(head)) {}
  at::Tensor Apply(const LinearInfo&, const at::Tensor& x) override { return head_->Project(x); }

 private:
  std::unique_ptr<OutputHead> head_;
};

}  // namespace

LayerLinears StoredLinears(const Model& model, const ComputeOptions& compute) {
  return [&model, compute](int layer) -> Result<std::shared_ptr<LinearRunner>> {
    PQ_ASSIGN_OR_RETURN(std::unique_ptr<QuantizedLinears> linears,
                        QuantizedLinears::Load(model, layer, compute));
    return std::shared_ptr<LinearRunner>(std::move(linears));
  };
}

Result<BodyOutputs> RunBody(const Model& model, const LayerLinears& linears,
                            const Calibration& data, const Sequences& sequences,
                            const ComputeOptions& compute, const std::string& title) {
  std::vector<at::Tensor> images;
  const SequenceRange captions = sequences.Range(Part::kVision);
  for (int64_t n = captions.first; n < captions.end; ++n) {
    PQ_ASSIGN_OR_RETURN(at::Tensor patches, sequences.Input(Part::kVision, n, {}));
    images.push_back(std::move(patches));
  }
  if (!images.empty()) {
    PQ_RETURN_IF_ERROR(RunPart(model, *model.FindPart(Part::kVision), linears, sequences, compute,
                               title + ", vision", images, 0, nullptr));
  }
  BodyOutputs outputs;
  for (int64_t n = 0; n < data.count(); ++n) {
    const at::Tensor image =
        data.IsCaption(n) ? images[static_cast<size_t>(n - captions.first)] : at::Tensor();
    PQ_ASSIGN_OR_RETURN(at::Tensor embedded, sequences.Input(Part::kText, n, image));
    outputs.hidden.push_back(std::move(embedded));
  }
  PQ_RETURN_IF_ERROR(RunPart(model, *model.FindPart(Part::kText), linears, sequences, compute,
                             title, outputs.hidden, data.text.count(), &outputs.routing));
  return outputs;
}

Result<std::shared_ptr<LinearRunner>> LoadProjection(const Model& model,
                                                     const LayerLinears& linears,
                                                     const ComputeOptions& compute) {
  if (const PartLayers* head = model.FindPart(Part::kHead)) return linears(head->first);
  PQ_ASSIGN_OR_RETURN(std::unique_ptr<OutputHead> tied, model.LoadHead(Part::kText, compute));
  return std::shared_ptr<LinearRunner>(std::make_shared<TiedProjection>(std::move(tied)));
}

}  // namespace prismaquant

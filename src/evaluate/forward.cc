#include "evaluate/forward.h"

#include <torch/torch.h>

#include <utility>

#include "base/interrupt.h"
#include "base/progress.h"
#include "evaluate/quantized_linears.h"
#include "model/layer_pages.h"

namespace prismaquant {
namespace {

// From state.layers of the part on. The experts of the first `texts` sequences are noted.
Status RunPart(const Model& model, const PartLayers& part, const LayerLinears& linears_of,
               const Sequences& sequences, const ComputeOptions& compute, const std::string& title,
               int64_t texts, PassKeeper* keeper, PassState& state) {
  const int64_t first = sequences.Range(part.part).first;
  std::vector<at::Tensor>& hidden = state.outputs.hidden;
  Progress progress(title, part.end - part.first, "layers");
  progress.Skip(state.layers);
  for (int layer = part.first + static_cast<int>(state.layers); layer < part.end; ++layer) {
    if (const Status asked = CheckInterrupted(); !asked.ok()) {
      if (keeper != nullptr) static_cast<void>(keeper->Keep(state, /*now=*/true));
      return asked;
    }
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
    if (!experts.empty()) state.outputs.routing.push_back(at::cat(experts));
    ++state.layers;
    if (keeper != nullptr) PQ_RETURN_IF_ERROR(keeper->Keep(state, /*now=*/false));
    progress.Advance();
  }
  return {};
}

// What enters the body: token embeddings, with the vision tower's outputs in them.
Result<PassState> EmbedSequences(const Model& model, const LayerLinears& linears,
                                 const Calibration& data, const Sequences& sequences,
                                 const ComputeOptions& compute, const std::string& title) {
  PassState images;
  const SequenceRange captions = sequences.Range(Part::kVision);
  for (int64_t n = captions.first; n < captions.end; ++n) {
    PQ_ASSIGN_OR_RETURN(at::Tensor patches, sequences.Input(Part::kVision, n, {}));
    images.outputs.hidden.push_back(std::move(patches));
  }
  if (captions.count() > 0) {
    PQ_RETURN_IF_ERROR(RunPart(model, *model.FindPart(Part::kVision), linears, sequences, compute,
                               title + ", vision", 0, nullptr, images));
  }
  PassState state;
  for (int64_t n = 0; n < data.count(); ++n) {
    const at::Tensor image = data.IsCaption(n)
                                 ? images.outputs.hidden[static_cast<size_t>(n - captions.first)]
                                 : at::Tensor();
    PQ_ASSIGN_OR_RETURN(at::Tensor embedded, sequences.Input(Part::kText, n, image));
    state.outputs.hidden.push_back(std::move(embedded));
  }
  return state;
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
                            const ComputeOptions& compute, const std::string& title,
                            PassKeeper* keeper) {
  std::optional<PassState> state;
  if (keeper != nullptr) {
    PQ_ASSIGN_OR_RETURN(state, keeper->Load());
  }
  if (!state) {
    PQ_ASSIGN_OR_RETURN(state, EmbedSequences(model, linears, data, sequences, compute, title));
  }
  PQ_RETURN_IF_ERROR(RunPart(model, *model.FindPart(Part::kText), linears, sequences, compute,
                             title, data.text.count(), keeper, *state));
  return std::move(state->outputs);
}

Result<std::shared_ptr<LinearRunner>> LoadProjection(const Model& model,
                                                     const LayerLinears& linears,
                                                     const ComputeOptions& compute) {
  if (const PartLayers* head = model.FindPart(Part::kHead)) return linears(head->first);
  PQ_ASSIGN_OR_RETURN(std::unique_ptr<OutputHead> tied, model.LoadHead(Part::kText, compute));
  return std::shared_ptr<LinearRunner>(std::make_shared<TiedProjection>(std::move(tied)));
}

}  // namespace prismaquant

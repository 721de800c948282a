#include "model/sequences.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <utility>

#include "model/mrope.h"
#include "model/vision.h"

namespace prismaquant {

Result<Sequences> Sequences::Make(const Model& model, const Calibration& calibration,
                                  const ComputeOptions& options) {
  Sequences sequences(model, calibration, options);
  const int64_t length = calibration.text.length();
  sequences.text_ = model.Context(length, options);
  if (model.FindPart(Part::kMtp) != nullptr && length > 1) {
    sequences.mtp_ = model.Context(length - 1, options);
  }
  if (!calibration.captions.empty() && model.vision() == nullptr) {
    return Status::InvalidInput(fmt::format("{}: has no vision tower that images could be used for",
                                            model.checkpoint().folder().string()));
  }
  for (const CaptionSequence& caption : calibration.captions) {
    PQ_RETURN_IF_ERROR(sequences.AddCaption(caption));
  }
  return sequences;
}

Status Sequences::AddCaption(const CaptionSequence& caption) {
  const ImagePatches& image = caption.image;
  const at::Tensor ids = at::tensor(std::vector<int64_t>(caption.ids.begin(), caption.ids.end()));
  PQ_ASSIGN_OR_RETURN(const at::Tensor positions,
                      MropePositions(ids, model_->config().image_token, image.grid_rows,
                                     image.grid_columns, model_->vision()->config().merge_size));
  captions_.push_back(model_->Context(positions, options_));
  images_.push_back(model_->vision()->Context(image.grid_rows, image.grid_columns, options_));
  return {};
}

SequenceRange Sequences::Range(Part part) const {
  const int64_t texts = calibration_->text.count();
  if (part == Part::kVision) return {texts, calibration_->count()};
  return {0, part == Part::kMtp ? texts : calibration_->count()};
}

const SequenceContext& Sequences::Context(Part part, int64_t sequence) const {
  if (part == Part::kMtp) return mtp_;
  if (!calibration_->IsCaption(sequence)) return text_;
  const auto index = static_cast<size_t>(sequence - calibration_->text.count());
  return part == Part::kVision ? images_[index] : captions_[index];
}

std::optional<Part> Sequences::Before(Part part) const {
  if (part == Part::kMtp || part == Part::kHead) return Part::kText;
  if (part == Part::kText && !calibration_->captions.empty()) return Part::kVision;
  return std::nullopt;
}

Result<at::Tensor> Sequences::Input(Part part, int64_t sequence, const at::Tensor& before) const {
  switch (part) {
    case Part::kVision:
      return PatchEmbeddings(sequence);
    case Part::kText:
      return Embeddings(sequence, before);
    case Part::kMtp:
      return MtpInput(sequence, before);
    case Part::kHead:
      break;
  }
  return before.clone();
}

at::Tensor Sequences::Ids(int64_t sequence) const {
  const std::vector<int32_t>& ids = calibration_->ids(sequence);
  return at::tensor(std::vector<int64_t>(ids.begin(), ids.end())).unsqueeze(0);
}

at::Tensor Sequences::ImagePlaces(int64_t sequence) const {
  return at::nonzero(Ids(sequence)[0] == model_->config().image_token).flatten();
}

Result<at::Tensor> Sequences::PatchEmbeddings(int64_t sequence) const {
  const ImagePatches& image = calibration_->caption(sequence).image;
  const at::Tensor patches = at::tensor(image.values).view({image.patches, image.width});
  return model_->vision()->Embed(patches, image.grid_rows, image.grid_columns, options_);
}

Result<at::Tensor> Sequences::Embeddings(int64_t sequence, const at::Tensor& image) const {
  PQ_ASSIGN_OR_RETURN(const at::Tensor embedded, model_->Embed(Ids(sequence), options_));
  if (!calibration_->IsCaption(sequence)) return embedded;
  return embedded.index_copy(1, ImagePlaces(sequence).to(embedded.device()), image);
}

Result<at::Tensor> Sequences::MtpInput(int64_t sequence, const at::Tensor& hidden) const {
  const int64_t slots = hidden.size(1) - 1;
  PQ_ASSIGN_OR_RETURN(const at::Tensor embedded,
                      model_->Embed(Ids(sequence).narrow(1, 1, slots), options_));
  PQ_ASSIGN_OR_RETURN(const at::Tensor normed,
                      model_->FinalNorm(hidden.narrow(1, 0, slots), options_));
  return model_->MtpInput(embedded, normed, options_);
}

at::Tensor Sequences::ImageRows(int64_t sequence, const at::Tensor& gradient) const {
  return gradient.index_select(1, ImagePlaces(sequence).to(gradient.device()));
}

}  // namespace prismaquant

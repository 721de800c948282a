#include "cli/calibration_store.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <span>
#include <utility>

#include "formats/format.h"

namespace prismaquant {
namespace {

constexpr char kTextBlob[] = "calibration";
constexpr char kCaptionFolder[] = "captions";

std::string CaptionBlob(int64_t index) { return fmt::format("{}/{}", kCaptionFolder, index); }

Status StoreCaption(RunStore& store, int64_t index, const CaptionSequence& caption) {
  const ImagePatches& image = caption.image;
  const std::vector<int64_t> numbers = {caption.first_label, image.grid_rows, image.grid_columns};
  return store.PutBlob(CaptionBlob(index),
                       {{{"ids", DType::kI32, {static_cast<int64_t>(caption.ids.size())}},
                         std::as_bytes(std::span(caption.ids))},
                        {{"numbers", DType::kI64, {3}}, std::as_bytes(std::span(numbers))},
                        {{"patches", DType::kF32, {image.patches, image.width}},
                         std::as_bytes(std::span(image.values))}});
}

template <typename T>
std::vector<T> Values(const SafetensorsFile& file, const char* name) {
  const at::Tensor tensor = TensorFromView(*file.Find(name));
  const T* values = tensor.const_data_ptr<T>();
  return {values, values + tensor.numel()};
}

Result<CaptionSequence> LoadCaption(const RunStore& store, int64_t index) {
  PQ_ASSIGN_OR_RETURN(const SafetensorsFile file, store.Blob(CaptionBlob(index)));
  for (const char* name : {"ids", "numbers", "patches"}) {
    if (file.Find(name) != nullptr) continue;
    return Status::InvalidInput(fmt::format("{}: no tensor {}", file.path().string(), name));
  }
  const std::vector<int64_t> numbers = Values<int64_t>(file, "numbers");
  CaptionSequence caption{.ids = Values<int32_t>(file, "ids"), .first_label = numbers.at(0)};
  const std::vector<int64_t>& shape = file.Find("patches")->shape;
  caption.image = {.values = Values<float>(file, "patches"),
                   .patches = shape.at(0),
                   .width = shape.at(1),
                   .grid_rows = numbers.at(1),
                   .grid_columns = numbers.at(2)};
  return caption;
}

}  // namespace

Status StoreCalibration(RunStore& store, const Calibration& calibration) {
  const TokenWindows& text = calibration.text;
  std::vector<int32_t> ids;
  for (const auto& window : text.windows) ids.insert(ids.end(), window.begin(), window.end());
  const TensorSpec spec{"ids", DType::kI32, {text.count(), text.length()}};
  PQ_RETURN_IF_ERROR(store.PutBlob(kTextBlob, {{spec, std::as_bytes(std::span(ids))}}));
  for (size_t i = 0; i < calibration.captions.size(); ++i) {
    PQ_RETURN_IF_ERROR(StoreCaption(store, static_cast<int64_t>(i), calibration.captions[i]));
  }
  return store.PutNote(kCaptionFolder, std::to_string(calibration.captions.size()));
}

Result<Calibration> LoadCalibration(RunStore& store,
                                    const std::map<std::string, std::string>& identity) {
  PQ_ASSIGN_OR_RETURN(const SafetensorsFile file, store.Blob(kTextBlob));
  const at::Tensor ids = TensorFromView(file.tensors().front());
  Calibration calibration;
  calibration.text.fingerprint = identity.at("calibration");
  for (int64_t n = 0; n < ids.size(0); ++n) {
    const int32_t* row = ids.const_data_ptr<int32_t>() + n * ids.size(1);
    calibration.text.windows.emplace_back(row, row + ids.size(1));
  }
  PQ_ASSIGN_OR_RETURN(const auto captions, store.Note(kCaptionFolder));
  const int64_t count = captions ? std::stoll(*captions) : 0;
  for (int64_t i = 0; i < count; ++i) {
    PQ_ASSIGN_OR_RETURN(CaptionSequence caption, LoadCaption(store, i));
    calibration.captions.push_back(std::move(caption));
  }
  return calibration;
}

Result<std::vector<CaptionSequence>> LoadModelCaptions(const Model& model,
                                                       const Tokenizer& tokenizer,
                                                       const std::string& source, int64_t limit) {
  if (model.vision() == nullptr) {
    return Status::InvalidInput(fmt::format("--images {}: {} has no vision tower", source,
                                            model.checkpoint().folder().string()));
  }
  const ModelConfig& config = model.config();
  const ImageTokens tokens{.image = static_cast<int32_t>(config.image_token),
                           .start = static_cast<int32_t>(config.vision_start_token),
                           .end = static_cast<int32_t>(config.vision_end_token)};
  return LoadCaptions(source, model.checkpoint().folder(), tokenizer, tokens, limit);
}

}  // namespace prismaquant

#include "data/image_processor.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "io/file_system.h"

namespace prismaquant {
namespace {

constexpr int64_t kMostPixels = int64_t{1} << 28;
constexpr int64_t kMostPatchSide = 256, kMostFrames = 16, kMostMerge = 16;
constexpr double kMostRatio = 200;
constexpr int kBicubic = 3;
constexpr const char* kTypes[] = {"Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast",
                                  "Qwen2VLImageProcessorPil", "Qwen3VLImageProcessor"};

// Reads keys of preprocessor_config.json and remembers the first error.
class Reader {
 public:
  Reader(const Json& object, std::string origin) : object_(object), origin_(std::move(origin)) {}

  bool Has(const char* key) const {
    return object_.is_object() && object_.contains(key) && !object_[key].is_null();
  }
  int64_t Int(const char* key, int64_t largest) {
    const Result<int64_t> value = JsonInt(object_, key, origin_);
    if (!value.ok()) return Keep(value.status(), int64_t{1});
    if (*value >= 1 && *value <= largest) return *value;
    return Refuse(fmt::format("{} is {}, expected 1 to {}", key, *value, largest), int64_t{1});
  }
  double PositiveOr(const char* key, double fallback) {
    if (!Has(key)) return fallback;
    const Result<double> value = JsonDouble(object_, key, origin_);
    if (!value.ok()) return Keep(value.status(), fallback);
    if (*value > 0 && *value <= 1e6) return *value;
    return Refuse(fmt::format("{} is {}, expected a positive number", key, *value), fallback);
  }
  std::array<double, 3> Channels(const char* key, bool positive) {
    std::array<double, 3> values = {};
    const Json list = Has(key) ? object_[key] : Json();
    bool good = list.is_array() && list.size() == values.size();
    for (size_t c = 0; good && c < values.size(); ++c) {
      good = list[c].is_number();
      if (good) values[c] = list[c].get<double>();
      good = good && std::abs(values[c]) <= 1e6 && (!positive || values[c] > 1e-6);
    }
    if (good) return values;
    return Refuse(fmt::format("{} is {}, expected 3 {}numbers", key, list.dump(),
                              positive ? "positive " : ""),
                  values);
  }
  // A setting that this procedure has at `expected` only.
  void Require(const char* key, const Json& expected) {
    if (!Has(key) || object_[key] == expected) return;
    Refuse(fmt::format("{} {} is not supported, expected {}", key, object_[key].dump(),
                       expected.dump()),
           0);
  }
  template <typename T>
  T Refuse(const std::string& what, T fallback) {
    return Keep(Status::InvalidInput(fmt::format("{}: {}", origin_, what)), fallback);
  }
  const Json& object() const { return object_; }
  const std::string& origin() const { return origin_; }
  const Status& status() const { return status_; }

 private:
  template <typename T>
  T Keep(const Status& status, T fallback) {
    if (status_.ok()) status_ = status;
    return fallback;
  }

  const Json& object_;
  std::string origin_;
  Status status_;
};

void RefuseOtherProcedures(Reader& reader) {
  for (const char* key : {"do_resize", "do_rescale", "do_normalize", "do_convert_rgb"}) {
    reader.Require(key, true);
  }
  for (const char* key : {"do_center_crop", "do_pad"}) reader.Require(key, false);
  reader.Require("resample", kBicubic);
  if (!reader.Has("image_processor_type")) return;
  const Json& type = reader.object()["image_processor_type"];
  if (std::find(std::begin(kTypes), std::end(kTypes), type) != std::end(kTypes)) return;
  reader.Refuse(fmt::format("image_processor_type {} is not supported, expected {}", type.dump(),
                            fmt::join(kTypes, ", ")),
                0);
}

// Pixel counts stand in "size" as shortest_edge and longest_edge, or in min_pixels and max_pixels,
// which win.
Status ReadBounds(Reader& reader, ImageProcessor::Settings& settings) {
  static const Json kNone = Json::object();
  const bool nested = reader.Has("size") && reader.object()["size"].is_object();
  Reader size(nested ? reader.object()["size"] : kNone, reader.origin() + ": size");
  for (const auto& [key, value] : size.object().items()) {
    if (key != "shortest_edge" && key != "longest_edge" && !value.is_null()) {
      return Status::InvalidInput(fmt::format(
          "{}: {} is not supported, expected shortest_edge and longest_edge", size.origin(), key));
    }
  }
  const auto pixels = [&](const char* plain, const char* edge) {
    return reader.Has(plain) ? reader.Int(plain, kMostPixels) : size.Int(edge, kMostPixels);
  };
  settings.min_pixels = pixels("min_pixels", "shortest_edge");
  settings.max_pixels = pixels("max_pixels", "longest_edge");
  if (settings.min_pixels > settings.max_pixels) {
    size.Refuse(fmt::format("shortest_edge {} is above longest_edge {}", settings.min_pixels,
                            settings.max_pixels),
                0);
  }
  return size.status();
}

int64_t Multiple(double count, int64_t factor) { return static_cast<int64_t>(count) * factor; }

}  // namespace

Result<ImageProcessor> ImageProcessor::Read(const std::filesystem::path& folder) {
  const std::filesystem::path file = folder / "preprocessor_config.json";
  PQ_ASSIGN_OR_RETURN(const std::string text, ReadFile(file));
  PQ_ASSIGN_OR_RETURN(const Json config, ParseJson(text, file.string()));
  return Parse(config, file.string());
}

Result<ImageProcessor> ImageProcessor::Parse(const Json& config, const std::string& origin) {
  Reader reader(config, origin);
  Settings settings;
  RefuseOtherProcedures(reader);
  settings.patch_size = reader.Int("patch_size", kMostPatchSide);
  settings.temporal_patch_size = reader.Int("temporal_patch_size", kMostFrames);
  settings.merge_size = reader.Int("merge_size", kMostMerge);
  settings.mean = reader.Channels("image_mean", /*positive=*/false);
  settings.std = reader.Channels("image_std", /*positive=*/true);
  settings.rescale_factor = reader.PositiveOr("rescale_factor", settings.rescale_factor);
  const Status bounds = ReadBounds(reader, settings);
  PQ_RETURN_IF_ERROR(reader.status());
  PQ_RETURN_IF_ERROR(bounds);
  return ImageProcessor(settings);
}

Result<ImageProcessor::Size> ImageProcessor::TargetSize(int64_t height, int64_t width,
                                                        const std::string& origin) const {
  const int64_t factor = settings_.patch_size * settings_.merge_size;
  const auto h = static_cast<double>(height), w = static_cast<double>(width);
  const auto f = static_cast<double>(factor);
  if (std::max(h, w) / std::min(h, w) > kMostRatio) {
    return Status::InvalidInput(
        fmt::format("{}: image of {} x {} pixels, expected sides within a ratio of {}", origin,
                    width, height, kMostRatio));
  }
  Size size{Multiple(std::nearbyint(h / f), factor), Multiple(std::nearbyint(w / f), factor)};
  if (size.height * size.width > settings_.max_pixels) {
    const double shrink = std::sqrt(h * w / static_cast<double>(settings_.max_pixels));
    size.height = std::max(factor, Multiple(std::floor(h / shrink / f), factor));
    size.width = std::max(factor, Multiple(std::floor(w / shrink / f), factor));
  } else if (size.height * size.width < settings_.min_pixels) {
    const double grow = std::sqrt(static_cast<double>(settings_.min_pixels) / (h * w));
    size.height = Multiple(std::ceil(h * grow / f), factor);
    size.width = Multiple(std::ceil(w * grow / f), factor);
  }
  return size;
}

std::array<std::array<float, 256>, 3> ImageProcessor::LevelValues() const {
  std::array<std::array<float, 256>, 3> values;
  for (size_t channel = 0; channel < values.size(); ++channel) {
    const auto mean = static_cast<float>(settings_.mean[channel]);
    const auto deviation = static_cast<float>(settings_.std[channel]);
    for (size_t level = 0; level < 256; ++level) {
      const double rescaled = static_cast<double>(level) * settings_.rescale_factor;
      values[channel][level] = (static_cast<float>(rescaled) - mean) / deviation;
    }
  }
  return values;
}

Result<ImagePatches> ImageProcessor::Process(const Image& image, const std::string& origin) const {
  PQ_ASSIGN_OR_RETURN(const Size size, TargetSize(image.height, image.width, origin));
  const Image resized = ResizeBicubic(image, size.height, size.width);
  const auto levels = LevelValues();
  const int64_t side = settings_.patch_size, merge = settings_.merge_size;
  ImagePatches result;
  result.grid_rows = size.height / side;
  result.grid_columns = size.width / side;
  result.patches = result.grid_rows * result.grid_columns;
  result.width = 3 * settings_.temporal_patch_size * side * side;
  result.values.reserve(static_cast<size_t>(result.patches * result.width));
  const auto append_frame = [&](int64_t top, int64_t left, int64_t channel) {
    for (int64_t y = top; y < top + side; ++y) {
      const uint8_t* pixel = resized.rgb.data() + 3 * (y * size.width + left) + channel;
      for (int64_t x = 0; x < side; ++x, pixel += 3) {
        result.values.push_back(levels[static_cast<size_t>(channel)][*pixel]);
      }
    }
  };
  for (int64_t patch = 0; patch < result.patches; ++patch) {
    const int64_t block = patch / (merge * merge), blocks_across = result.grid_columns / merge;
    const int64_t row = block / blocks_across * merge + patch / merge % merge;
    const int64_t column = block % blocks_across * merge + patch % merge;
    for (int64_t channel = 0; channel < 3; ++channel) {
      for (int64_t frame = 0; frame < settings_.temporal_patch_size; ++frame) {
        append_frame(row * side, column * side, channel);
      }
    }
  }
  return result;
}

}  // namespace prismaquant

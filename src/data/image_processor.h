#ifndef PRISMAQUANT_DATA_IMAGE_PROCESSOR_H_
#define PRISMAQUANT_DATA_IMAGE_PROCESSOR_H_

// ImageProcessor: turns an image into the patch vectors that a Qwen vision tower reads, by the
// settings of the checkpoint's preprocessor_config.json: the sides become multiples of patch_size *
// merge_size with a pixel count within bounds and about the same ratio, the pixels are rescaled and
// normalized, and cut into patches. Immutable and thread-safe.

#include <array>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "base/json.h"
#include "base/status.h"
#include "data/image.h"

namespace prismaquant {

// The patches of one image, block by block: the merge_size^2 patches that the tower merges into one
// token follow each other, in raster order within the block; so do the blocks in the image.
struct ImagePatches {
  std::vector<float> values;  // [patches, width], a patch being [channel, frame, row, column]
  int64_t patches = 0, width = 0;
  int64_t grid_rows = 0, grid_columns = 0;  // in patches, multiples of merge_size
};

class ImageProcessor {
 public:
  struct Settings {
    int64_t min_pixels = 0, max_pixels = 0;
    int64_t patch_size = 0, temporal_patch_size = 0, merge_size = 0;
    std::array<double, 3> mean = {}, std = {};
    double rescale_factor = 1.0 / 255;
  };
  struct Size {
    int64_t height = 0, width = 0;
  };

  // From preprocessor_config.json of a checkpoint's folder. kInvalidInput, naming file and key, if
  // a setting is missing, malformed or another procedure than this one.
  static Result<ImageProcessor> Read(const std::filesystem::path& folder);
  static Result<ImageProcessor> Parse(const Json& config, const std::string& origin);

  const Settings& settings() const { return settings_; }
  // The size in pixels to which an image is resized. kInvalidInput if one side is more than 200
  // times the other; `origin` names the image.
  Result<Size> TargetSize(int64_t height, int64_t width, const std::string& origin) const;
  // A still image fills all temporal_patch_size frames of its patches. Fails as TargetSize does.
  Result<ImagePatches> Process(const Image& image, const std::string& origin) const;

 private:
  explicit ImageProcessor(const Settings& settings) : settings_(settings) {}
  std::array<std::array<float, 256>, 3> LevelValues() const;

  Settings settings_;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_DATA_IMAGE_PROCESSOR_H_

#include "data/image.h"

#include <fmt/format.h>

#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "data/jpeg_structure.h"
#include "io/file_system.h"

#define STB_IMAGE_IMPLEMENTATION
#define STB_IMAGE_STATIC
#define STBI_ONLY_PNG
#define STBI_ONLY_JPEG
#define STBI_NO_STDIO
#define STBI_MAX_DIMENSIONS (1 << 20)
#include <stb/stb_image.h>

namespace prismaquant {
namespace {

constexpr int64_t kMostPixels = (int64_t{1} << 29) / 3;

struct Header {
  int width = 0, height = 0, channels = 0;
};

Status Refuse(const std::filesystem::path& file, std::string_view what) {
  return Status::InvalidInput(fmt::format("{}: {}", file.string(), what));
}

const stbi_uc* Bytes(const std::string& contents) {
  return reinterpret_cast<const stbi_uc*>(contents.data());
}

Status CheckHeader(const std::filesystem::path& file, const std::string& contents) {
  Header header;
  const int size = static_cast<int>(contents.size());
  if (stbi_info_from_memory(Bytes(contents), size, &header.width, &header.height,
                            &header.channels) == 0) {
    return Refuse(file,
                  fmt::format("no image to read, expected PNG or JPEG of at most {} pixels ({})",
                              kMostPixels, stbi_failure_reason()));
  }
  if (int64_t{header.width} * header.height > kMostPixels) {
    return Refuse(file, fmt::format("image of {} x {} pixels, expected at most {} pixels",
                                    header.width, header.height, kMostPixels));
  }
  if (header.channels == 1 && stbi_is_16_bit_from_memory(Bytes(contents), size) != 0) {
    return Refuse(file, "gray PNG of 16 bits, expected 8 bits or colours");
  }
  return {};
}

// The source pixel of the upright image's pixel (row, column), by EXIF orientation.
std::pair<int64_t, int64_t> Source(const Image& image, int orientation, int64_t row,
                                   int64_t column) {
  const int64_t bottom = image.height - 1, right = image.width - 1;
  switch (orientation) {
    case 2:
      return {row, right - column};
    case 3:
      return {bottom - row, right - column};
    case 4:
      return {bottom - row, column};
    case 5:
      return {column, row};
    case 6:
      return {bottom - column, row};
    case 7:
      return {bottom - column, right - row};
    case 8:
      return {column, right - row};
    default:
      return {row, column};
  }
}

Image Upright(Image image, int orientation) {
  if (orientation == 1) return image;
  Image result{.height = image.height, .width = image.width, .rgb = {}};
  if (orientation >= 5) std::swap(result.height, result.width);
  result.rgb.reserve(image.rgb.size());
  for (int64_t row = 0; row < result.height; ++row) {
    for (int64_t column = 0; column < result.width; ++column) {
      const auto [y, x] = Source(image, orientation, row, column);
      const auto pixel = image.rgb.begin() + 3 * (y * image.width + x);
      result.rgb.insert(result.rgb.end(), pixel, pixel + 3);
    }
  }
  return result;
}

}  // namespace

Result<Image> LoadImage(const std::filesystem::path& file) {
  PQ_ASSIGN_OR_RETURN(const std::string contents, ReadFile(file));
  if (contents.size() > static_cast<size_t>(std::numeric_limits<int>::max())) {
    return Refuse(file, fmt::format("{} bytes, expected an image below 2 GiB", contents.size()));
  }
  PQ_RETURN_IF_ERROR(CheckHeader(file, contents));
  const bool jpeg = contents.starts_with("\xFF\xD8");
  const JpegStructure structure = jpeg ? ScanJpeg(contents) : JpegStructure{.complete = true};
  if (!structure.complete) return Refuse(file, "JPEG without end marker: the file is cut short");
  Header header;
  const std::unique_ptr<stbi_uc, decltype(&stbi_image_free)> pixels(
      stbi_load_from_memory(Bytes(contents), static_cast<int>(contents.size()), &header.width,
                            &header.height, &header.channels, STBI_rgb),
      &stbi_image_free);
  if (pixels == nullptr) {
    return Refuse(file, fmt::format("damaged image ({})", stbi_failure_reason()));
  }
  Image image{.height = header.height, .width = header.width, .rgb = {}};
  image.rgb.assign(pixels.get(), pixels.get() + 3 * image.height * image.width);
  return Upright(std::move(image), structure.orientation);
}

}  // namespace prismaquant

#ifndef PRISMAQUANT_DATA_IMAGE_H_
#define PRISMAQUANT_DATA_IMAGE_H_

// Image: the pixels of a PNG or JPEG file as 8-bit RGB, upright. Pixels are what Pillow's
// convert("RGB") gives: gray is repeated, a palette is looked up, alpha is dropped, 16-bit colours
// keep their high byte; a JPEG's EXIF orientation is applied. PNG agrees bit for bit, JPEG within 3
// levels, but for a column at the right edge where chroma is halved in width only (4:2:2). A plain
// value; the functions may run concurrently.

#include <cstdint>
#include <filesystem>
#include <vector>

#include "base/status.h"

namespace prismaquant {

struct Image {
  int64_t height = 0, width = 0;
  std::vector<uint8_t> rgb;  // [height, width, 3]
};

// kInvalidInput, naming the file: it is neither PNG nor JPEG, is damaged or cut short, has more
// pixels than Pillow opens (2^28 * 2 / 3), or is a 16-bit gray PNG, which Pillow does not scale.
Result<Image> LoadImage(const std::filesystem::path& file);

// Image.resize(BICUBIC) of Pillow up to version 12, bit for bit: cubic convolution with a = -0.5,
// widened when shrinking so that it does not alias; columns first (rows first in images more than
// 100 times as high as wide that shrink in height), then the other, each rounded to 8 bits.
// torchvision's kernel differs by at most one level. Pillow 13 chooses the order by the work, and
// may differ at hard edges by tens of levels. Sizes are positive.
Image ResizeBicubic(const Image& image, int64_t height, int64_t width);

}  // namespace prismaquant

#endif  // PRISMAQUANT_DATA_IMAGE_H_

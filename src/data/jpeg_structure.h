#ifndef PRISMAQUANT_DATA_JPEG_STRUCTURE_H_
#define PRISMAQUANT_DATA_JPEG_STRUCTURE_H_

// JpegStructure: what the markers of a JPEG file say beside its pixels: whether the file reaches
// its end marker (a decoder fills what is missing with gray), and how the camera was held.

#include <string_view>

namespace prismaquant {

struct JpegStructure {
  bool complete = false;  // the end marker was reached
  int orientation = 1;    // EXIF tag 0x0112, 1 (upright) to 8
};

// Never reads outside `bytes`, whatever they hold.
JpegStructure ScanJpeg(std::string_view bytes);

}  // namespace prismaquant

#endif  // PRISMAQUANT_DATA_JPEG_STRUCTURE_H_

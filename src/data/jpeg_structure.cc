#include "data/jpeg_structure.h"

#include <cstddef>
#include <cstdint>

namespace prismaquant {
namespace {

constexpr uint8_t kEndOfImage = 0xD9, kStartOfScan = 0xDA, kApplication1 = 0xE1;

uint8_t Byte(std::string_view bytes, size_t at) {
  return at < bytes.size() ? static_cast<uint8_t>(bytes[at]) : 0;
}

uint32_t Number(std::string_view bytes, size_t at, size_t width, bool big_endian) {
  uint32_t value = 0;
  for (size_t i = 0; i < width; ++i) {
    value = value << 8 | Byte(bytes, at + (big_endian ? i : width - 1 - i));
  }
  return value;
}

// The orientation of an EXIF segment's payload; 1 if it names none.
int ExifOrientation(std::string_view payload) {
  constexpr std::string_view kMagic("Exif\0\0", 6);
  constexpr uint32_t kOrientation = 0x0112, kShort = 3;
  if (!payload.starts_with(kMagic)) return 1;
  const std::string_view tiff = payload.substr(kMagic.size());
  const bool big = tiff.starts_with("MM");
  if (!big && !tiff.starts_with("II")) return 1;
  const size_t directory = Number(tiff, 4, 4, big);
  const size_t entries = Number(tiff, directory, 2, big);
  for (size_t i = 0; i < entries; ++i) {
    const size_t entry = directory + 2 + 12 * i;
    if (entry + 12 > tiff.size()) return 1;
    if (Number(tiff, entry, 2, big) != kOrientation) continue;
    const uint32_t value = Number(tiff, entry + 8, 2, big);
    return Number(tiff, entry + 2, 2, big) == kShort && value >= 1 && value <= 8
               ? static_cast<int>(value)
               : 1;
  }
  return 1;
}

bool StandsAlone(uint8_t marker) { return marker == 0x01 || (marker >= 0xD0 && marker <= 0xD8); }

// Where the entropy-coded data that begins at `at` ends: at the next marker that is no restart.
size_t SkipScan(std::string_view bytes, size_t at) {
  for (; at + 1 < bytes.size(); ++at) {
    const uint8_t next = Byte(bytes, at + 1);
    if (Byte(bytes, at) == 0xFF && next != 0 && next != 0xFF && !StandsAlone(next)) return at;
  }
  return bytes.size();
}

}  // namespace

JpegStructure ScanJpeg(std::string_view bytes) {
  JpegStructure result;
  size_t at = 0;
  while (at + 1 < bytes.size() && Byte(bytes, at) == 0xFF) {
    const uint8_t marker = Byte(bytes, at + 1);
    if (marker == kEndOfImage) {
      result.complete = true;
      return result;
    }
    if (marker == 0xFF || StandsAlone(marker)) {
      at += marker == 0xFF ? 1 : 2;
      continue;
    }
    const size_t length = Number(bytes, at + 2, 2, /*big_endian=*/true);
    if (length < 2 || at + 2 + length > bytes.size()) return result;
    if (marker == kApplication1 && result.orientation == 1) {
      result.orientation = ExifOrientation(bytes.substr(at + 4, length - 2));
    }
    at += 2 + length;
    if (marker == kStartOfScan) at = SkipScan(bytes, at);
  }
  return result;
}

}  // namespace prismaquant

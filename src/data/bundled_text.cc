#include "data/bundled_text.h"

extern "C" {
extern const char prismaquant_bundled_text_begin[];
extern const char prismaquant_bundled_text_end[];
}

namespace prismaquant {

std::string_view BundledText() {
  return {prismaquant_bundled_text_begin, prismaquant_bundled_text_end};
}

std::string CalibrationOrigin(const std::filesystem::path& file) {
  return file.empty() ? "the bundled calibration text" : file.string();
}

std::string CalibrationName(const std::filesystem::path& file) {
  return file.empty() ? "bundled" : file.filename().string();
}

}  // namespace prismaquant

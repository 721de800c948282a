#ifndef PRISMAQUANT_DATA_BUNDLED_TEXT_H_
#define PRISMAQUANT_DATA_BUNDLED_TEXT_H_

// The calibration text that is part of the program: data/calibration.jsonl, whose records hold
// plain text, so that it serves every checkpoint. Where a calibration file is expected, an empty
// path stands for it.

#include <filesystem>
#include <string>
#include <string_view>

namespace prismaquant {

// Records of a .jsonl file.
std::string_view BundledText();

// How messages name a calibration file.
std::string CalibrationOrigin(const std::filesystem::path& file);
// How records of a run name it, without folders: "bundled" for the bundled text.
std::string CalibrationName(const std::filesystem::path& file);

}  // namespace prismaquant

#endif  // PRISMAQUANT_DATA_BUNDLED_TEXT_H_

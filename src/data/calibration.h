#ifndef PRISMAQUANT_DATA_CALIBRATION_H_
#define PRISMAQUANT_DATA_CALIBRATION_H_

// Calibration data: windows of T tokens taken deterministically from a text, and captioned
// images. The last tenth of the text is never sampled from, so that it can serve as held-out text.

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "base/status.h"
#include "data/captions.h"
#include "tokenizer/tokenizer.h"

namespace prismaquant {

struct CalibrationOptions {
  // .txt (documents separated by blank lines) or .jsonl (text, messages or input_ids); empty is the
  // bundled text.
  std::filesystem::path file;
  int64_t samples = 32;
  int64_t tokens = 512;  // per sample, BOS included
  uint64_t seed = 0;
};

struct TokenWindows {
  std::vector<std::vector<int32_t>> windows;  // all of one length
  std::string fingerprint;                    // hex SHA-256 of all ids

  int64_t count() const { return static_cast<int64_t>(windows.size()); }
  int64_t length() const {
    return windows.empty() ? 0 : static_cast<int64_t>(windows.front().size());
  }
};

// All sequences, numbered through: the windows first, then the captions.
struct Calibration {
  TokenWindows text;
  std::vector<CaptionSequence> captions = {};

  int64_t count() const { return text.count() + static_cast<int64_t>(captions.size()); }
  bool IsCaption(int64_t sequence) const { return sequence >= text.count(); }
  const CaptionSequence& caption(int64_t sequence) const {
    return captions[static_cast<size_t>(sequence - text.count())];
  }
  const std::vector<int32_t>& ids(int64_t sequence) const {
    return IsCaption(sequence) ? caption(sequence).ids
                               : text.windows[static_cast<size_t>(sequence)];
  }
};

// N windows drawn without overlap; each begins with BOS if the tokenizer's post-processor adds one.
// Too short a text is kInvalidInput with the tokens found and needed. `folder` is the checkpoint
// (its chat template decides whether `messages` can be rendered as ChatML). `vocab_size` bounds ids
// of input_ids records.
Result<TokenWindows> SampleCalibration(const CalibrationOptions& options,
                                       const Tokenizer& tokenizer,
                                       const std::filesystem::path& folder, int64_t vocab_size);

// The first `tokens` tokens of a text as consecutive windows of `length`, no BOS, whole windows
// only (at least one, else kInvalidInput).
Result<TokenWindows> EvaluationWindows(const std::filesystem::path& file,
                                       const Tokenizer& tokenizer, int64_t tokens, int64_t length);
// The same, from the last tenth of a calibration file, the bundled text if its path is empty.
Result<TokenWindows> HeldOutWindows(const std::filesystem::path& calibration_file,
                                    const Tokenizer& tokenizer, const std::filesystem::path& folder,
                                    int64_t vocab_size, int64_t tokens, int64_t length);

}  // namespace prismaquant

#endif  // PRISMAQUANT_DATA_CALIBRATION_H_

#include "data/calibration.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "base/sha256.h"
#include "data/bundled_text.h"
#include "data/text_source.h"
#include "io/file_system.h"

namespace prismaquant {
namespace {

class SplitMix64 {
 public:
  explicit SplitMix64(uint64_t seed) : state_(seed) {}
  // Uniform in [0, bound); the bias of the reduction is below bound / 2^64.
  uint64_t Below(uint64_t bound) {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ULL);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return (z ^ (z >> 31)) % bound;
  }

 private:
  uint64_t state_;
};

// `count` of the numbers below `total`, rising.
std::vector<int64_t> DrawIndices(int64_t total, int64_t count, uint64_t seed) {
  std::vector<int64_t> indices(static_cast<size_t>(total));
  std::iota(indices.begin(), indices.end(), 0);
  SplitMix64 random(seed);
  for (int64_t i = 0; i < count; ++i) {
    const auto j = i + static_cast<int64_t>(random.Below(static_cast<uint64_t>(total - i)));
    std::swap(indices[static_cast<size_t>(i)], indices[static_cast<size_t>(j)]);
  }
  indices.resize(static_cast<size_t>(count));
  std::sort(indices.begin(), indices.end());
  return indices;
}

TokenWindows WithFingerprint(std::vector<std::vector<int32_t>> windows) {
  Sha256 hash;
  for (const auto& window : windows) hash.Update(std::as_bytes(std::span(window)));
  return {.windows = std::move(windows), .fingerprint = hash.Hex()};
}

// Consecutive whole windows of the first `tokens` tokens.
Result<TokenWindows> CutWindows(const std::vector<int32_t>& stream, int64_t tokens, int64_t length,
                                const std::string& origin) {
  const auto available = static_cast<int64_t>(stream.size());
  if (available < std::min(tokens, length) || tokens < length) {
    return Status::InvalidInput(fmt::format("{}: {} tokens, expected at least one window of {}",
                                            origin, std::min(available, tokens), length));
  }
  std::vector<std::vector<int32_t>> windows;
  for (int64_t begin = 0; begin + length <= std::min(tokens, available); begin += length) {
    windows.emplace_back(stream.begin() + begin, stream.begin() + begin + length);
  }
  return WithFingerprint(std::move(windows));
}

}  // namespace

Result<TokenWindows> SampleCalibration(const CalibrationOptions& options,
                                       const Tokenizer& tokenizer,
                                       const std::filesystem::path& folder, int64_t vocab_size) {
  const std::string origin = CalibrationOrigin(options.file);
  PQ_ASSIGN_OR_RETURN(const TextSource source, TextSource::Read(options.file, folder, vocab_size));
  PQ_ASSIGN_OR_RETURN(const int32_t end_of_text, EndOfText(folder, tokenizer));
  PQ_ASSIGN_OR_RETURN(
      const std::vector<int32_t> stream,
      TokenStream(source, 0, source.held_out_begin, tokenizer, end_of_text, origin));
  const int64_t text_tokens = options.tokens - (tokenizer.bos() ? 1 : 0);
  const int64_t available = text_tokens > 0 ? static_cast<int64_t>(stream.size()) / text_tokens : 0;
  if (available < options.samples) {
    return Status::InvalidInput(fmt::format(
        "{}: {} tokens outside its held-out last tenth, expected {} for {} samples of {}; lower "
        "--samples or "
        "--tokens or give more text",
        origin, stream.size(), options.samples * text_tokens, options.samples, options.tokens));
  }
  std::vector<std::vector<int32_t>> windows;
  for (const int64_t index : DrawIndices(available, options.samples, options.seed)) {
    std::vector<int32_t>& window = windows.emplace_back();
    if (tokenizer.bos()) window.push_back(*tokenizer.bos());
    const auto begin = stream.begin() + index * text_tokens;
    window.insert(window.end(), begin, begin + text_tokens);
  }
  for (const auto& window : windows) {
    for (const int32_t id : window) {
      if (id < vocab_size) continue;
      return Status::InvalidInput(fmt::format(
          "{}: the tokenizer gives id {}, the model's vocabulary has {}", origin, id, vocab_size));
    }
  }
  return WithFingerprint(std::move(windows));
}

Result<TokenWindows> EvaluationWindows(const std::filesystem::path& file,
                                       const Tokenizer& tokenizer, int64_t tokens, int64_t length) {
  PQ_ASSIGN_OR_RETURN(const std::string text, ReadFile(file));
  Result<std::vector<int32_t>> ids = tokenizer.Encode(text);
  if (!ids.ok())
    return Status::InvalidInput(fmt::format("{}: {}", file.string(), ids.status().message()));
  return CutWindows(*ids, tokens, length, file.string());
}

Result<TokenWindows> HeldOutWindows(const std::filesystem::path& calibration_file,
                                    const Tokenizer& tokenizer, const std::filesystem::path& folder,
                                    int64_t vocab_size, int64_t tokens, int64_t length) {
  const std::string origin = CalibrationOrigin(calibration_file);
  PQ_ASSIGN_OR_RETURN(const TextSource source,
                      TextSource::Read(calibration_file, folder, vocab_size));
  PQ_ASSIGN_OR_RETURN(const int32_t end_of_text, EndOfText(folder, tokenizer));
  PQ_ASSIGN_OR_RETURN(const std::vector<int32_t> stream,
                      TokenStream(source, source.held_out_begin, source.documents.size(), tokenizer,
                                  end_of_text, origin));
  return CutWindows(stream, tokens, length, origin + ", last tenth");
}

}  // namespace prismaquant

#ifndef PRISMAQUANT_TOKENIZER_TOKENIZER_H_
#define PRISMAQUANT_TOKENIZER_TOKENIZER_H_

// Tokenizer: text to token ids exactly as the `tokenizers` library does it from the same
// tokenizer.json, for byte-level BPE: added tokens are cut out first, then NFC (if the file asks
// for it), pre-tokenization by the file's patterns, and merges by rank. Immutable after Load;
// Encode is const and thread-safe.

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace prismaquant {

class Tokenizer {
 public:
  // Reads tokenizer.json of a checkpoint folder, and the added tokens that only
  // tokenizer_config.json lists. A component that is not supported is an error that names it.
  static Result<Tokenizer> Load(const std::filesystem::path& folder);
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  // Ids of `text` without special tokens around it; text that is not UTF-8 is kInvalidInput.
  Result<std::vector<int32_t>> Encode(std::string_view text) const;
  // The id that the post-processor puts before a text, if any.
  std::optional<int32_t> bos() const;
  // Id of a token by its exact content, added or in the vocabulary.
  std::optional<int32_t> TokenId(std::string_view token) const;
  // One more than the highest id.
  int32_t size() const;

 private:
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_TOKENIZER_TOKENIZER_H_

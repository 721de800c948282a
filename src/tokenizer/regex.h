#ifndef PRISMAQUANT_TOKENIZER_REGEX_H_
#define PRISMAQUANT_TOKENIZER_REGEX_H_

// Regex: a pattern of a tokenizer.json over UTF-8 text, compiled by PCRE2 so that it matches as the
// Oniguruma engine of the `tokenizers` library does. Immutable after Compile and thread-safe.

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/status.h"

namespace prismaquant {

class Regex {
 public:
  static Result<Regex> Compile(const std::string& pattern, const std::string& origin);
  Regex(Regex&&) noexcept;
  Regex& operator=(Regex&&) noexcept;
  ~Regex();

  // Non-overlapping, non-empty matches from left to right as [begin, end) byte offsets. `text` is
  // valid UTF-8.
  std::vector<std::pair<size_t, size_t>> FindAll(std::string_view text) const;

 private:
  struct Code;
  explicit Regex(std::unique_ptr<Code> code);
  std::unique_ptr<Code> code_;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_TOKENIZER_REGEX_H_

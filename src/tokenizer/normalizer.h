#ifndef PRISMAQUANT_TOKENIZER_NORMALIZER_H_
#define PRISMAQUANT_TOKENIZER_NORMALIZER_H_

// Normalizer: what a tokenizer.json does to each stretch of text between added tokens before it is
// cut into pieces: NFC, replacing one string by another, putting a string in front. Immutable after
// Parse and thread-safe.

#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "base/status.h"

namespace prismaquant {

class Normalizer {
 public:
  // `json`: the "normalizer" value; null does nothing.
  static Result<Normalizer> Parse(const Json& json, const std::string& origin);
  // `text` is valid UTF-8.
  std::string Apply(std::string_view text) const;

 private:
  enum class Kind { kNfc, kReplace, kPrepend };
  struct Step {
    Kind kind = Kind::kNfc;
    std::string from, to;  // kPrepend: `to`
  };
  Status Add(const Json& json, const std::string& origin);

  std::vector<Step> steps_;
};

// Every occurrence of `from`, which is not empty, from left to right.
std::string ReplaceAll(std::string_view text, std::string_view from, std::string_view to);

}  // namespace prismaquant

#endif  // PRISMAQUANT_TOKENIZER_NORMALIZER_H_

#ifndef PRISMAQUANT_TOKENIZER_PRETOKENIZER_H_
#define PRISMAQUANT_TOKENIZER_PRETOKENIZER_H_

// PreTokenizer: cuts normalized text into the pieces that BPE encodes one by one, by the steps of a
// tokenizer.json (Split, Digits, ByteLevel, Sequence). Immutable after Parse and thread-safe.

#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "base/status.h"
#include "tokenizer/regex.h"

namespace prismaquant {

class PreTokenizer {
 public:
  // `json`: the "pre_tokenizer" value; null leaves the text whole.
  static Result<PreTokenizer> Parse(const Json& json, const std::string& origin);
  // Whether it ends in ByteLevel, so that symbols are bytes.
  bool byte_level() const { return byte_level_; }
  // What Metaspace makes of a stretch of text, `first` if it begins the whole text: spaces become
  // its letter, and one is put in front as its scheme says.
  std::string Prepare(std::string text, bool first) const;
  // Pieces of prepared `text` in order; views into it.
  std::vector<std::string_view> Split(std::string_view text) const;

 private:
  enum class Behavior { kIsolated, kRemoved, kMergedWithPrevious, kMergedWithNext, kContiguous };
  struct Step {
    Regex regex;
    Behavior behavior = Behavior::kIsolated;
    bool invert = false;
  };
  Status Add(const Json& json, const std::string& origin);
  Status AddMetaspace(const Json& json, const std::string& origin);
  Status AddSplit(const Json& json, const std::string& origin);
  static void SplitPiece(const Step& step, std::string_view piece,
                         std::vector<std::string_view>& pieces);

  std::vector<Step> steps_;
  bool byte_level_ = false;
  std::string space_;  // Metaspace's letter; empty: there is no Metaspace
  bool prepend_first_ = false, prepend_later_ = false;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_TOKENIZER_PRETOKENIZER_H_

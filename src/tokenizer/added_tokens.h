#ifndef PRISMAQUANT_TOKENIZER_ADDED_TOKENS_H_
#define PRISMAQUANT_TOKENIZER_ADDED_TOKENS_H_

// AddedTokens: tokens that are cut out of a text before anything else sees it, the leftmost first
// and the longest of those that begin at one place. Immutable after it is filled and thread-safe.

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace prismaquant {

struct AddedToken {
  std::string content;
  int32_t id = 0;
  bool single_word = false;  // only between non-word characters
  bool lstrip = false;       // takes the white space before it
  bool rstrip = false;       // takes the white space after it
};

class AddedTokens {
 public:
  // A part of a text: an added token, or plain text (id < 0).
  struct Part {
    std::string_view text;
    int32_t id = -1;
  };

  void Add(AddedToken token);
  bool empty() const { return by_content_.empty(); }
  std::vector<Part> Split(std::string_view text) const;
  // -1 if there is none.
  int32_t Id(std::string_view content) const;

 private:
  // The longest token that begins at `text`'s start; null if none does.
  const AddedToken* Longest(std::string_view text) const;

  std::map<std::string, AddedToken, std::less<>> by_content_;
  std::map<char, std::vector<size_t>> lengths_;  // by first byte, longest first
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_TOKENIZER_ADDED_TOKENS_H_

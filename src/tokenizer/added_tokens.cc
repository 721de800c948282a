#include "tokenizer/added_tokens.h"

#include <utf8proc.h>

#include <algorithm>
#include <functional>
#include <utility>

namespace prismaquant {
namespace {

// The code point at the start of `text` and its length; valid UTF-8.
std::pair<int32_t, size_t> FirstCodePoint(std::string_view text) {
  utf8proc_int32_t code = 0;
  const auto size = utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                                     static_cast<utf8proc_ssize_t>(text.size()), &code);
  return {code, static_cast<size_t>(std::max<utf8proc_ssize_t>(size, 1))};
}

std::pair<int32_t, size_t> LastCodePoint(std::string_view text) {
  size_t begin = text.size() - 1;
  while (begin > 0 && (static_cast<unsigned char>(text[begin]) & 0xc0) == 0x80) --begin;
  return {FirstCodePoint(text.substr(begin)).first, text.size() - begin};
}

bool IsWhiteSpace(int32_t code) {
  const utf8proc_category_t category = utf8proc_category(code);
  return (code >= 9 && code <= 13) || code == 0x85 || category == UTF8PROC_CATEGORY_ZS ||
         category == UTF8PROC_CATEGORY_ZL || category == UTF8PROC_CATEGORY_ZP;
}

// \w: letters, marks, decimal digits, letter numbers and connectors.
bool IsWord(int32_t code) {
  switch (utf8proc_category(code)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    default:
      return false;
  }
}

size_t LeadingWhiteSpace(std::string_view text) {
  size_t size = 0;
  while (size < text.size()) {
    const auto [code, length] = FirstCodePoint(text.substr(size));
    if (!IsWhiteSpace(code)) break;
    size += length;
  }
  return size;
}

size_t TrailingWhiteSpace(std::string_view text) {
  size_t size = 0;
  while (size < text.size()) {
    const auto [code, length] = LastCodePoint(text.substr(0, text.size() - size));
    if (!IsWhiteSpace(code)) break;
    size += length;
  }
  return size;
}

bool StandsAlone(std::string_view text, size_t begin, size_t end) {
  if (begin > 0 && IsWord(LastCodePoint(text.substr(0, begin)).first)) return false;
  return end >= text.size() || !IsWord(FirstCodePoint(text.substr(end)).first);
}

}  // namespace

void AddedTokens::Add(AddedToken token) {
  if (token.content.empty()) return;
  std::vector<size_t>& lengths = lengths_[token.content.front()];
  lengths.push_back(token.content.size());
  std::sort(lengths.begin(), lengths.end(), std::greater<>());
  lengths.erase(std::unique(lengths.begin(), lengths.end()), lengths.end());
  by_content_[token.content] = std::move(token);
}

int32_t AddedTokens::Id(std::string_view content) const {
  const auto found = by_content_.find(content);
  return found == by_content_.end() ? -1 : found->second.id;
}

const AddedToken* AddedTokens::Longest(std::string_view text) const {
  const auto lengths = lengths_.find(text.front());
  if (lengths == lengths_.end()) return nullptr;
  for (const size_t length : lengths->second) {
    if (length > text.size()) continue;
    const auto found = by_content_.find(text.substr(0, length));
    if (found != by_content_.end()) return &found->second;
  }
  return nullptr;
}

std::vector<AddedTokens::Part> AddedTokens::Split(std::string_view text) const {
  std::vector<Part> parts;
  size_t done = 0, position = 0;
  while (position < text.size()) {
    const AddedToken* token = Longest(text.substr(position));
    if (token == nullptr) {
      ++position;
      continue;
    }
    size_t begin = position, end = position + token->content.size();
    position = end;
    if (token->single_word && !StandsAlone(text, begin, end)) continue;
    if (token->lstrip) begin = std::max(begin - TrailingWhiteSpace(text.substr(0, begin)), done);
    if (token->rstrip) end += LeadingWhiteSpace(text.substr(end));
    begin = std::max(begin, done);
    if (begin > done) parts.push_back({text.substr(done, begin - done), -1});
    parts.push_back({text.substr(begin, end - begin), token->id});
    done = std::max(end, done);
    position = std::max(position, done);
  }
  if (done < text.size()) parts.push_back({text.substr(done), -1});
  return parts;
}

}  // namespace prismaquant

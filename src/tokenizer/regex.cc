#define PCRE2_CODE_UNIT_WIDTH 8
#include "tokenizer/regex.h"

#include <fmt/format.h>
#include <pcre2.h>

#include <array>

namespace prismaquant {
namespace {

// PCRE2 counts U+180E as white space, Oniguruma (and Unicode since 6.3) does not.
constexpr char kWhiteSpace[] = R"(\t-\r\x{85}\p{Z})";

// Spells out \s and \S; \S inside a class has no such spelling.
Result<std::string> SpellOutWhiteSpace(const std::string& pattern, const std::string& origin) {
  std::string result;
  bool in_class = false;
  for (size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    if (c == '\\' && i + 1 < pattern.size()) {
      const char escaped = pattern[++i];
      if (escaped == 's') {
        result += in_class ? std::string(kWhiteSpace) : fmt::format("[{}]", kWhiteSpace);
      } else if (escaped == 'S' && in_class) {
        return Status::InvalidInput(fmt::format(
            "{}: pattern \"{}\" has \\S inside a class, which is not supported", origin, pattern));
      } else if (escaped == 'S') {
        result += fmt::format("[^{}]", kWhiteSpace);
      } else {
        result += c;
        result += escaped;
      }
      continue;
    }
    if (c == '[') in_class = true;
    if (c == ']') in_class = false;
    result += c;
  }
  return result;
}

}  // namespace

struct Regex::Code {
  pcre2_code* handle = nullptr;
  explicit Code(pcre2_code* compiled) : handle(compiled) {}
  Code(const Code&) = delete;
  Code& operator=(const Code&) = delete;
  ~Code() { pcre2_code_free(handle); }
};

Regex::Regex(std::unique_ptr<Code> code) : code_(std::move(code)) {}
Regex::Regex(Regex&&) noexcept = default;
Regex& Regex::operator=(Regex&&) noexcept = default;
Regex::~Regex() = default;

Result<Regex> Regex::Compile(const std::string& pattern, const std::string& origin) {
  PQ_ASSIGN_OR_RETURN(const std::string spelled, SpellOutWhiteSpace(pattern, origin));
  int error = 0;
  PCRE2_SIZE offset = 0;
  pcre2_code* handle =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(spelled.data()), spelled.size(),
                    PCRE2_UTF | PCRE2_UCP | PCRE2_NO_UTF_CHECK, &error, &offset, nullptr);
  if (handle == nullptr) {
    std::array<PCRE2_UCHAR, 256> message{};
    pcre2_get_error_message(error, message.data(), message.size());
    return Status::InvalidInput(fmt::format("{}: pattern \"{}\": {}", origin, pattern,
                                            reinterpret_cast<const char*>(message.data())));
  }
  pcre2_jit_compile(handle, PCRE2_JIT_COMPLETE);
  return Regex(std::make_unique<Code>(handle));
}

std::vector<std::pair<size_t, size_t>> Regex::FindAll(std::string_view text) const {
  std::vector<std::pair<size_t, size_t>> matches;
  pcre2_match_data* data = pcre2_match_data_create_from_pattern(code_->handle, nullptr);
  const PCRE2_SIZE* ends = pcre2_get_ovector_pointer(data);
  size_t position = 0;
  while (position < text.size()) {
    const int found = pcre2_match(code_->handle, reinterpret_cast<PCRE2_SPTR>(text.data()),
                                  text.size(), position, PCRE2_NO_UTF_CHECK, data, nullptr);
    if (found < 0) break;
    if (ends[1] > ends[0]) {
      matches.emplace_back(ends[0], ends[1]);
      position = ends[1];
      continue;
    }
    position = ends[1] + 1;
    while (position < text.size() && (static_cast<unsigned char>(text[position]) & 0xc0) == 0x80)
      ++position;
  }
  pcre2_match_data_free(data);
  return matches;
}

}  // namespace prismaquant

#include "data/text_source.h"

#include <fmt/format.h>

#include <algorithm>
#include <string_view>
#include <utility>

#include "base/json.h"
#include "data/bundled_text.h"
#include "data/chat_template.h"
#include "io/file_system.h"

namespace prismaquant {
namespace {

constexpr char kRenderingHint[] =
    "records with \"messages\" need a ChatML chat template; turn them into input_ids first: "
    "tok = transformers.AutoTokenizer.from_pretrained(MODEL); "
    "print(json.dumps({\"input_ids\": tok.apply_chat_template(record[\"messages\"], "
    "tokenize=True)})) per record";

// Cuts after each run of blank lines, so that the documents joined are the text again.
std::vector<TextDocument> SplitAtBlankLines(const std::string& text) {
  std::vector<TextDocument> documents;
  size_t begin = 0, line = 0;
  bool blank_seen = false;
  while (line < text.size()) {
    const size_t newline = text.find('\n', line);
    const size_t next = newline == std::string::npos ? text.size() : newline + 1;
    const bool blank = text.find_first_not_of(" \t\r\n", line) >= next;
    if (blank_seen && !blank) {
      documents.push_back({text.substr(begin, line - begin), false});
      begin = line;
      blank_seen = false;
    }
    blank_seen |= blank && line > begin;
    line = next;
  }
  if (begin < text.size()) documents.push_back({text.substr(begin), false});
  return documents;
}

Result<std::string> RenderChatMl(const Json& messages, const std::string& where) {
  std::string text;
  for (const Json& message : messages) {
    PQ_ASSIGN_OR_RETURN(const std::string role, JsonString(message, "role", where));
    PQ_ASSIGN_OR_RETURN(const std::string content, JsonString(message, "content", where));
    text += fmt::format("<|im_start|>{}\n{}<|im_end|>\n", role, content);
  }
  return text;
}

Result<std::vector<int32_t>> ReadIds(const Json& list, int64_t vocab_size,
                                     const std::string& where) {
  std::vector<int32_t> ids;
  for (const Json& id : list) {
    if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() >= vocab_size) {
      return Status::InvalidInput(fmt::format("{}: input_ids hold {}, expected an id below {}",
                                              where, id.dump(), vocab_size));
    }
    ids.push_back(id.get<int32_t>());
  }
  return ids;
}

class JsonLinesReader {
 public:
  JsonLinesReader(const std::filesystem::path& folder, int64_t vocab_size)
      : folder_(folder), vocab_size_(vocab_size) {}

  Result<TextDocument> Record(const std::string& line, const std::string& where) {
    PQ_ASSIGN_OR_RETURN(const Json json, ParseJson(line, where));
    if (json.is_object() && json.contains("text") && json["text"].is_string()) {
      return TextDocument{json["text"].get<std::string>(), true};
    }
    if (json.is_object() && json.contains("input_ids") && json["input_ids"].is_array()) {
      PQ_ASSIGN_OR_RETURN(std::vector<int32_t> ids, ReadIds(json["input_ids"], vocab_size_, where));
      return TextDocument{std::move(ids), false};
    }
    if (json.is_object() && json.contains("messages") && json["messages"].is_array()) {
      if (!template_read_) {
        PQ_ASSIGN_OR_RETURN(const ChatTemplate chat, ChatTemplate::Read(folder_));
        chat_ml_ = chat.chat_ml;
        template_read_ = true;
      }
      if (!chat_ml_) return Status::InvalidInput(fmt::format("{}: {}", where, kRenderingHint));
      PQ_ASSIGN_OR_RETURN(std::string text, RenderChatMl(json["messages"], where));
      return TextDocument{std::move(text), true};
    }
    return Status::InvalidInput(
        fmt::format("{}: expected a record with text, messages or input_ids", where));
  }

 private:
  const std::filesystem::path& folder_;
  int64_t vocab_size_;
  bool template_read_ = false, chat_ml_ = false;
};

size_t DocumentBytes(const TextDocument& document) {
  const auto* text = std::get_if<std::string>(&document.content);
  return text == nullptr ? 0 : text->size();
}

TextSource FromText(const std::string& text) {
  TextSource source{.documents = SplitAtBlankLines(text)};
  size_t bytes = 0;
  while (source.held_out_begin < source.documents.size() &&
         bytes < text.size() - text.size() / 10) {
    bytes += DocumentBytes(source.documents[source.held_out_begin++]);
  }
  return source;
}

Result<TextSource> FromJsonLines(std::string_view text, const std::string& origin,
                                 const std::filesystem::path& folder, int64_t vocab_size) {
  TextSource source;
  JsonLinesReader reader(folder, vocab_size);
  size_t begin = 0;
  for (int64_t number = 1; begin < text.size(); ++number) {
    const size_t newline = std::min(text.find('\n', begin), text.size());
    const std::string line(text.substr(begin, newline - begin));
    begin = newline + 1;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    PQ_ASSIGN_OR_RETURN(TextDocument document,
                        reader.Record(line, fmt::format("{}: line {}", origin, number)));
    source.documents.push_back(std::move(document));
  }
  source.held_out_begin = source.documents.size() - source.documents.size() / 10;
  return source;
}

}  // namespace

Result<TextSource> TextSource::Read(const std::filesystem::path& file,
                                    const std::filesystem::path& folder, int64_t vocab_size) {
  const std::string origin = CalibrationOrigin(file);
  if (file.empty()) return FromJsonLines(BundledText(), origin, folder, vocab_size);
  PQ_ASSIGN_OR_RETURN(const std::string text, ReadFile(file));
  if (file.extension() == ".jsonl") return FromJsonLines(text, origin, folder, vocab_size);
  return FromText(text);
}

Result<std::vector<int32_t>> TokenStream(const TextSource& source, size_t begin, size_t end,
                                         const Tokenizer& tokenizer, int32_t end_of_text,
                                         const std::string& origin) {
  std::vector<int32_t> stream;
  for (size_t d = begin; d < end; ++d) {
    const TextDocument& document = source.documents[d];
    if (const auto* ids = std::get_if<std::vector<int32_t>>(&document.content)) {
      stream.insert(stream.end(), ids->begin(), ids->end());
      continue;
    }
    Result<std::vector<int32_t>> ids = tokenizer.Encode(std::get<std::string>(document.content));
    if (!ids.ok())
      return Status::InvalidInput(
          fmt::format("{}: document {}: {}", origin, d + 1, ids.status().message()));
    stream.insert(stream.end(), ids->begin(), ids->end());
    if (document.ends && end_of_text >= 0) stream.push_back(end_of_text);
  }
  return stream;
}

Result<int32_t> EndOfText(const std::filesystem::path& folder, const Tokenizer& tokenizer) {
  const std::filesystem::path path = folder / "tokenizer_config.json";
  std::error_code error;
  if (!std::filesystem::exists(path, error)) return -1;
  PQ_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  PQ_ASSIGN_OR_RETURN(const Json config, ParseJson(text, path.string()));
  Json token;
  PQ_RETURN_IF_ERROR(GuardJson(path.string(), [&]() -> Status {
    token = config.value("eos_token", Json());
    if (token.is_object()) token = token.value("content", Json());
    return {};
  }));
  return token.is_string() ? tokenizer.TokenId(token.get<std::string>()).value_or(-1) : -1;
}

}  // namespace prismaquant

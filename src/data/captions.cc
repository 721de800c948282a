#include "data/captions.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <span>
#include <sstream>

#include "base/json.h"
#include "base/sha256.h"
#include "data/chat_template.h"
#include "data/image.h"
#include "io/file_system.h"

namespace prismaquant {
namespace {

namespace stdfs = std::filesystem;

constexpr char kDefaultPrompt[] = "Describe the image.";

struct CaptionRecord {
  stdfs::path image;
  std::string prompt, caption;
};

Result<std::string> Text(const Json& record, const char* key, const std::string& where) {
  PQ_ASSIGN_OR_RETURN(std::string text, JsonString(record, key, where));
  if (text.empty()) return Status::InvalidInput(fmt::format("{}: {} is empty", where, key));
  return text;
}

Result<std::vector<CaptionRecord>> ReadJsonLines(const stdfs::path& file) {
  PQ_ASSIGN_OR_RETURN(const std::string contents, ReadFile(file));
  std::vector<CaptionRecord> records;
  std::istringstream lines(contents);
  int64_t number = 0;
  for (std::string line; std::getline(lines, line);) {
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    const std::string where = fmt::format("{}: line {}", file.string(), number);
    PQ_ASSIGN_OR_RETURN(const Json record, ParseJson(line, where));
    CaptionRecord& entry = records.emplace_back();
    PQ_ASSIGN_OR_RETURN(const std::string image, Text(record, "image", where));
    entry.image = file.parent_path() / image;
    const bool named = record.contains("caption");
    PQ_ASSIGN_OR_RETURN(entry.caption, Text(record, named ? "caption" : "text", where));
    entry.prompt = kDefaultPrompt;
    if (record.contains("prompt")) {
      PQ_ASSIGN_OR_RETURN(entry.prompt, Text(record, "prompt", where));
    }
  }
  return records;
}

bool IsImageFile(const stdfs::path& file) {
  std::string extension = file.extension().string();
  std::transform(extension.begin(), extension.end(), extension.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return extension == ".png" || extension == ".jpg" || extension == ".jpeg";
}

Result<std::vector<CaptionRecord>> ReadFolder(const stdfs::path& folder) {
  std::error_code error;
  if (stdfs::exists(folder / "captions.jsonl", error)) {
    return ReadJsonLines(folder / "captions.jsonl");
  }
  std::vector<CaptionRecord> records;
  for (const auto& entry : stdfs::directory_iterator(folder, error)) {
    if (IsImageFile(entry.path())) records.push_back({entry.path(), kDefaultPrompt, ""});
  }
  std::sort(records.begin(), records.end(),
            [](const CaptionRecord& a, const CaptionRecord& b) { return a.image < b.image; });
  for (CaptionRecord& record : records) {
    stdfs::path text = record.image;
    text.replace_extension(".txt");
    if (!stdfs::exists(text, error)) {
      return Status::InvalidInput(
          fmt::format("{}: has no caption, expected it in {} or in captions.jsonl",
                      record.image.string(), text.filename().string()));
    }
    PQ_ASSIGN_OR_RETURN(std::string caption, ReadFile(text));
    const size_t end = caption.find_last_not_of(" \t\r\n");
    record.caption = caption.substr(0, end == std::string::npos ? 0 : end + 1);
    if (record.caption.empty()) return Status::InvalidInput(text.string() + ": is empty");
  }
  return records;
}

class SequenceBuilder {
 public:
  SequenceBuilder(const Tokenizer& tokenizer, const ImageTokens& tokens, bool thinks,
                  const ImageProcessor& processor)
      : tokenizer_(tokenizer), tokens_(tokens), thinks_(thinks), processor_(processor) {}

  Result<CaptionSequence> Build(const CaptionRecord& record) const {
    CaptionSequence sequence;
    sequence.name = record.image.filename().string();
    PQ_ASSIGN_OR_RETURN(const Image image, LoadImage(record.image));
    PQ_ASSIGN_OR_RETURN(sequence.image, processor_.Process(image, record.image.string()));
    const int64_t merge = processor_.settings().merge_size;
    std::vector<int32_t>& ids = sequence.ids;
    PQ_RETURN_IF_ERROR(Append("<|im_start|>user\n", ids));
    ids.push_back(tokens_.start);
    ids.insert(ids.end(), static_cast<size_t>(sequence.image.patches / (merge * merge)),
               tokens_.image);
    ids.push_back(tokens_.end);
    PQ_RETURN_IF_ERROR(Append(record.prompt + "<|im_end|>\n<|im_start|>assistant\n", ids));
    if (thinks_) PQ_RETURN_IF_ERROR(Append("<think>\n\n</think>\n\n", ids));
    sequence.first_label = static_cast<int64_t>(ids.size());
    PQ_RETURN_IF_ERROR(Append(record.caption + "<|im_end|>", ids));
    return sequence;
  }

 private:
  Status Append(const std::string& text, std::vector<int32_t>& ids) const {
    PQ_ASSIGN_OR_RETURN(const std::vector<int32_t> more, tokenizer_.Encode(text));
    for (const int32_t id : more) {
      if (id == tokens_.image) {
        return Status::InvalidInput(fmt::format("\"{}\": holds an image token", text));
      }
    }
    ids.insert(ids.end(), more.begin(), more.end());
    return {};
  }

  const Tokenizer& tokenizer_;
  ImageTokens tokens_;
  bool thinks_;
  const ImageProcessor& processor_;
};

// `limit` of `count` indices, evenly spread.
std::vector<size_t> Spread(size_t count, int64_t limit) {
  const size_t kept = limit > 0 ? std::min(count, static_cast<size_t>(limit)) : count;
  std::vector<size_t> indices;
  for (size_t i = 0; i < kept; ++i) indices.push_back(i * count / kept);
  return indices;
}

}  // namespace

Result<std::vector<CaptionSequence>> LoadCaptions(const stdfs::path& source,
                                                  const stdfs::path& folder,
                                                  const Tokenizer& tokenizer,
                                                  const ImageTokens& tokens, int64_t limit) {
  if (tokens.image < 0 || tokens.start < 0 || tokens.end < 0) {
    return Status::InvalidInput(fmt::format("{}: names no image tokens, so images cannot be used",
                                            (folder / "config.json").string()));
  }
  PQ_ASSIGN_OR_RETURN(const ChatTemplate chat, ChatTemplate::Read(folder));
  if (!chat.chat_ml) {
    return Status::InvalidInput(fmt::format(
        "{}: its chat template is not ChatML, which captions are written in", folder.string()));
  }
  PQ_ASSIGN_OR_RETURN(const ImageProcessor processor, ImageProcessor::Read(folder));
  std::error_code error;
  const bool is_folder = stdfs::is_directory(source, error);
  PQ_ASSIGN_OR_RETURN(const std::vector<CaptionRecord> records,
                      is_folder ? ReadFolder(source) : ReadJsonLines(source));
  if (records.empty()) {
    return Status::InvalidInput(fmt::format("{}: holds no captioned image", source.string()));
  }
  const SequenceBuilder builder(tokenizer, tokens, chat.thinks, processor);
  std::vector<CaptionSequence> captions;
  for (const size_t index : Spread(records.size(), limit)) {
    PQ_ASSIGN_OR_RETURN(CaptionSequence sequence, builder.Build(records[index]));
    captions.push_back(std::move(sequence));
  }
  return captions;
}

std::string CaptionsFingerprint(const std::vector<CaptionSequence>& captions) {
  Sha256 hash;
  for (const CaptionSequence& caption : captions) {
    const ImagePatches& image = caption.image;
    const std::array<int64_t, 4> shape = {static_cast<int64_t>(caption.ids.size()),
                                          caption.first_label, image.grid_rows, image.grid_columns};
    hash.Update(std::as_bytes(std::span(shape)));
    hash.Update(std::as_bytes(std::span(caption.ids)));
    hash.Update(std::as_bytes(std::span(image.values)));
  }
  return hash.Hex();
}

}  // namespace prismaquant

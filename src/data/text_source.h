#ifndef PRISMAQUANT_DATA_TEXT_SOURCE_H_
#define PRISMAQUANT_DATA_TEXT_SOURCE_H_

// TextSource: the documents of a calibration file, in order, as text or as ready token ids. The
// last tenth (of the bytes of a .txt file, cut between documents; of the records of a .jsonl file)
// is held out.

#include <cstdint>
#include <filesystem>
#include <string>
#include <variant>
#include <vector>

#include "base/status.h"
#include "tokenizer/tokenizer.h"

namespace prismaquant {

struct TextDocument {
  std::variant<std::string, std::vector<int32_t>> content;
  bool ends = false;  // an end-of-text token follows it in the stream
};

struct TextSource {
  std::vector<TextDocument> documents;
  size_t held_out_begin = 0;  // index of the first held-out document

  // `folder` is the checkpoint, whose chat template decides about `messages` records. An empty
  // `file` is the bundled text.
  static Result<TextSource> Read(const std::filesystem::path& file,
                                 const std::filesystem::path& folder, int64_t vocab_size);
};

// Ids of documents [begin, end) as one stream. `end_of_text` (if >= 0) is put after documents that
// end.
Result<std::vector<int32_t>> TokenStream(const TextSource& source, size_t begin, size_t end,
                                         const Tokenizer& tokenizer, int32_t end_of_text,
                                         const std::string& origin);

// The checkpoint's end-of-text id by its tokenizer_config.json, -1 if it names none.
Result<int32_t> EndOfText(const std::filesystem::path& folder, const Tokenizer& tokenizer);

}  // namespace prismaquant

#endif  // PRISMAQUANT_DATA_TEXT_SOURCE_H_

#ifndef PRISMAQUANT_DATA_CAPTIONS_H_
#define PRISMAQUANT_DATA_CAPTIONS_H_

// Captions: images with what is to be said of them, as sequences of tokens for a model with a
// vision tower. A sequence is a ChatML exchange: the image and a prompt from the user, the caption
// as the reply. Only the caption's tokens have a loss.

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "base/status.h"
#include "data/image_processor.h"
#include "tokenizer/tokenizer.h"

namespace prismaquant {

struct CaptionSequence {
  std::string name;          // of the image file
  std::vector<int32_t> ids;  // the image's token as often as the image has merged patches
  int64_t first_label = 0;   // ids from here on are the caption and what ends it
  ImagePatches image;
};

// Ids of the tokens that stand for an image, and before and after it.
struct ImageTokens {
  int32_t image = -1, start = -1, end = -1;
};

// `source`: a .jsonl file of records {"image": path relative to the file, "text" or "caption":
// caption, "prompt": optional}, or a folder that holds captions.jsonl or, for each image, a .txt
// file of the same name. Images are those of `source` in order, at most `limit` (0: all), evenly
// taken. `folder` is the checkpoint, whose chat template must be ChatML. kInvalidInput names what
// is wrong.
Result<std::vector<CaptionSequence>> LoadCaptions(const std::filesystem::path& source,
                                                  const std::filesystem::path& folder,
                                                  const Tokenizer& tokenizer,
                                                  const ImageTokens& tokens, int64_t limit);

// Hex SHA-256 of all ids, pixels and shapes.
std::string CaptionsFingerprint(const std::vector<CaptionSequence>& captions);

}  // namespace prismaquant

#endif  // PRISMAQUANT_DATA_CAPTIONS_H_

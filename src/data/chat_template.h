#ifndef PRISMAQUANT_DATA_CHAT_TEMPLATE_H_
#define PRISMAQUANT_DATA_CHAT_TEMPLATE_H_

// What the program needs to know of a checkpoint's chat template: whether it is ChatML, whose lines
// it then writes itself, and whether replies begin with a block of thoughts. Templates are searched
// for their marks, never run.

#include <filesystem>

#include "base/status.h"

namespace prismaquant {

struct ChatTemplate {
  bool chat_ml = false;  // <|im_start|>role\ncontent<|im_end|>\n
  bool thinks = false;   // a reply without thoughts begins with "<think>\n\n</think>\n\n"

  // Of a checkpoint folder; both false if it has no template.
  static Result<ChatTemplate> Read(const std::filesystem::path& folder);
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_DATA_CHAT_TEMPLATE_H_

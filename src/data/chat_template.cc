#include "data/chat_template.h"

#include <string>

#include "base/json.h"
#include "io/file_system.h"

namespace prismaquant {

Result<ChatTemplate> ChatTemplate::Read(const std::filesystem::path& folder) {
  std::string text;
  std::error_code error;
  for (const char* name : {"chat_template.jinja", "chat_template.json", "tokenizer_config.json"}) {
    if (!std::filesystem::exists(folder / name, error)) continue;
    PQ_ASSIGN_OR_RETURN(const std::string contents, ReadFile(folder / name));
    if (std::string(name) != "tokenizer_config.json") {
      text += contents;
      continue;
    }
    PQ_ASSIGN_OR_RETURN(const Json config, ParseJson(contents, (folder / name).string()));
    if (config.contains("chat_template")) text += config["chat_template"].dump();
  }
  const auto holds = [&](const char* mark) { return text.find(mark) != std::string::npos; };
  return ChatTemplate{.chat_ml = holds("<|im_start|>") && holds("<|im_end|>"),
                      .thinks = holds("<think>")};
}

}  // namespace prismaquant

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "cli/command.h"
#include "io/file_system.h"
#include "tokenizer/tokenizer.h"

namespace prismaquant {
namespace {

struct TokenizeOptions {
  std::string folder, text, json = "-";
};

// The texts of a file: its lines, or the `text` of its records.
Result<std::vector<std::string>> ReadTexts(const std::filesystem::path& file) {
  PQ_ASSIGN_OR_RETURN(const std::string contents, ReadFile(file));
  const bool records = file.extension() == ".jsonl";
  std::vector<std::string> texts;
  for (size_t begin = 0; begin < contents.size();) {
    const size_t end = std::min(contents.find('\n', begin), contents.size());
    std::string line = contents.substr(begin, end - begin);
    begin = end + 1;
    if (records) {
      const std::string where = fmt::format("{}: line {}", file.string(), texts.size() + 1);
      PQ_ASSIGN_OR_RETURN(const Json record, ParseJson(line, where));
      PQ_ASSIGN_OR_RETURN(line, JsonString(record, "text", where));
    }
    texts.push_back(std::move(line));
  }
  return texts;
}

Status RunTokenize(const TokenizeOptions& options) {
  PQ_ASSIGN_OR_RETURN(const Tokenizer tokenizer, Tokenizer::Load(options.folder));
  PQ_ASSIGN_OR_RETURN(const std::vector<std::string> texts, ReadTexts(options.text));
  std::string output;
  for (size_t i = 0; i < texts.size(); ++i) {
    Result<std::vector<int32_t>> ids = tokenizer.Encode(texts[i]);
    if (!ids.ok()) {
      return Status::InvalidInput(
          fmt::format("{}: line {}: {}", options.text, i + 1, ids.status().message()));
    }
    output += fmt::format("[{}]\n", fmt::join(*ids, ","));
  }
  if (options.json != "-") return WriteFileAtomically(FileSystem::Default(), options.json, output);
  if (std::fwrite(output.data(), 1, output.size(), stdout) != output.size() ||
      std::fflush(stdout) != 0) {
    return Status::System("standard output: cannot be written");
  }
  return {};
}

}  // namespace

Command AddTokenizeCommand(CLI::App& app) {
  const auto options = std::make_shared<TokenizeOptions>();
  CLI::App* command =
      app.add_subcommand("tokenize", "Print the token ids of each line or record of a text");
  command->add_option("DIR", options->folder, "Checkpoint folder with tokenizer.json")->required();
  command
      ->add_option("--text", options->text,
                   "Text file: one line each (.txt), or records with `text` (.jsonl)")
      ->required();
  command->add_option("--json", options->json,
                      "Where the JSON arrays go, one a line; - is standard output");
  return {command, [options] { return RunTokenize(*options); }};
}

}  // namespace prismaquant

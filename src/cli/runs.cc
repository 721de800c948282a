#include <fmt/format.h>

#include <filesystem>
#include <memory>
#include <set>
#include <string>
#include <utility>

#include "base/progress.h"
#include "cli/session.h"
#include "store/run_store.h"

namespace prismaquant {
namespace {

struct RunsFlags {
  std::string work, json;
};

Result<int64_t> FolderBytes(const std::filesystem::path& folder) {
  std::error_code error;
  int64_t bytes = 0;
  auto entry = std::filesystem::recursive_directory_iterator(folder, error);
  const auto end = std::filesystem::recursive_directory_iterator();
  for (; !error && entry != end; entry.increment(error)) {
    if (entry->is_regular_file(error) && !error)
      bytes += static_cast<int64_t>(entry->file_size(error));
    if (error) break;
  }
  if (error) return Status::System(fmt::format("{}: {}", folder.string(), error.message()));
  return bytes;
}

Result<Json> Describe(RunStore& store) {
  Json json = {{"schema", 1}, {"folder", store.folder().string()}, {"stages", Json::object()}};
  PQ_ASSIGN_OR_RETURN(const auto source, store.Note(kSourceNote));
  PQ_ASSIGN_OR_RETURN(const auto identity, store.Identity());
  PQ_ASSIGN_OR_RETURN(const auto stages, store.Stages());
  PQ_ASSIGN_OR_RETURN(json["priced"], store.PricedFormats(Rounding::kNearest));
  PQ_ASSIGN_OR_RETURN(json["priced_gptq"], store.PricedFormats(Rounding::kGptq));
  PQ_ASSIGN_OR_RETURN(json["bytes"], FolderBytes(store.folder()));
  if (source) json["source_folder"] = *source;
  json["identity"] = identity;
  for (const auto& [stage, layers] : stages) json["stages"][stage] = layers;
  return json;
}

void Print(const Json& json) {
  fmt::print("{:<20} {}\n", "run store", json["folder"].get<std::string>());
  fmt::print("{:<20} {}\n", "size", FormatBytes(json["bytes"].get<int64_t>()));
  fmt::print("{:<20} {}\n", "source folder", json.value("source_folder", "none"));
  for (const auto& [key, value] : json["identity"].items())
    fmt::print("{:<20} {}\n", key, value.get<std::string>());
  for (const auto& [key, title] :
       {std::pair("priced", "priced"), std::pair("priced_gptq", "priced, GPTQ")}) {
    if (json[key].empty()) continue;
    fmt::print("{:<20} {}\n", title, fmt::join(json[key].get<std::set<std::string>>(), ", "));
  }
  for (const auto& [stage, layers] : json["stages"].items())
    fmt::print("{:<20} {} layers done\n", stage, layers.get<int64_t>());
}

Status RunRuns(const RunsFlags& flags) {
  PQ_ASSIGN_OR_RETURN(RunStore store, RunStore::OpenExisting(FileSystem::Default(), flags.work));
  PQ_ASSIGN_OR_RETURN(const Json json, Describe(store));
  if (flags.json != "-") Print(json);
  return WriteJson(json, flags.json);
}

}  // namespace

Command AddRunsCommand(CLI::App& app) {
  const auto flags = std::make_shared<RunsFlags>();
  CLI::App* command = app.add_subcommand("runs", "Print what a run store holds");
  command->add_option("WORK", flags->work, "Run store folder")->required();
  command->add_option("--json", flags->json, "Write it as JSON; - is standard output");
  return {command, [flags] { return RunRuns(*flags); }};
}

}  // namespace prismaquant

#include "cli/command.h"

#include <fmt/format.h>

#include <cstdio>

#include "io/file_system.h"

namespace prismaquant {

Status WriteJson(const Json& json, const std::string& path) {
  if (path.empty()) return {};
  const std::string text = json.dump(2) + "\n";
  if (path != "-") return WriteFileAtomically(FileSystem::Default(), path, text);
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
    return Status::System("standard output: cannot be written");
  }
  return {};
}

}  // namespace prismaquant

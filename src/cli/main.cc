#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <utility>
#include <vector>

#include "base/interrupt.h"
#include "base/status.h"
#include "base/version.h"
#include "cli/command.h"
#include "formats/block_pool.h"
#include "formats/torch_guard.h"

namespace {

constexpr int kBadUsage = static_cast<int>(prismaquant::StatusCode::kInvalidInput);
constexpr int kSystemFailure = static_cast<int>(prismaquant::StatusCode::kSystem);
// OpenMP's threads spin while they wait for each other, by default for so long that on a machine
// with other work they take the processor from the very threads they wait for, and a run becomes
// several times slower. A thousand turns are enough for the waits of an idle machine. What the
// libraries allocate for themselves comes from the system page by page, which takes longer than
// computing it; huge pages are several hundred times fewer. A variable that the user has set stays.
constexpr std::array<std::pair<const char*, const char*>, 3> kRuntimeSettings = {{
    {"OMP_WAIT_POLICY", "passive"},
    {"GOMP_SPINCOUNT", "1000"},
    {"GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"},
}};

// The variables are read before main, so the program starts itself once more; where it cannot, it
// goes on as it is.
void StartWithSettings(char** argv) {
  bool changed = false;
  for (const auto& [name, value] : kRuntimeSettings) {
    if (std::getenv(name) != nullptr) continue;
    if (setenv(name, value, 1) != 0) return;
    changed = true;
  }
  if (changed) execv("/proc/self/exe", argv);
}

int RunParsed(const std::vector<prismaquant::Command>& commands) {
  for (const prismaquant::Command& command : commands) {
    if (!command.app->parsed()) continue;
    const prismaquant::Status status =
        prismaquant::GuardTorch(command.app->get_name(), command.run);
    if (!status.ok()) fmt::print(stderr, "prismaquant: {}\n", status.message());
    return status.exit_code();
  }
  return 0;
}

int Run(int argc, char** argv) {
  CLI::App app("Quantizes language models to mixed-precision compressed-tensors checkpoints.",
               "prismaquant");
  app.set_version_flag("--version", prismaquant::kVersion);
  app.require_subcommand(1);
  const std::vector<prismaquant::Command> commands = {
      prismaquant::AddQuantizeCommand(app), prismaquant::AddProbeCommand(app),
      prismaquant::AddAllocateCommand(app), prismaquant::AddExportCommand(app),
      prismaquant::AddEvaluateCommand(app), prismaquant::AddInspectCommand(app),
      prismaquant::AddVerifyCommand(app),   prismaquant::AddTokenizeCommand(app),
      prismaquant::AddRunsCommand(app)};
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    const int code = app.exit(error);
    return code == 0 ? 0 : kBadUsage;
  }
  prismaquant::CatchInterrupts();
  prismaquant::UseBlockPool();
  return RunParsed(commands);
}

}  // namespace

int main(int argc, char** argv) {
  StartWithSettings(argv);
  try {
    return Run(argc, argv);
  } catch (const std::exception& error) {
    std::fputs("prismaquant: ", stderr);
    std::fputs(error.what(), stderr);
    std::fputs("\n", stderr);
    return kSystemFailure;
  }
}

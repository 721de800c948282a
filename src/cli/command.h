#ifndef PRISMAQUANT_CLI_COMMAND_H_
#define PRISMAQUANT_CLI_COMMAND_H_

// Command: a subcommand of the program. Adding one registers its options with CLI11 and hands back
// what to run once the command line is parsed; the options live as long as the closure. One file
// per command.

#include <CLI/CLI.hpp>
#include <functional>

#include "base/json.h"
#include "base/status.h"

namespace prismaquant {

using CommandBody = std::function<Status()>;

struct Command {
  CLI::App* app = nullptr;
  CommandBody run;
};

Command AddQuantizeCommand(CLI::App& app);
Command AddProbeCommand(CLI::App& app);
Command AddAllocateCommand(CLI::App& app);
Command AddExportCommand(CLI::App& app);
Command AddEvaluateCommand(CLI::App& app);
Command AddInspectCommand(CLI::App& app);
Command AddVerifyCommand(CLI::App& app);
Command AddTokenizeCommand(CLI::App& app);
Command AddRunsCommand(CLI::App& app);

// Writes `json` to a file, or to standard output if `path` is "-"; does nothing if it is empty.
Status WriteJson(const Json& json, const std::string& path);

}  // namespace prismaquant

#endif  // PRISMAQUANT_CLI_COMMAND_H_

#ifndef PRISMAQUANT_CLI_RUN_FLAGS_H_
#define PRISMAQUANT_CLI_RUN_FLAGS_H_

// RunFlags: options of the long commands that change nothing of their result.

#include <CLI/CLI.hpp>
#include <string>

#include "performance/run_profile.h"

namespace prismaquant {

struct RunFlags {
  std::string memory;
  bool dry_run = false, profile = false, check_hash = false;

  void Register(CLI::App& command);
  RunProfile::Detail detail() const {
    return profile ? RunProfile::Detail::kKernels : RunProfile::Detail::kStages;
  }
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_CLI_RUN_FLAGS_H_

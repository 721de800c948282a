#include "cli/run_flags.h"

namespace prismaquant {

void RunFlags::Register(CLI::App& command) {
  command.add_option(
      "--memory", memory,
      "Refuse to begin what would need more, as 12GB or 16GiB (default: 80 % of what is "
      "free)");
  command.add_flag("--dry-run", dry_run,
                   "Measure this machine, print what each stage will need and take, and stop");
  command.add_flag("--profile", profile,
                   "Print calls, time, FLOP/s and GB/s of every kernel, by stage");
  command.add_flag(
      "--check-hash", check_hash,
      "Compare the source's weights by the hash of all their bytes with those that the "
      "run began with, not by sizes, headers and samples alone");
}

}  // namespace prismaquant

#include "export/verify.h"

#include <fmt/format.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <string>

#include "cli/command.h"
#include "io/checkpoint.h"

namespace prismaquant {
namespace {

struct VerifyOptions {
  std::string out, source;
};

// A folder that is no checkpoint at all is bad input; one whose files are damaged fails the
// verification.
Result<Checkpoint> OpenForVerification(const std::string& folder) {
  Result<Checkpoint> out = Checkpoint::Open(folder);
  std::error_code error;
  if (!out.ok() && std::filesystem::exists(std::filesystem::path(folder) / "config.json", error)) {
    return Status::Unmet(out.status().message());
  }
  return out;
}

Status RunVerify(const VerifyOptions& options) {
  std::optional<Checkpoint> source;
  if (!options.source.empty()) {
    PQ_ASSIGN_OR_RETURN(source, Checkpoint::Open(options.source));
  }
  PQ_ASSIGN_OR_RETURN(const Checkpoint out, OpenForVerification(options.out));
  PQ_RETURN_IF_ERROR(VerifyCheckpoint(out, source ? &*source : nullptr));
  fmt::print("{}: {} tensors verified{}\n", options.out, out.names().size(),
             source ? fmt::format(" against {}", options.source) : "");
  return {};
}

}  // namespace

Command AddVerifyCommand(CLI::App& app) {
  const auto options = std::make_shared<VerifyOptions>();
  CLI::App* command = app.add_subcommand(
      "verify",
      "Check every rule of the format, and every byte that is not quantized against the source");
  command->add_option("OUT", options->out, "Checkpoint folder")->required();
  command->add_option("--source", options->source, "Source checkpoint folder");
  return {command, [options] { return RunVerify(*options); }};
}

}  // namespace prismaquant

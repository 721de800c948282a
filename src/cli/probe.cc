#include <fmt/format.h>

#include <memory>
#include <string>

#include "cli/session.h"

namespace prismaquant {
namespace {

struct ProbeFlags {
  std::string source, work, json;
  CalibrationFlags calibration;
};

Status RunProbeCommand(const ProbeFlags& flags) {
  PQ_ASSIGN_OR_RETURN(const auto session,
                      Session::Start(flags.source, flags.work, flags.calibration));
  PQ_RETURN_IF_ERROR(session->Probe());
  PQ_ASSIGN_OR_RETURN(const Json json,
                      ProbeToJson(session->model(), session->store(), session->loss_tokens()));
  if (flags.json != "-") {
    fmt::print("{} Linears probed on {} tokens in {}, peak memory {}\n", json["linears"].size(),
               session->loss_tokens(), FormatSeconds(session->times().front().seconds),
               FormatBytes(PeakMemoryBytes()));
  }
  return WriteJson(json, flags.json);
}

}  // namespace

Command AddProbeCommand(CLI::App& app) {
  const auto flags = std::make_shared<ProbeFlags>();
  CLI::App* command =
      app.add_subcommand("probe", "Measure sensitivity and costs of every Linear into a run store");
  command->add_option("SRC", flags->source, "Source checkpoint folder")->required();
  command->add_option("--work", flags->work, "Run store folder")->required();
  flags->calibration.Register(*command, /*file_required=*/true);
  command->add_option("--json", flags->json, "Write the statistics as JSON; - is standard output");
  return {command, [flags] { return RunProbeCommand(*flags); }};
}

}  // namespace prismaquant

#include <fmt/format.h>

#include <memory>
#include <string>

#include "cli/run_forecast.h"
#include "cli/session.h"
#include "cli/tables.h"

namespace prismaquant {
namespace {

struct ProbeFlags {
  std::string source, work, json, cost_render = PlanFlags().cost_render;
  std::vector<std::string> formats;
  CalibrationFlags calibration;
  RunFlags run;
};

Status RunProbeCommand(const ProbeFlags& flags) {
  PQ_ASSIGN_OR_RETURN(const auto session,
                      Session::Start(flags.source, flags.calibration, flags.run));
  std::vector<std::string> gptq_formats;
  if (flags.cost_render == "gptq") {
    gptq_formats = flags.formats.empty() ? AdmittedFormats({}) : flags.formats;
  }
  const RunSettings settings{.compute = session->compute(),
                             .smooth = flags.calibration.smooth,
                             .render = false,
                             .priced = session->Priced(flags.formats),
                             .gptq_priced = FindFormats(gptq_formats)};
  PQ_ASSIGN_OR_RETURN(RunForecast forecast, ForecastRun(*session, settings, flags.run));
  if (!flags.run.dry_run) PQ_RETURN_IF_ERROR(session->OpenStore(flags.work, flags.run));
  PQ_RETURN_IF_ERROR(MeasureRates(*session, flags.run, flags.work, forecast));
  if (flags.run.dry_run) return ReportForecast(forecast, flags.json);
  PQ_RETURN_IF_ERROR(session->Smooth());
  PQ_RETURN_IF_ERROR(session->Probe(flags.formats, gptq_formats));
  PQ_ASSIGN_OR_RETURN(const Json json,
                      ProbeToJson(session->model(), session->store(), session->loss_tokens()));
  if (flags.json != "-") {
    const LossTokens tokens = session->loss_tokens();
    fmt::print("{} Linears probed on {} tokens of text, {} of captions and {} of the MTP head\n",
               json["linears"].size(), tokens.text, tokens.caption, tokens.mtp);
    PQ_RETURN_IF_ERROR(PrintHeadCosts(*session));
    PrintProfile(session->profile(), session->is_fresh() ? &forecast : nullptr, flags.run.profile);
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
  flags->calibration.Register(*command);
  flags->run.Register(*command);
  command
      ->add_option("--formats", flags->formats,
                   "Formats to price beside nvfp4, fp8, mxfp8 and bf16, which always are")
      ->delimiter(',')
      ->check(CLI::IsMember(FormatNames()));
  command
      ->add_option("--cost-render", flags->cost_render,
                   "gptq: price --formats (default nvfp4, fp8) as GPTQ leaves them too")
      ->check(CLI::IsMember({"rtn", "gptq"}))
      ->capture_default_str();
  command->add_option("--json", flags->json, "Write the statistics as JSON; - is standard output");
  return {command, [flags] { return RunProbeCommand(*flags); }};
}

}  // namespace prismaquant

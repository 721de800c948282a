#include <fmt/format.h>

#include <memory>
#include <set>
#include <string>

#include "cli/delivery.h"
#include "cli/run_forecast.h"
#include "cli/tables.h"
#include "export/exporter.h"
#include "io/file_system.h"

namespace prismaquant {
namespace {

constexpr char kHead[] = "lm_head";

struct ExportFlags {
  std::string work, out, choices, base_model;
  bool overwrite = false;
  PlanFlags plan;
  RenderFlags render;
  RunFlags run;
};

// Flags under which the units are those of the choices, with the costs of `given`.
Result<PlanFlags> FlagsOfChoices(const Json& json, const std::string& file,
                                 const PlanFlags& given) {
  PlanFlags flags = given;
  flags.kernels = "any";
  std::set<std::string> formats = {std::string(SourceFormat().name())};
  if (!json.is_object() || !json.contains("choices") || !json["choices"].is_object()) {
    return Status::InvalidInput(
        fmt::format("{}: no object \"choices\" of Linear names and formats", file));
  }
  const Json& choices = json["choices"];
  for (const auto& [linear, format] : choices.items()) {
    const std::string name = format.is_string() ? format.get<std::string>() : format.dump();
    if (FindFormat(name) == nullptr) {
      return Status::InvalidInput(
          fmt::format("{}: {} is \"{}\", which is no format", file, linear, name));
    }
    formats.insert(name);
    if (linear == kHead) flags.lm_head = name;
  }
  flags.formats.assign(formats.begin(), formats.end());
  return flags;
}

// The plan of an edited or unedited allocation.
Status TakeChoices(Session& session, const std::string& file, const PlanFlags& given,
                   Delivery& delivery) {
  PQ_ASSIGN_OR_RETURN(const std::string text, ReadFile(file));
  PQ_ASSIGN_OR_RETURN(Json json, ParseJson(text, file));
  PQ_ASSIGN_OR_RETURN(const PlanFlags all, FlagsOfChoices(json, file, given));
  // As it stands in the source, the output projection is no unit.
  const bool head_stays = all.lm_head == SourceFormat().name();
  if (head_stays && json["choices"].contains(kHead)) json["choices"].erase(kHead);
  std::vector<std::string> linears;
  for (const UnitCosts& unit : UnitsWithoutCosts(session.model(), session.Rules(all))) {
    linears.insert(linears.end(), unit.linears.begin(), unit.linears.end());
  }
  PQ_ASSIGN_OR_RETURN(const auto choices, ChoicesFromJson(json, file, linears));
  PQ_ASSIGN_OR_RETURN(delivery.formats, ToFormats(session.model(), choices));
  PQ_ASSIGN_OR_RETURN(const Planner planner,
                      session.MakePlanner(all, /*with_costs=*/true, &choices));
  PQ_ASSIGN_OR_RETURN(delivery.plan, planner.Uniform(""));
  PQ_ASSIGN_OR_RETURN(delivery.plan.file_bytes,
                      ExactFileBytes(session.model(), delivery.plan.choices));
  return {};
}

Status RunExport(const ExportFlags& flags) {
  PQ_ASSIGN_OR_RETURN(const auto session, Session::Resume(flags.work, flags.run));
  const std::filesystem::path out = WithoutSeparator(flags.out);
  PQ_RETURN_IF_ERROR(CheckDestination(out, {session->checkpoint().folder(), flags.work}));
  Delivery delivery{.out = out, .overwrite = flags.overwrite, .base_model = flags.base_model};
  if (!flags.choices.empty()) {
    PQ_RETURN_IF_ERROR(TakeChoices(*session, flags.choices, flags.plan, delivery));
  } else {
    PQ_ASSIGN_OR_RETURN(const Planner planner,
                        session->MakePlanner(flags.plan, /*with_costs=*/true));
    PQ_ASSIGN_OR_RETURN(ChosenPlan chosen, ChoosePlan(*session, planner, flags.plan.budget));
    delivery.plan = std::move(chosen.plan);
    delivery.sweep = std::move(chosen.sweep);
    PQ_ASSIGN_OR_RETURN(delivery.formats, ToFormats(session->model(), delivery.plan.choices));
  }
  if (session->labels() == LabelRule::kSampled) delivery.predicted = delivery.plan.losses;
  PQ_ASSIGN_OR_RETURN(delivery.joint,
                      JointLoss(session->model(), session->store(), session->loss_tokens(),
                                delivery.plan.choices, CostRounding(flags.plan)));
  PQ_ASSIGN_OR_RETURN(delivery.render, ToRenderOptions(flags.render, session->compute()));
  const RunSettings settings{.compute = session->compute(),
                             .probe = false,
                             .rendering = delivery.render,
                             .bits = delivery.plan.bpp};
  PQ_ASSIGN_OR_RETURN(RunForecast forecast, ForecastRun(*session, settings, flags.run));
  PQ_RETURN_IF_ERROR(MeasureRates(*session, flags.run, flags.work, forecast));
  if (flags.run.dry_run) return ReportForecast(forecast, "");
  PrintPlan(delivery.plan, delivery.sweep, session->labels());
  PQ_ASSIGN_OR_RETURN(
      const bool begun,
      IsRenderingBegun(session->store(), RenderKey(delivery.formats, delivery.render)));
  PQ_RETURN_IF_ERROR(Deliver(*session, delivery));
  PrintProfile(session->profile(), begun ? nullptr : &forecast, flags.run.profile);
  return {};
}

}  // namespace

Command AddExportCommand(CLI::App& app) {
  const auto flags = std::make_shared<ExportFlags>();
  CLI::App* command =
      app.add_subcommand("export", "Round the weights of a probed run and write a checkpoint");
  command->add_option("--work", flags->work, "Run store folder of a finished probe")->required();
  command->add_option("OUT", flags->out, "Folder to write")->required();
  CLI::Option* choices = command->add_option(
      "--choices", flags->choices, "Take the formats from this JSON of allocate, edited or not");
  flags->plan.Register(*command);
  PlanFlags::LeaveNoChoice(*choices);
  for (const char* rule : {"--pin", "--forbid", "--kernels", "--lm-head"}) choices->excludes(rule);
  flags->render.Register(*command);
  flags->run.Register(*command);
  command->add_option("--base-model", flags->base_model, "Name of the source model in the card");
  command->add_flag("--overwrite", flags->overwrite, "Replace OUT if it exists");
  return {command, [flags] { return RunExport(*flags); }};
}

}  // namespace prismaquant

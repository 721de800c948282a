#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "cli/delivery.h"
#include "cli/run_forecast.h"
#include "cli/stored_pass.h"
#include "cli/tables.h"
#include "cli/validate.h"
#include "data/bundled_text.h"
#include "export/exporter.h"
#include "io/checkpoint.h"
#include "io/file_system.h"

namespace prismaquant {
namespace {

struct QuantizeFlags {
  std::string source, out, work, uniform, base_model, eval_text, json;
  int64_t eval_tokens = 8192;
  int validate = 0;
  bool overwrite = false, no_eval = false;
  CalibrationFlags calibration;
  PlanFlags plan;
  RenderFlags render;
  RunFlags run;
};

constexpr int64_t kEvaluationWindow = 512;
constexpr int64_t kValidationTokens = 8192;  // that plans are chosen by

// The command line that makes the same checkpoint, without paths of this machine.
std::string ReproducingCommand(const QuantizeFlags& flags) {
  const auto name = [](const std::string& path) {
    return WithoutSeparator(path).filename().string();
  };
  std::string text = "prismaquant quantize SRC OUT";
  if (!flags.calibration.file.empty()) text += " --calibration " + name(flags.calibration.file);
  text += fmt::format(" --samples {} --tokens {} --seed {}", flags.calibration.samples,
                      flags.calibration.tokens, flags.calibration.seed);
  if (!flags.calibration.images.empty()) {
    text += fmt::format(" --images {} --image-samples {}", name(flags.calibration.images),
                        flags.calibration.image_samples);
  }
  if (flags.calibration.smooth) text += " --smooth";
  if (!flags.uniform.empty()) text += " --uniform " + flags.uniform;
  text += flags.plan.budget.ToText();
  if (!flags.plan.formats.empty())
    text += fmt::format(" --formats {}", fmt::join(flags.plan.formats, ","));
  for (const std::string& rule : flags.plan.pin) text += fmt::format(" --pin '{}'", rule);
  for (const std::string& rule : flags.plan.forbid) text += fmt::format(" --forbid '{}'", rule);
  if (flags.plan.kernels != "vllm") text += " --kernels " + flags.plan.kernels;
  if (!flags.plan.cost.empty()) text += " --cost " + flags.plan.cost;
  if (flags.plan.cost_render != PlanFlags().cost_render)
    text += " --cost-render " + flags.plan.cost_render;
  if (flags.plan.caption_weight != PartWeights().caption)
    text += fmt::format(" --caption-weight {}", flags.plan.caption_weight);
  if (flags.plan.mtp_weight != PartWeights().mtp)
    text += fmt::format(" --mtp-weight {}", flags.plan.mtp_weight);
  if (flags.plan.lm_head != "bf16") text += " --lm-head " + flags.plan.lm_head;
  if (!flags.plan.preset.empty()) text += " --preset " + flags.plan.preset;
  if (flags.calibration.labels != "sampled") text += " --labels " + flags.calibration.labels;
  if (flags.calibration.precision != "auto") text += " --precision " + flags.calibration.precision;
  if (flags.validate > 0) text += fmt::format(" --validate {}", flags.validate);
  if (flags.render.mode != "gptq") text += " --render " + flags.render.mode;
  if (flags.render.damping != GptqOptions().damping)
    text += fmt::format(" --damping {}", flags.render.damping);
  if (flags.render.hessian != RenderFlags().hessian) text += " --hessian " + flags.render.hessian;
  return text;
}

Result<PlannedAllocation> PlanUniform(const QuantizeFlags& flags, Session& session) {
  PlanFlags all = flags.plan;
  all.formats = FormatNames();
  PQ_ASSIGN_OR_RETURN(const Planner planner, session.MakePlanner(all, /*with_costs=*/false));
  PQ_ASSIGN_OR_RETURN(PlannedAllocation plan, planner.Uniform(flags.uniform));
  PQ_ASSIGN_OR_RETURN(plan.file_bytes, ExactFileBytes(session.model(), plan.choices));
  return plan;
}

// Refuses what no costs could make possible, before hours are spent on them: rules that match
// nothing, a budget below the smallest. Returns the bits of a quantized weight, as far as they are
// known without costs.
Result<double> CheckPlan(const QuantizeFlags& flags, Session& session) {
  if (flags.validate > 0 && session.labels() != LabelRule::kSampled) {
    return Status::InvalidInput(
        "--validate: with --labels data there is no predicted KL to compare with");
  }
  if (!flags.uniform.empty()) {
    PQ_ASSIGN_OR_RETURN(const PlannedAllocation plan, PlanUniform(flags, session));
    return plan.bpp;
  }
  PQ_ASSIGN_OR_RETURN(const Planner planner, session.MakePlanner(flags.plan, /*with_costs=*/false));
  PQ_ASSIGN_OR_RETURN(const Budget budget,
                      ToBudget(flags.plan.budget, session.model(), session.labels()));
  const bool by_costs = flags.plan.budget.knee || budget.kind == Budget::Kind::kMaxKl;
  if (!by_costs) PQ_RETURN_IF_ERROR(planner.Plan(budget).status());
  return flags.plan.budget.bpp.value_or(RunSettings().bits);
}

// Windows to measure the result on, and others to choose by.
struct HeldOutText {
  TokenWindows result, choice;
};

// `text`: to choose by, if plans are to be validated.
Status Plan(const QuantizeFlags& flags, const TokenWindows& text, Session& session,
            Delivery& delivery) {
  std::optional<Planner> planner;
  ChosenPlan chosen;
  PQ_RETURN_IF_ERROR(session.Timed("allocate", [&]() -> Status {
    if (!flags.uniform.empty()) {
      PQ_ASSIGN_OR_RETURN(delivery.plan, PlanUniform(flags, session));
      return {};
    }
    PQ_ASSIGN_OR_RETURN(planner, session.MakePlanner(flags.plan, /*with_costs=*/true));
    PQ_ASSIGN_OR_RETURN(chosen, ChoosePlan(session, *planner, flags.plan.budget));
    return {};
  }));
  if (flags.validate > 0) {
    PQ_ASSIGN_OR_RETURN(delivery.validation,
                        Validate(session, *planner, chosen, flags.plan.budget.knee, delivery.render,
                                 text, flags.validate));
    chosen.plan = delivery.validation->points[delivery.validation->chosen].plan;
  }
  if (planner) {
    delivery.plan = std::move(chosen.plan);
    delivery.sweep = std::move(chosen.sweep);
    if (session.labels() == LabelRule::kSampled) delivery.predicted = delivery.plan.losses;
    PQ_ASSIGN_OR_RETURN(delivery.joint,
                        JointLoss(session.model(), session.store(), session.loss_tokens(),
                                  delivery.plan.choices, CostRounding(flags.plan)));
  }
  PQ_ASSIGN_OR_RETURN(delivery.formats, ToFormats(session.model(), delivery.plan.choices));
  return {};
}

Result<TokenWindows> LastTenth(const QuantizeFlags& flags, const Session& session, int64_t tokens) {
  return HeldOutWindows(flags.calibration.file, session.tokenizer(), session.checkpoint().folder(),
                        session.model().config().vocab_size, tokens, kEvaluationWindow);
}

// The windows of [begin, end) of a text.
TokenWindows Cut(const TokenWindows& text, int64_t begin, int64_t end) {
  return {.windows = {text.windows.begin() + begin, text.windows.begin() + end},
          .fingerprint = fmt::format("{}/{}-{}", text.fingerprint, begin, end)};
}

// Without --eval-text both come from the last tenth of the calibration text, but not from the same
// half. What plans are chosen by does not depend on what the result is measured on.
Result<HeldOutText> ReadHeldOut(const QuantizeFlags& flags, const Session& session) {
  HeldOutText text;
  const bool own = !flags.no_eval && flags.eval_text.empty();
  if (flags.validate > 0) {
    PQ_ASSIGN_OR_RETURN(const TokenWindows tail, LastTenth(flags, session, 2 * kValidationTokens));
    if (tail.count() < 2) {
      return Status::InvalidInput(fmt::format(
          "--validate: the last tenth of the calibration text has {} windows of {} tokens, "
          "expected at least 2",
          tail.count(), kEvaluationWindow));
    }
    const int64_t half = tail.count() / 2;
    text.choice = Cut(tail, half, tail.count());
    if (own) text.result = Cut(tail, 0, std::min(half, flags.eval_tokens / kEvaluationWindow));
  } else if (own) {
    PQ_ASSIGN_OR_RETURN(text.result, LastTenth(flags, session, flags.eval_tokens));
  }
  if (!flags.eval_text.empty() && !flags.no_eval) {
    PQ_ASSIGN_OR_RETURN(text.result, EvaluationWindows(flags.eval_text, session.tokenizer(),
                                                       flags.eval_tokens, kEvaluationWindow));
  }
  return text;
}

Status Measure(const Calibration& data, const QuantizeFlags& flags, Session& session,
               const Delivery& delivery, Json& json) {
  const std::string measured_on =
      data.text.fingerprint + (data.captions.empty() ? "" : CaptionsFingerprint(data.captions));
  PQ_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(delivery.out));
  PQ_ASSIGN_OR_RETURN(const std::string fingerprint, checkpoint.Fingerprint());
  StoredPass source_pass(session.store(), session.identity().at("source") + measured_on);
  StoredPass pass(session.store(), fingerprint + measured_on);
  Evaluation evaluation;
  PQ_RETURN_IF_ERROR(session.Timed("evaluate", [&]() -> Status {
    PQ_ASSIGN_OR_RETURN(const auto source, Model::Open(session.checkpoint()));
    PQ_ASSIGN_OR_RETURN(const auto quantized, Model::Open(checkpoint));
    PQ_ASSIGN_OR_RETURN(evaluation, Evaluate(*source, *quantized, data, {.dtype = at::kFloat},
                                             {.source = &source_pass, .quantized = &pass}));
    return {};
  }));
  const bool own = flags.eval_text.empty();
  const std::string name = CalibrationName(own ? flags.calibration.file : flags.eval_text);
  PQ_RETURN_IF_ERROR(
      RecordEvaluation(session, delivery, evaluation, own ? name + ", last tenth" : name));
  if (flags.json != "-") PrintEvaluation(evaluation, delivery.predicted);
  json["evaluation"] = evaluation.ToJson(delivery.predicted.text);
  return {};
}

// What the run is to do. `bits`: CheckPlan's.
RunSettings Settings(const QuantizeFlags& flags, const Session& session,
                     const RenderOptions& rendering, double bits) {
  RunSettings settings{.compute = session.compute(),
                       .smooth = flags.calibration.smooth,
                       .probe = flags.uniform.empty(),
                       .rendering = rendering,
                       .bits = bits};
  const std::vector<std::string> formats = AdmittedFormats(flags.plan);
  settings.priced = session.Priced(formats);
  if (CostRounding(flags.plan) == Rounding::kGptq) settings.gptq_priced = FindFormats(formats);
  if (flags.uniform == SourceFormat().name()) settings.rendering.mode = RenderMode::kRtn;
  if (!flags.no_eval) settings.evaluation_tokens = flags.eval_tokens;
  settings.evaluation_window = kEvaluationWindow;
  settings.validated_plans = flags.validate;
  settings.validation_tokens = kValidationTokens;
  return settings;
}

Status PrintResult(const Session& session, const Delivery& delivery) {
  PQ_ASSIGN_OR_RETURN(const Json rendering, RenderingRecord(delivery));
  PQ_ASSIGN_OR_RETURN(const CheckpointSummary summary,
                      SummarizePlan(session.model(), delivery.formats, delivery.plan.file_bytes));
  PrintExperts(session.model(), rendering);
  PrintParts(summary);
  if (session.model().vision() != nullptr && session.calibration().captions.empty()) {
    fmt::print("{:<22} the vision tower's Linears saw no image and stay bf16; see --images\n",
               "unmeasured");
  }
  const int64_t parameters = session.checkpoint().parameters();
  fmt::print("{:<22} {}\n", "written", delivery.out.string());
  fmt::print("{:<22} {:.6f} (slack {} bytes)\n", "bpp", delivery.plan.bpp, delivery.plan.slack);
  fmt::print("{:<22} {:.4f}\n", "file bpp",
             8.0 * static_cast<double>(delivery.plan.file_bytes) / static_cast<double>(parameters));
  fmt::print("{:<22} {}\n", "Linears", FormatCounts(delivery.plan.counts));
  return {};
}

Status CheckFolders(const QuantizeFlags& flags, const std::filesystem::path& out,
                    const std::filesystem::path& work) {
  std::error_code error;
  if (std::filesystem::exists(out, error) && !flags.overwrite &&
      !std::filesystem::exists(work, error)) {
    return ExistsAlready(out);
  }
  return CheckDestination(out, {flags.source, work});
}

Status RunQuantize(const QuantizeFlags& flags) {
  const std::filesystem::path out = WithoutSeparator(flags.out);
  const std::filesystem::path work = flags.work.empty() ? out.string() + ".work" : flags.work;
  PQ_RETURN_IF_ERROR(CheckFolders(flags, out, work));
  PQ_ASSIGN_OR_RETURN(const auto session,
                      Session::Start(flags.source, flags.calibration, flags.run));
  PQ_ASSIGN_OR_RETURN(const double bits, CheckPlan(flags, *session));
  PQ_ASSIGN_OR_RETURN(const RenderOptions rendering,
                      ToRenderOptions(flags.render, session->compute()));
  PQ_ASSIGN_OR_RETURN(RunForecast forecast,
                      ForecastRun(*session, Settings(flags, *session, rendering, bits), flags.run));
  if (!flags.run.dry_run) PQ_RETURN_IF_ERROR(session->OpenStore(work, flags.run));
  PQ_RETURN_IF_ERROR(MeasureRates(*session, flags.run, work, forecast));
  if (flags.run.dry_run) return ReportForecast(forecast, flags.json);
  PQ_ASSIGN_OR_RETURN(HeldOutText text, ReadHeldOut(flags, *session));
  const Calibration held_out{.text = std::move(text.result),
                             .captions = session->held_out_captions()};
  Delivery delivery{.out = out,
                    .overwrite = flags.overwrite,
                    .base_model = flags.base_model,
                    .command = ReproducingCommand(flags),
                    .calibration = CalibrationName(flags.calibration.file),
                    .render = rendering};
  PQ_RETURN_IF_ERROR(session->Smooth());
  if (flags.uniform.empty()) {
    const std::vector<std::string> formats = AdmittedFormats(flags.plan);
    const bool gptq = CostRounding(flags.plan) == Rounding::kGptq;
    PQ_RETURN_IF_ERROR(session->Probe(formats, gptq ? formats : std::vector<std::string>()));
    if (flags.json != "-") PQ_RETURN_IF_ERROR(PrintHeadCosts(*session));
  } else {
    delivery.render.guided = false;
  }
  PQ_RETURN_IF_ERROR(Plan(flags, text.choice, *session, delivery));
  if (flags.json != "-" && flags.uniform.empty()) {
    PrintPlan(delivery.plan, delivery.sweep, session->labels());
  } else if (flags.json != "-") {
    PrintUniform(delivery.plan);
  }
  if (flags.json != "-" && delivery.validation) PrintValidation(*delivery.validation);
  PQ_RETURN_IF_ERROR(Deliver(*session, delivery));
  Json json = PlanToJson(delivery.plan, delivery.sweep);
  if (delivery.validation) json["validation"] = delivery.validation->ToJson();
  if (flags.json != "-") PQ_RETURN_IF_ERROR(PrintResult(*session, delivery));
  if (!flags.no_eval) PQ_RETURN_IF_ERROR(Measure(held_out, flags, *session, delivery, json));
  PQ_RETURN_IF_ERROR(StoredPass::DropAll(session->store()));
  if (flags.json != "-") {
    PrintProfile(session->profile(), session->is_fresh() ? &forecast : nullptr, flags.run.profile);
  }
  json["forecast"] = forecast.ToJson();
  AddProfile(session->profile(), flags.run.profile, json);
  return WriteJson(json, flags.json);
}

}  // namespace

Command AddQuantizeCommand(CLI::App& app) {
  const auto flags = std::make_shared<QuantizeFlags>();
  CLI::App* command =
      app.add_subcommand("quantize", "Measure, allocate, round, write and evaluate: all of it");
  command->add_option("SRC", flags->source, "Source checkpoint folder")->required();
  command->add_option("OUT", flags->out, "Folder to write")->required();
  command->add_option("--work", flags->work, "Run store folder (default OUT.work)");
  flags->calibration.Register(*command);
  flags->plan.Register(*command);
  CLI::Option* uniform =
      command
          ->add_option(
              "--uniform", flags->uniform,
              "Give every Linear this format; needs no probe, so GPTQ weights all tokens alike")
          ->check(CLI::IsMember(FormatNames()));
  PlanFlags::LeaveNoChoice(*uniform);
  for (const char* cost : {"--cost", "--cost-render", "--caption-weight", "--mtp-weight"}) {
    uniform->excludes(cost);
  }
  flags->render.Register(*command);
  flags->run.Register(*command);
  command
      ->add_option("--validate", flags->validate,
                   "Render this many plans, measure their KL on the last tenth of the calibration "
                   "text, and choose by it")
      ->check(CLI::Range(1, 64))
      ->excludes("--uniform");
  command->add_option("--eval-text", flags->eval_text,
                      "Held-out text (default: the last tenth of the calibration text)");
  command->add_option("--eval-tokens", flags->eval_tokens, "Held-out tokens")
      ->check(CLI::Range(512, 1 << 30))
      ->capture_default_str();
  command->add_flag("--no-eval", flags->no_eval, "Do not measure the result");
  command->add_option("--base-model", flags->base_model, "Name of the source model in the card");
  command->add_flag("--overwrite", flags->overwrite, "Replace OUT if it exists");
  command->add_option("--json", flags->json,
                      "Write plan, measurements and times as JSON; - is standard output");
  return {command, [flags] { return RunQuantize(*flags); }};
}

}  // namespace prismaquant

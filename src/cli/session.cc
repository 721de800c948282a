#include "cli/session.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <utility>

#include "export/exporter.h"
#include "formats/tensor_bytes.h"

namespace prismaquant {
namespace {

constexpr double kDefaultBpp = 5.5;
constexpr char kCalibrationBlob[] = "calibration";
constexpr char kSourceNote[] = "source";

const std::vector<double>& DefaultSweep() {
  static const std::vector<double> sweep = {4.5, 4.75, 5, 5.25, 5.5, 6, 7, 8.25};
  return sweep;
}

bool HasNativeBf16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16") != 0;
#else
  return false;
#endif
}

Status StoreWindows(RunStore& store, const TokenWindows& windows) {
  std::vector<int32_t> ids;
  for (const auto& window : windows.windows) ids.insert(ids.end(), window.begin(), window.end());
  const TensorSpec spec{"ids", DType::kI32, {windows.count(), windows.length()}};
  return store.PutBlob(kCalibrationBlob, {{spec, std::as_bytes(std::span(ids))}});
}

Result<TokenWindows> LoadWindows(const RunStore& store, const std::string& fingerprint) {
  PQ_ASSIGN_OR_RETURN(const SafetensorsFile file, store.Blob(kCalibrationBlob));
  const at::Tensor ids = TensorFromView(file.tensors().front());
  TokenWindows windows;
  windows.fingerprint = fingerprint;
  for (int64_t n = 0; n < ids.size(0); ++n) {
    const int32_t* row = ids.const_data_ptr<int32_t>() + n * ids.size(1);
    windows.windows.emplace_back(row, row + ids.size(1));
  }
  return windows;
}

std::string PrecisionName(at::ScalarType type) {
  return type == at::kBFloat16 ? "bf16" : "float32";
}

}  // namespace

std::vector<std::string> FormatNames() {
  std::vector<std::string> names;
  for (const Format* format : AllFormats()) names.emplace_back(format->name());
  return names;
}

void CalibrationFlags::Register(CLI::App& command, bool file_required) {
  auto* option = command.add_option(
      "--calibration", file, "Calibration text: .txt, or .jsonl with text, messages or input_ids");
  if (file_required) option->required();
  command.add_option("--samples", samples, "Calibration sequences")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command.add_option("--tokens", tokens, "Tokens per sequence")
      ->check(CLI::Range(2, 1 << 20))
      ->capture_default_str();
  command.add_option("--seed", seed, "Draws the windows and the labels")->capture_default_str();
  command
      .add_option("--labels", labels,
                  "Loss labels: drawn from the model (the costs are nats of KL), or the text's")
      ->check(CLI::IsMember({"sampled", "data"}))
      ->capture_default_str();
  command
      .add_option("--precision", precision,
                  "Arithmetic of the calibration passes; auto is bf16 where it is native")
      ->check(CLI::IsMember({"auto", "bf16", "float32"}))
      ->capture_default_str();
  command.add_option("--threads", threads, "Threads; 0 takes all processors")
      ->check(CLI::Range(0, 4096));
}

void PlanFlags::Register(CLI::App& command) {
  auto* by_bpp =
      command
          .add_option("--bpp", bpp,
                      "Budget: bits per weight over all Linears with a choice (default 5.5)")
          ->check(CLI::PositiveNumber);
  command.add_option("--size", size, "Budget: bytes of the whole checkpoint, as 23GB or 20GiB")
      ->excludes(by_bpp);
  command.add_option("--sweep", sweep, "Budgets in bpp to list beside the chosen one")
      ->delimiter(',');
  command.add_flag("--knee", knee, "Take the knee of the sweep as the budget");
  command.add_option("--formats", formats, "Formats to choose from (default nvfp4,fp8,bf16)")
      ->delimiter(',')
      ->check(CLI::IsMember(FormatNames()));
  command.add_option("--pin", pin, "REGEX=FORMAT: matching Linears get this format");
  command.add_option("--forbid", forbid, "REGEX=FORMAT: matching Linears do not get this format");
  command.add_option("--kernels", kernels, "Shape rules: those of vLLM's GPU kernels, or any")
      ->check(CLI::IsMember({"vllm", "any"}))
      ->capture_default_str();
  command.add_option("--cost", cost, "Cost model (default directional)")
      ->check(CLI::IsMember({"directional", "fisher-trace"}));
  command
      .add_option("--preset", preset,
                  "published: formats nvfp4,mxfp8,bf16 and the fisher-trace cost")
      ->check(CLI::IsMember({"published"}));
}

void RenderFlags::Register(CLI::App& command) {
  command.add_option("--render", mode, "How weights are rounded")
      ->check(CLI::IsMember({"gptq", "rtn"}))
      ->capture_default_str();
  command
      .add_option("--damping", damping,
                  "GPTQ: added to the Hessian's diagonal, relative to its mean")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command.add_option("--hessian", hessian, "GPTQ: tokens weighted by their gradient, or all alike")
      ->check(CLI::IsMember({"guided", "plain"}))
      ->capture_default_str();
}

at::ScalarType ComputeType(const std::string& precision, DType source) {
  if (precision == "bf16") return at::kBFloat16;
  if (precision == "auto" && source == DType::kBF16 && HasNativeBf16()) return at::kBFloat16;
  return at::kFloat;
}

Status Session::OpenSource(const std::filesystem::path& source) {
  PQ_ASSIGN_OR_RETURN(Checkpoint checkpoint, Checkpoint::Open(source));
  checkpoint_ = std::make_unique<Checkpoint>(std::move(checkpoint));
  PQ_RETURN_IF_ERROR(RequireUnquantized(*checkpoint_));
  PQ_ASSIGN_OR_RETURN(model_, Model::Open(*checkpoint_));
  PQ_ASSIGN_OR_RETURN(Tokenizer tokenizer, Tokenizer::Load(source));
  tokenizer_ = std::make_unique<Tokenizer>(std::move(tokenizer));
  return {};
}

Result<std::unique_ptr<Session>> Session::Start(const std::filesystem::path& source,
                                                const std::filesystem::path& work,
                                                const CalibrationFlags& flags) {
  if (flags.threads > 0) at::set_num_threads(flags.threads);
  std::unique_ptr<Session> session(new Session());
  PQ_RETURN_IF_ERROR(session->OpenSource(source));
  const CalibrationOptions calibration{
      .file = flags.file, .samples = flags.samples, .tokens = flags.tokens, .seed = flags.seed};
  PQ_ASSIGN_OR_RETURN(session->windows_,
                      SampleCalibration(calibration, *session->tokenizer_, source,
                                        session->model_->config().vocab_size));
  session->compute_.dtype = ComputeType(flags.precision, session->model_->linears().front().dtype);
  PQ_ASSIGN_OR_RETURN(const std::string fingerprint, session->checkpoint_->Fingerprint());
  session->identity_ = {{"source", fingerprint},
                        {"calibration", session->windows_.fingerprint},
                        {"samples", std::to_string(flags.samples)},
                        {"tokens", std::to_string(flags.tokens)},
                        {"seed", std::to_string(flags.seed)},
                        {"labels", flags.labels},
                        {"precision", PrecisionName(session->compute_.dtype)}};
  PQ_ASSIGN_OR_RETURN(RunStore store, RunStore::Open(FileSystem::Default(), work));
  session->store_ = std::make_unique<RunStore>(std::move(store));
  PQ_RETURN_IF_ERROR(session->store_->Bind(session->identity_));
  PQ_RETURN_IF_ERROR(StoreWindows(*session->store_, session->windows_));
  PQ_RETURN_IF_ERROR(
      session->store_->PutNote(kSourceNote, std::filesystem::absolute(source).string()));
  return session;
}

Result<std::unique_ptr<Session>> Session::Resume(const std::filesystem::path& work) {
  std::unique_ptr<Session> session(new Session());
  PQ_ASSIGN_OR_RETURN(RunStore store, RunStore::OpenExisting(FileSystem::Default(), work));
  session->store_ = std::make_unique<RunStore>(std::move(store));
  PQ_ASSIGN_OR_RETURN(const auto source, session->store_->Note(kSourceNote));
  PQ_ASSIGN_OR_RETURN(session->identity_, session->store_->Identity());
  if (!source || session->identity_.empty()) {
    return Status::InvalidInput(fmt::format(
        "{}: the run store holds no run; run `prismaquant probe` first", work.string()));
  }
  PQ_RETURN_IF_ERROR(session->OpenSource(*source));
  PQ_ASSIGN_OR_RETURN(const std::string fingerprint, session->checkpoint_->Fingerprint());
  if (fingerprint != session->identity_["source"]) {
    return Status::InvalidInput(
        fmt::format("{}: has changed since the run store {} was made", *source, work.string()));
  }
  PQ_ASSIGN_OR_RETURN(session->windows_,
                      LoadWindows(*session->store_, session->identity_["calibration"]));
  session->compute_.dtype = session->identity_["precision"] == "bf16" ? at::kBFloat16 : at::kFloat;
  return session;
}

LabelRule Session::labels() const {
  return identity_.at("labels") == "data" ? LabelRule::kData : LabelRule::kSampled;
}

Status Session::Timed(const std::string& stage, const std::function<Status()>& body) {
  const auto start = std::chrono::steady_clock::now();
  PQ_RETURN_IF_ERROR(body());
  times_.push_back(
      {.stage = stage,
       .seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count()});
  return {};
}

Status Session::Probe() {
  const ProbeOptions options{
      .labels = labels(), .seed = std::stoull(identity_.at("seed")), .compute = compute_};
  return Timed("probe", [&] { return RunProbe(*model_, windows_, options, *store_); });
}

Result<Planner> Session::MakePlanner(const PlanFlags& flags, bool with_costs) {
  const bool published = flags.preset == "published";
  PlanRules rules;
  rules.formats = flags.formats;
  if (rules.formats.empty()) {
    rules.formats = published ? std::vector<std::string>{"nvfp4", "mxfp8", "bf16"}
                              : std::vector<std::string>{"nvfp4", "fp8", "bf16"};
  }
  for (const std::string& text : flags.pin) {
    PQ_ASSIGN_OR_RETURN(FormatRule rule, ParseFormatRule("--pin", text));
    rules.pin.push_back(std::move(rule));
  }
  for (const std::string& text : flags.forbid) {
    PQ_ASSIGN_OR_RETURN(FormatRule rule, ParseFormatRule("--forbid", text));
    rules.forbid.push_back(std::move(rule));
  }
  const bool any_kernel = flags.kernels == "any";
  const std::string cost = flags.cost.empty() && published ? "fisher-trace" : flags.cost;
  std::vector<UnitCosts> units = UnitsWithoutCosts(*model_, any_kernel);
  if (with_costs) {
    const UnitCostOptions options{
        .cost = cost == "fisher-trace" ? CostModel::kFisherTrace : CostModel::kDirectional,
        .any_kernel = any_kernel};
    PQ_ASSIGN_OR_RETURN(units, BuildUnitCosts(*model_, *store_, loss_tokens(), options));
  }
  int64_t unit_bytes = 0;
  FormatChoice largest_header;
  for (const LinearInfo& linear : model_->linears()) {
    const Format* nvfp4 = FindFormat("nvfp4");
    const bool fits = linear.allocatable && nvfp4->Supports(linear.out, linear.in);
    largest_header[linear.name] = fits ? nvfp4 : &SourceFormat();
    if (linear.allocatable)
      unit_bytes += (fits ? nvfp4 : &SourceFormat())->Bytes(linear.out, linear.in, linear.dtype);
  }
  PQ_ASSIGN_OR_RETURN(const int64_t file_bytes,
                      PlannedFileBytes(*model_, largest_header, CheckpointWriter::Options()));
  return Planner::Make(std::move(units), rules, file_bytes - unit_bytes);
}

Status Session::Render(const FormatChoice& formats, const RenderOptions& options,
                       const std::string& key) {
  return Timed("render",
               [&] { return RenderModel(*model_, windows_, formats, options, key, *store_); });
}

Result<int64_t> ExactFileBytes(const Model& model,
                               const std::map<std::string, std::string>& choices) {
  PQ_ASSIGN_OR_RETURN(const FormatChoice formats, ToFormats(model, choices));
  return PlannedFileBytes(model, formats, CheckpointWriter::Options());
}

Result<ChosenPlan> ChoosePlan(const Model& model, const Planner& planner, const PlanFlags& flags) {
  ChosenPlan chosen;
  PQ_ASSIGN_OR_RETURN(chosen.sweep,
                      planner.Sweep(flags.sweep.empty() ? DefaultSweep() : flags.sweep));
  Budget budget{.kind = Budget::Kind::kBpp, .bpp = flags.bpp > 0 ? flags.bpp : kDefaultBpp};
  if (!flags.size.empty()) {
    PQ_ASSIGN_OR_RETURN(budget.file_bytes, ParseSize("--size", flags.size));
    budget.kind = Budget::Kind::kFileBytes;
  }
  if (flags.knee) {
    const int knee = KneeOf(chosen.sweep);
    if (knee < 0)
      return Status::Unmet("--knee: fewer than three budgets of the sweep are feasible");
    budget = chosen.sweep[static_cast<size_t>(knee)].budget;
  }
  PQ_ASSIGN_OR_RETURN(chosen.plan, planner.Plan(budget));
  PQ_ASSIGN_OR_RETURN(chosen.plan.file_bytes, ExactFileBytes(model, chosen.plan.choices));
  for (PlannedAllocation& point : chosen.sweep) {
    if (!point.feasible) continue;
    PQ_ASSIGN_OR_RETURN(point.file_bytes, ExactFileBytes(model, point.choices));
  }
  return chosen;
}

Result<FormatChoice> ToFormats(const Model& model,
                               const std::map<std::string, std::string>& choices) {
  FormatChoice formats;
  for (const LinearInfo& linear : model.linears()) {
    const auto choice = choices.find(linear.name);
    const Format* format = choice == choices.end() ? &SourceFormat() : FindFormat(choice->second);
    if (format == nullptr || !format->Supports(linear.out, linear.in)) {
      return Status::InvalidInput(
          fmt::format("{} cannot be stored as \"{}\"", linear.name, choice->second));
    }
    formats[linear.name] = format;
  }
  std::map<std::string, std::string> first;
  for (const LinearInfo& linear : model.linears()) {
    const auto [found, fresh] = first.try_emplace(linear.unit, linear.name);
    if (fresh || formats[found->second] == formats[linear.name]) continue;
    return Status::InvalidInput(
        fmt::format("{} is {} but {}, fused with it, is {}; they need one format", linear.name,
                    formats[linear.name]->name(), found->second, formats[found->second]->name()));
  }
  return formats;
}

Result<RenderOptions> ToRenderOptions(const RenderFlags& flags, const ComputeOptions& compute) {
  RenderOptions options;
  options.mode = flags.mode == "rtn" ? RenderMode::kRtn : RenderMode::kGptq;
  options.gptq.damping = flags.damping;
  options.guided = flags.hessian == "guided";
  options.compute = compute;
  return options;
}

}  // namespace prismaquant

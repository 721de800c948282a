#include "cli/session.h"

#include <ATen/record_function.h>
#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <utility>

#include "base/interrupt.h"
#include "cli/calibration_store.h"
#include "export/exporter.h"
#include "formats/block_pool.h"
#include "probe/measure_smoothing.h"

namespace prismaquant {
namespace {

// Of the identity: the source is smoothed.
constexpr char kSmoothKey[] = "smooth";
// One captioned image in this many is kept for measuring.
constexpr size_t kHeldOutImages = 4;

// Priced by every probe, so that the usual choices need no further one.
const std::vector<std::string>& DefaultPriced() {
  static const std::vector<std::string> formats = {"nvfp4", "fp8", "mxfp8", "bf16"};
  return formats;
}

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

// An unset variable of a script must not stand for the default.
std::string NamesFile(const std::string& text) { return text.empty() ? "names no file" : ""; }

std::string PrecisionName(at::ScalarType type) {
  return type == at::kBFloat16 ? "bf16" : "float32";
}

}  // namespace

std::vector<std::string> FormatNames() {
  std::vector<std::string> names;
  for (const Format* format : AllFormats()) names.emplace_back(format->name());
  return names;
}

std::vector<const Format*> FindFormats(const std::vector<std::string>& names) {
  std::vector<const Format*> found;
  for (const Format* format : AllFormats()) {
    if (std::find(names.begin(), names.end(), format->name()) != names.end()) {
      found.push_back(format);
    }
  }
  return found;
}

void CalibrationFlags::Register(CLI::App& command) {
  command
      .add_option(
          "--calibration", file,
          "Calibration text: .txt, or .jsonl with text, messages or input_ids (default: the "
          "bundled mixture of prose, code, mathematics, chat and languages)")
      ->check(NamesFile);
  command.add_option("--samples", samples, "Calibration sequences")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command.add_option("--tokens", tokens, "Tokens per sequence")
      ->check(CLI::Range(2, 1 << 20))
      ->capture_default_str();
  command.add_option("--images", images,
                     "Captioned images: a folder, or .jsonl with image and text; without them the "
                     "vision tower stays as it is");
  command
      .add_option("--image-samples", image_samples, "Images to take, evenly spread; 0 takes all")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  command.add_flag("--smooth", smooth,
                   "Scale channels by powers of two from norms and up and value projections into "
                   "the Linears that read them; norms change, the model's function does not");
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
  budget.Register(command);
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
      .add_option("--cost-render", cost_render,
                  "Errors that the directional cost counts: of weights rounded to nearest, or as "
                  "GPTQ leaves them (a further pass of the probe)")
      ->check(CLI::IsMember({"rtn", "gptq"}))
      ->capture_default_str();
  command
      .add_option("--preset", preset,
                  "published: formats nvfp4,mxfp8,bf16 and the fisher-trace cost")
      ->check(CLI::IsMember({"published"}));
  command
      .add_option("--caption-weight", caption_weight,
                  "What a nat of the captions' loss counts beside one of the text's")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command
      .add_option("--mtp-weight", mtp_weight,
                  "What a nat of the MTP head's own loss counts beside one of the text's")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command.add_option("--lm-head", lm_head, "Format of the output projection")
      ->check(CLI::IsMember({"bf16", "fp8", "nvfp4"}))
      ->capture_default_str();
}

void PlanFlags::LeaveNoChoice(CLI::Option& option) {
  for (const char* chooser : {"--bpp", "--size", "--device-memory", "--max-kl", "--knee", "--sweep",
                              "--formats", "--preset"}) {
    option.excludes(chooser);
  }
}

Rounding CostRounding(const PlanFlags& flags) {
  return flags.cost_render == "gptq" ? Rounding::kGptq : Rounding::kNearest;
}

std::vector<std::string> AdmittedFormats(const PlanFlags& flags) {
  if (!flags.formats.empty()) return flags.formats;
  if (flags.preset == "published") return {"nvfp4", "mxfp8", "bf16"};
  return {"nvfp4", "fp8", "bf16"};
}

void RenderFlags::Register(CLI::App& command) {
  command
      .add_option("--render", mode,
                  "How weights are rounded; gptq+sweep is the published recipe, for comparison")
      ->check(CLI::IsMember({"gptq", "rtn", "gptq+sweep"}))
      ->capture_default_str();
  command
      .add_option("--damping", damping,
                  "GPTQ: added to the Hessian's diagonal, relative to its mean")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command
      .add_option("--hessian", hessian,
                  "GPTQ: guided by the gradients at the outputs, or all tokens and rows alike")
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

Status Session::ReadCalibration(const CalibrationFlags& flags) {
  const std::filesystem::path& folder = checkpoint_->folder();
  const CalibrationOptions options{
      .file = flags.file, .samples = flags.samples, .tokens = flags.tokens, .seed = flags.seed};
  PQ_ASSIGN_OR_RETURN(calibration_.text,
                      SampleCalibration(options, *tokenizer_, folder, model_->config().vocab_size));
  if (flags.images.empty()) return {};
  PQ_ASSIGN_OR_RETURN(std::vector<CaptionSequence> captions,
                      LoadModelCaptions(*model_, *tokenizer_, flags.images, flags.image_samples));
  const bool hold_out = captions.size() >= kHeldOutImages;
  for (size_t i = 0; i < captions.size(); ++i) {
    const bool held_out = hold_out && i % kHeldOutImages == kHeldOutImages - 1;
    (held_out ? held_out_captions_ : calibration_.captions).push_back(std::move(captions[i]));
  }
  return {};
}

Status Session::CheckContent() {
  PQ_ASSIGN_OR_RETURN(const auto known, store_->Note(kContentNote));
  PQ_ASSIGN_OR_RETURN(const auto begun, store_->Note(kSourceNote));
  if (!known && begun) {
    return Status::InvalidInput(fmt::format(
        "--check-hash: the run store {} was begun without it and has no hash to compare {} with",
        store_->folder().string(), checkpoint_->folder().string()));
  }
  PQ_ASSIGN_OR_RETURN(const std::string hash, checkpoint_->ContentHash());
  if (!known) return store_->PutNote(kContentNote, hash);
  if (*known == hash) return {};
  return Status::InvalidInput(
      fmt::format("{}: the weights have SHA-256 {}, expected {} as when the run store {} was made",
                  checkpoint_->folder().string(), hash, *known, store_->folder().string()));
}

Result<std::unique_ptr<Session>> Session::Start(const std::filesystem::path& source,
                                                const CalibrationFlags& flags,
                                                const RunFlags& run) {
  if (flags.threads > 0) at::set_num_threads(flags.threads);
  std::unique_ptr<Session> session(new Session(run.detail()));
  PQ_RETURN_IF_ERROR(session->OpenSource(source));
  PQ_RETURN_IF_ERROR(session->ReadCalibration(flags));
  session->compute_.dtype = ComputeType(flags.precision, session->model_->linears().front().dtype);
  PQ_ASSIGN_OR_RETURN(const std::string fingerprint, session->checkpoint_->Fingerprint());
  const Calibration& calibration = session->calibration_;
  session->identity_ = {{"source", fingerprint},
                        {"calibration", calibration.text.fingerprint},
                        {"samples", std::to_string(flags.samples)},
                        {"tokens", std::to_string(flags.tokens)},
                        {"seed", std::to_string(flags.seed)},
                        {"labels", flags.labels},
                        {"precision", PrecisionName(session->compute_.dtype)}};
  if (!calibration.captions.empty()) {
    session->identity_["images"] = CaptionsFingerprint(calibration.captions);
  }
  if (flags.smooth) session->identity_[kSmoothKey] = "1";
  return session;
}

Status Session::OpenStore(const std::filesystem::path& work, const RunFlags& run) {
  PQ_ASSIGN_OR_RETURN(RunStore store, RunStore::Open(FileSystem::Default(), work));
  store_ = std::make_unique<RunStore>(std::move(store));
  PQ_RETURN_IF_ERROR(store_->Bind(identity_));
  if (run.check_hash) PQ_RETURN_IF_ERROR(CheckContent());
  PQ_ASSIGN_OR_RETURN(const auto stages, store_->Stages());
  fresh_ = stages.empty();
  PQ_RETURN_IF_ERROR(StoreCalibration(*store_, calibration_));
  return store_->PutNote(kSourceNote, std::filesystem::absolute(checkpoint_->folder()).string());
}

Result<std::unique_ptr<Session>> Session::Resume(const std::filesystem::path& work,
                                                 const RunFlags& run) {
  std::unique_ptr<Session> session(new Session(run.detail()));
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
  if (run.check_hash) PQ_RETURN_IF_ERROR(session->CheckContent());
  PQ_ASSIGN_OR_RETURN(session->calibration_, LoadCalibration(*session->store_, session->identity_));
  session->compute_.dtype = session->identity_["precision"] == "bf16" ? at::kBFloat16 : at::kFloat;
  PQ_RETURN_IF_ERROR(session->Smooth());
  return session;
}

Status Session::Smooth() {
  if (identity_.count(kSmoothKey) == 0) return {};
  return Timed("smooth", [&]() -> Status {
    PQ_ASSIGN_OR_RETURN(SmoothingExponents exponents,
                        MeasureSmoothing(*model_, calibration_, compute_, *store_));
    PQ_ASSIGN_OR_RETURN(auto smoothing, Smoothing::Make(*model_, std::move(exponents)));
    model_->SetSmoothing(std::move(smoothing));
    return {};
  });
}

LabelRule Session::labels() const {
  return identity_.at("labels") == "data" ? LabelRule::kData : LabelRule::kSampled;
}

Status Session::Timed(const std::string& stage, const std::function<Status()>& body) {
  ReturnFreedMemory();  // of the stage before
  RECORD_USER_SCOPE(stage.c_str());
  const Status status = body();
  const bool interrupted = status.code() == StatusCode::kInterrupted;
  return interrupted ? CheckInterrupted(store_->folder().string()) : status;
}

std::vector<const Format*> Session::Priced(const std::vector<std::string>& formats) const {
  std::vector<std::string> names = DefaultPriced();
  names.insert(names.end(), formats.begin(), formats.end());
  return FindFormats(names);
}

Status Session::Probe(const std::vector<std::string>& formats,
                      const std::vector<std::string>& gptq_formats) {
  const ProbeOptions options{.labels = labels(),
                             .seed = std::stoull(identity_.at("seed")),
                             .formats = Priced(formats),
                             .gptq_formats = FindFormats(gptq_formats),
                             .compute = compute_};
  return Timed("probe", [&] { return RunProbe(*model_, calibration_, options, *store_); });
}

UnitRules Session::Rules(const PlanFlags& flags) const {
  UnitRules rules{.any_kernel = flags.kernels == "any",
                  .vision = !calibration_.captions.empty(),
                  .formats = AdmittedFormats(flags)};
  const bool quantizes_head = flags.lm_head != SourceFormat().name();
  if (quantizes_head && model_->FindPart(Part::kHead) != nullptr) {
    rules.head = FindFormat(flags.lm_head);
  }
  return rules;
}

Result<int64_t> Session::FixedBytes(const std::vector<UnitCosts>& units) const {
  // The largest header that any choice could have.
  const Format* nvfp4 = FindFormat("nvfp4");
  std::map<std::string, bool> in_unit;
  for (const UnitCosts& unit : units) {
    for (const std::string& linear : unit.linears) in_unit[linear] = true;
  }
  int64_t unit_bytes = 0;
  FormatChoice choice;
  for (const LinearInfo& linear : model_->linears()) {
    const bool chosen = in_unit.count(linear.name) > 0;
    const bool fits = chosen && nvfp4->Supports(linear.out, linear.in);
    const Format* format = fits ? nvfp4 : &SourceFormat();
    choice[linear.name] = format;
    if (chosen) unit_bytes += format->Bytes(linear.out, linear.in, linear.dtype);
  }
  PQ_ASSIGN_OR_RETURN(const int64_t file_bytes,
                      PlannedFileBytes(*model_, choice, CheckpointWriter::Options()));
  return file_bytes - unit_bytes;
}

Result<Planner> Session::MakePlanner(const PlanFlags& flags, bool with_costs,
                                     const std::map<std::string, std::string>* choices) {
  if (flags.lm_head != SourceFormat().name() && model_->FindPart(Part::kHead) == nullptr) {
    return Status::InvalidInput(fmt::format(
        "--lm-head {}: the output projection of {} is its embedding table, which stays whole",
        flags.lm_head, checkpoint_->folder().string()));
  }
  const bool published = flags.preset == "published";
  PlanRules rules{.formats = AdmittedFormats(flags)};
  for (const std::string& text : flags.pin) {
    PQ_ASSIGN_OR_RETURN(FormatRule rule, ParseFormatRule("--pin", text));
    rules.pin.push_back(std::move(rule));
  }
  for (const std::string& text : flags.forbid) {
    PQ_ASSIGN_OR_RETURN(FormatRule rule, ParseFormatRule("--forbid", text));
    rules.forbid.push_back(std::move(rule));
  }
  const std::string cost = flags.cost.empty() && published ? "fisher-trace" : flags.cost;
  std::vector<UnitCosts> units = UnitsWithoutCosts(*model_, Rules(flags));
  if (with_costs) {
    const UnitCostOptions options{
        .cost = cost == "fisher-trace" ? CostModel::kFisherTrace : CostModel::kDirectional,
        .rounding = CostRounding(flags),
        .weights = {.caption = flags.caption_weight, .mtp = flags.mtp_weight},
        .rules = Rules(flags)};
    PQ_ASSIGN_OR_RETURN(units, BuildUnitCosts(*model_, *store_, loss_tokens(), options));
  }
  if (choices != nullptr) {
    for (UnitCosts& unit : units) unit.chosen = choices->at(unit.linears.front());
  }
  PQ_ASSIGN_OR_RETURN(const int64_t fixed_bytes, FixedBytes(units));
  return Planner::Make(std::move(units), rules, fixed_bytes);
}

Status Session::Render(const FormatChoice& formats, const RenderOptions& options,
                       const std::string& key) {
  return Timed("render",
               [&] { return RenderModel(*model_, calibration_, formats, options, key, *store_); });
}

Result<int64_t> ExactFileBytes(const Model& model,
                               const std::map<std::string, std::string>& choices) {
  PQ_ASSIGN_OR_RETURN(const FormatChoice formats, ToFormats(model, choices));
  return PlannedFileBytes(model, formats, CheckpointWriter::Options());
}

Result<ChosenPlan> ChoosePlan(const Session& session, const Planner& planner,
                              const BudgetFlags& flags) {
  ChosenPlan chosen;
  PQ_ASSIGN_OR_RETURN(chosen.sweep,
                      planner.Sweep(flags.sweep.empty() ? DefaultSweep() : flags.sweep));
  PQ_ASSIGN_OR_RETURN(Budget budget, ToBudget(flags, session.model(), session.labels()));
  if (flags.knee) {
    const int knee = KneeOf(chosen.sweep);
    if (knee < 0)
      return Status::Unmet("--knee: fewer than three budgets of the sweep are feasible");
    budget = chosen.sweep[static_cast<size_t>(knee)].budget;
  }
  PQ_ASSIGN_OR_RETURN(chosen.plan, planner.Plan(budget));
  PQ_ASSIGN_OR_RETURN(chosen.plan.file_bytes, ExactFileBytes(session.model(), chosen.plan.choices));
  for (PlannedAllocation& point : chosen.sweep) {
    if (!point.feasible) continue;
    PQ_ASSIGN_OR_RETURN(point.file_bytes, ExactFileBytes(session.model(), point.choices));
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
  options.gptq.products = ProductType(compute.dtype);
  options.guided = flags.hessian == "guided";
  if (flags.mode == "gptq+sweep") {
    options.guided = false;
    options.gptq.choose_scales = false;
    options.correct = false;
    options.gptq.sweep = true;
  }
  options.compute = compute;
  return options;
}

}  // namespace prismaquant

#ifndef PRISMAQUANT_CLI_SESSION_H_
#define PRISMAQUANT_CLI_SESSION_H_

// Session: what the commands that work on a run share: the source checkpoint with its model and
// tokenizer, the calibration windows and the run store, and the stages on top of them. The option
// structs are filled by CLI11.

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "allocate/plan.h"
#include "cli/budget.h"
#include "cli/command.h"
#include "cli/run_flags.h"
#include "data/calibration.h"
#include "evaluate/evaluate.h"
#include "io/checkpoint.h"
#include "model/model.h"
#include "performance/run_profile.h"
#include "probe/probe.h"
#include "probe/unit_costs.h"
#include "render/render.h"
#include "store/run_store.h"
#include "tokenizer/tokenizer.h"

namespace prismaquant {

// The note of a run store that says where its source lies.
inline constexpr char kSourceNote[] = "source";
// The note with the hash of all bytes of its weights, of a run with --check-hash.
inline constexpr char kContentNote[] = "content";

// Names of all formats, smallest bits first.
std::vector<std::string> FormatNames();

// Those of these names, in the order of AllFormats.
std::vector<const Format*> FindFormats(const std::vector<std::string>& names);

struct CalibrationFlags {
  std::string file;  // empty: the bundled text
  int64_t samples = 32, tokens = 512;
  std::string images;
  int64_t image_samples = 32;
  bool smooth = false;
  uint64_t seed = 0;
  std::string labels = "sampled";
  std::string precision = "auto";
  int threads = 0;

  void Register(CLI::App& command);
};

struct PlanFlags {
  BudgetFlags budget;
  std::vector<std::string> formats;
  std::vector<std::string> pin, forbid;
  std::string kernels = "vllm", cost, cost_render = "rtn", preset;
  double caption_weight = PartWeights().caption, mtp_weight = PartWeights().mtp;
  std::string lm_head = "bf16";

  void Register(CLI::App& command);
  // `option`, registered after them, says the formats itself.
  static void LeaveNoChoice(CLI::Option& option);
};

// Of the weights whose errors a plan with these flags counts.
Rounding CostRounding(const PlanFlags& flags);

// Formats that a plan with these flags may choose from.
std::vector<std::string> AdmittedFormats(const PlanFlags& flags);

struct RenderFlags {
  std::string mode = "gptq";
  double damping = GptqOptions().damping;
  std::string hessian = "guided";

  void Register(CLI::App& command);
};

// "auto", "bf16" or "float32" -> the dtype; auto is bf16 where the processor multiplies it
// natively.
at::ScalarType ComputeType(const std::string& precision, DType source);

class Session {
 public:
  // Opens source, tokenizer and calibration. What is to be smoothed is not yet.
  static Result<std::unique_ptr<Session>> Start(const std::filesystem::path& source,
                                                const CalibrationFlags& flags, const RunFlags& run);
  // Binds the store at `work` to them; before it there are no stages.
  Status OpenStore(const std::filesystem::path& work, const RunFlags& run);
  // Goes on with the run that the store at `work` was made by.
  static Result<std::unique_ptr<Session>> Resume(const std::filesystem::path& work,
                                                 const RunFlags& run = {});

  const Checkpoint& checkpoint() const { return *checkpoint_; }
  const Model& model() const { return *model_; }
  const Tokenizer& tokenizer() const { return *tokenizer_; }
  const Calibration& calibration() const { return calibration_; }
  // Captions that calibration was kept from: one image in four, if there are so many.
  const std::vector<CaptionSequence>& held_out_captions() const { return held_out_captions_; }
  RunStore& store() { return *store_; }
  // Formats that Probe prices when asked for these.
  std::vector<const Format*> Priced(const std::vector<std::string>& formats) const;
  // Whether the store held nothing of this run yet.
  bool is_fresh() const { return fresh_; }
  const std::map<std::string, std::string>& identity() const { return identity_; }
  LabelRule labels() const;
  LossTokens loss_tokens() const { return CountLossTokens(*model_, calibration_, labels()); }
  const ComputeOptions& compute() const { return compute_; }
  // Of what this process did.
  const RunProfile& profile() const { return profile_; }

  // The stages. Each reuses what the store holds. Smooth comes first; it does nothing to a run that
  // is not to be smoothed. The probe prices the default formats and these,
  // and, rounded by GPTQ, `gptq_formats`.
  Status Smooth();
  Status Probe(const std::vector<std::string>& formats,
               const std::vector<std::string>& gptq_formats);
  // Units by the flags; `choices`, if not null, gives every one of their Linears its format.
  Result<Planner> MakePlanner(const PlanFlags& flags, bool with_costs,
                              const std::map<std::string, std::string>* choices = nullptr);
  // Which Linears are allocated, and among which formats.
  UnitRules Rules(const PlanFlags& flags) const;
  Status Render(const FormatChoice& formats, const RenderOptions& options, const std::string& key);
  // Runs `body` as that stage of the profile.
  Status Timed(const std::string& stage, const std::function<Status()>& body);

 private:
  explicit Session(RunProfile::Detail detail) : profile_(detail) {}
  Status OpenSource(const std::filesystem::path& source);
  Status ReadCalibration(const CalibrationFlags& flags);
  // The source has the bytes that it had when the store was begun. Comes before kSourceNote, which
  // ends that beginning.
  Status CheckContent();
  // Bytes of the checkpoint's files outside these units.
  Result<int64_t> FixedBytes(const std::vector<UnitCosts>& units) const;

  std::unique_ptr<Checkpoint> checkpoint_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<Tokenizer> tokenizer_;
  Calibration calibration_;
  std::vector<CaptionSequence> held_out_captions_;
  std::unique_ptr<RunStore> store_;
  std::map<std::string, std::string> identity_;
  ComputeOptions compute_;
  RunProfile profile_;
  bool fresh_ = true;
};

// The plan of the flags' budget (5.5 bpp if none is given), and the sweep around it.
struct ChosenPlan {
  PlannedAllocation plan;
  std::vector<PlannedAllocation> sweep;
};
Result<ChosenPlan> ChoosePlan(const Session& session, const Planner& planner,
                              const BudgetFlags& flags);
// Bytes of the *.safetensors that an export of these choices writes. A Planner counts the largest
// header that any choice could have, so that a --size budget holds; this is the header they do
// have.
Result<int64_t> ExactFileBytes(const Model& model,
                               const std::map<std::string, std::string>& choices);

// Format objects for the plan's choices; Linears that the plan does not mention stay in the
// source's format.
Result<FormatChoice> ToFormats(const Model& model,
                               const std::map<std::string, std::string>& choices);

Result<RenderOptions> ToRenderOptions(const RenderFlags& flags, const ComputeOptions& compute);

}  // namespace prismaquant

#endif  // PRISMAQUANT_CLI_SESSION_H_

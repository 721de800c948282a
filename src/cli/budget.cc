#include "cli/budget.h"

#include <fmt/format.h>

#include <cmath>
#include <cstdlib>

namespace prismaquant {
namespace {

constexpr double kDefaultBpp = 5.5;
constexpr int kMostTokens = 1 << 30;

// CLI11's own check lets NaN through.
std::string PositiveNumber(const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  const bool valid = end != text.c_str() && *end == 0 && std::isfinite(value) && value > 0;
  return valid ? "" : fmt::format("{} is no positive number", text);
}

// The options of --device-memory that say what is served.
void RegisterLoad(CLI::App& command, CLI::Option* device, ServedLoad& load) {
  auto* context =
      command.add_option("--context", load.context, "Tokens of a sequence that the device holds")
          ->check(CLI::Range(1, kMostTokens))
          ->needs(device);
  device->needs(context);
  command
      .add_option("--sequences", load.sequences, "Sequences of that length that it holds at once")
      ->check(CLI::Range(1, kMostTokens))
      ->needs(device)
      ->capture_default_str();
  command
      .add_option("--drafts", load.drafts,
                  "Tokens that the MTP head drafts there; 0: it is not served")
      ->check(CLI::Range(0, kMostTokens))
      ->needs(device)
      ->capture_default_str();
}

Result<Budget> DeviceMemoryBudget(const BudgetFlags& flags, const Model& model) {
  Budget budget{.kind = Budget::Kind::kDevice};
  PQ_ASSIGN_OR_RETURN(budget.device.bytes, ParseSize("--device-memory", flags.device_memory));
  if (flags.load.drafts > 0 && model.FindPart(Part::kMtp) == nullptr) {
    return Status::InvalidInput(fmt::format("--drafts {}: {} has no MTP head to draft with",
                                            flags.load.drafts,
                                            model.checkpoint().folder().string()));
  }
  const CacheMemory memory = CacheMemoryOf(model.config(), flags.load);
  budget.device.context = flags.load.context;
  budget.device.sequences = flags.load.sequences;
  budget.device.drafts = flags.load.drafts;
  budget.device.kv_cache_bytes = memory.kv_cache_bytes;
  budget.device.state_bytes = memory.state_bytes;
  return budget;
}

}  // namespace

void BudgetFlags::Register(CLI::App& command) {
  auto* by_bpp =
      command
          .add_option("--bpp", bpp,
                      "Budget: bits per weight over all Linears with a choice (default 5.5)")
          ->check(PositiveNumber);
  auto* by_size =
      command.add_option("--size", size, "Budget: bytes of the whole checkpoint, as 23GB or 20GiB");
  auto* by_device =
      command.add_option("--device-memory", device_memory,
                         "Budget: bytes of a device that holds the checkpoint and the caches of "
                         "--sequences of --context tokens");
  auto* by_kl =
      command
          .add_option("--max-kl", max_kl,
                      "Budget: the smallest checkpoint that is predicted to lose no more than "
                      "these nats per token")
          ->check(PositiveNumber);
  auto* by_knee = command.add_flag("--knee", knee, "Budget: the knee of the sweep");
  const std::vector<CLI::Option*> budgets = {by_bpp, by_size, by_device, by_kl, by_knee};
  for (size_t i = 0; i < budgets.size(); ++i) {
    for (size_t j = 0; j < i; ++j) budgets[i]->excludes(budgets[j]);
  }
  RegisterLoad(command, by_device, load);
  command.add_option("--sweep", sweep, "Budgets in bpp to list beside the chosen one")
      ->delimiter(',');
}

std::string BudgetFlags::ToText() const {
  std::string text;
  if (bpp) text += fmt::format(" --bpp {}", *bpp);
  if (!size.empty()) text += " --size " + size;
  if (!device_memory.empty()) {
    text += fmt::format(" --device-memory {} --context {} --sequences {}", device_memory,
                        load.context, load.sequences);
    if (load.drafts > 0) text += fmt::format(" --drafts {}", load.drafts);
  }
  if (max_kl) text += fmt::format(" --max-kl {}", *max_kl);
  if (knee) text += " --knee";
  if (!sweep.empty()) text += fmt::format(" --sweep {}", fmt::join(sweep, ","));
  return text;
}

Result<Budget> ToBudget(const BudgetFlags& flags, const Model& model, LabelRule labels) {
  if (!flags.device_memory.empty()) return DeviceMemoryBudget(flags, model);
  Budget budget{.kind = Budget::Kind::kBpp, .bpp = flags.bpp.value_or(kDefaultBpp)};
  if (!flags.size.empty()) {
    PQ_ASSIGN_OR_RETURN(budget.file_bytes, ParseSize("--size", flags.size));
    budget.kind = Budget::Kind::kFileBytes;
  }
  if (flags.max_kl) {
    if (labels != LabelRule::kSampled) {
      return Status::InvalidInput(
          fmt::format("--max-kl {}: the run was probed with --labels data, whose losses are scores "
                      "and no nats of KL; expected --labels sampled",
                      *flags.max_kl));
    }
    budget.kind = Budget::Kind::kMaxKl;
    budget.max_kl = *flags.max_kl;
  }
  return budget;
}

}  // namespace prismaquant

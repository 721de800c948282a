#include "cli/tables.h"

#include <fmt/format.h>

#include <cmath>

namespace prismaquant {

std::string FormatCounts(const std::map<std::string, int64_t>& counts) {
  std::string text;
  for (const auto& [format, count] : counts)
    text += fmt::format("{}{} {}", text.empty() ? "" : ", ", format, count);
  return text;
}

void PrintPlan(const PlannedAllocation& plan, const std::vector<PlannedAllocation>& sweep,
               LabelRule labels) {
  const char* loss = labels == LabelRule::kSampled ? "predicted KL" : "score";
  fmt::print("{:>8}  {:>12}  {:>12}  formats\n", "bpp", "size", loss);
  for (const PlannedAllocation& point : sweep) {
    if (!point.feasible) {
      fmt::print("{:>8.4f}  infeasible, the smallest feasible is {:.4f}\n", point.budget.bpp,
                 std::ceil(point.smallest_bpp * 1e4) / 1e4);
      continue;
    }
    fmt::print("{:>8.4f}  {:>12}  {:>12.5f}  {}\n", point.bpp, FormatBytes(point.file_bytes),
               point.cost, FormatCounts(point.counts));
  }
  if (const int knee = KneeOf(sweep); knee >= 0)
    fmt::print("knee at {:.4f} bpp\n", sweep[static_cast<size_t>(knee)].bpp);
  fmt::print(
      "chosen: {:.6f} bpp, {}, {} {:.5f} nats per token (lower bound {:.5f}), slack {} bytes, "
      "{:.3g} nats per MB\n",
      plan.bpp, FormatBytes(plan.file_bytes), loss, plan.cost, plan.lower_bound, plan.slack,
      plan.price * 1e6);
  fmt::print("        {}\n", FormatCounts(plan.counts));
}

void PrintEvaluation(const Evaluation& e, double predicted) {
  fmt::print("{:<22} {} -> {} ({:.1f} %)\n", "checkpoint", FormatBytes(e.bytes_source),
             FormatBytes(e.bytes),
             100.0 * static_cast<double>(e.bytes) / static_cast<double>(e.bytes_source));
  if (predicted >= 0) fmt::print("{:<22} {:.5f} nats per token\n", "predicted KL", predicted);
  fmt::print("{:<22} {:.5f} ± {:.5f} nats per token over {} tokens\n", "measured KL", e.kl,
             e.kl_stderr, e.tokens);
  if (predicted >= 0 && e.kl > 0)
    fmt::print("{:<22} {:.3f}\n", "predicted / measured", predicted / e.kl);
  fmt::print("{:<22} {:.3f} -> {:.3f}\n", "perplexity", e.ppl_source, e.ppl);
  fmt::print("{:<22} {:.2f} %\n", "top-1 agreement", 100 * e.top1);
}

void PrintTimes(const std::vector<StageTime>& times) {
  for (const StageTime& time : times)
    fmt::print("{:<22} {}\n", "time, " + time.stage, FormatSeconds(time.seconds));
  fmt::print("{:<22} {}\n", "peak memory", FormatBytes(PeakMemoryBytes()));
}

}  // namespace prismaquant

#include "cli/tables.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "base/progress.h"

namespace prismaquant {

std::string FormatCounts(const std::map<std::string, int64_t>& counts) {
  std::string text;
  for (const auto& [format, count] : counts)
    text += fmt::format("{}{} {}", text.empty() ? "" : ", ", format, count);
  return text;
}

namespace {

// What a budget other than a size came to.
void PrintBudget(const PlannedAllocation& plan) {
  const DeviceBudget& device = plan.budget.device;
  if (plan.budget.kind == Budget::Kind::kDevice) {
    fmt::print("        device memory {}: weights {}, KV cache {}, state {}, free {}\n",
               FormatBytes(device.bytes), FormatBytes(plan.file_bytes),
               FormatBytes(device.kv_cache_bytes), FormatBytes(device.state_bytes),
               FormatBytes(FreeDeviceBytes(plan)));
  }
  if (plan.budget.kind == Budget::Kind::kMaxKl) {
    fmt::print("        objective at most {}: {}\n", plan.budget.max_kl,
               plan.bytes_bound == 0 ? "by measurement"
               : plan.bytes_bound == plan.bytes
                   ? "proven smallest"
                   : fmt::format("{} larger than the smallest at most",
                                 FormatBytes(plan.bytes - plan.bytes_bound)));
  }
}

}  // namespace

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
               point.losses.text, FormatCounts(point.counts));
  }
  if (const int knee = KneeOf(sweep); knee >= 0)
    fmt::print("knee at {:.4f} bpp\n", sweep[static_cast<size_t>(knee)].bpp);
  fmt::print(
      "chosen: {:.6f} bpp, {}, {} {:.5f} nats per token, slack {} bytes, {:.3g} nats per MB\n",
      plan.bpp, FormatBytes(plan.file_bytes), loss, plan.losses.text, plan.slack, plan.price * 1e6);
  if (plan.losses.caption > 0) {
    fmt::print("        captions {:.5f} nats per token\n", plan.losses.caption);
  }
  if (plan.losses.mtp > 0) {
    fmt::print("        MTP head {:.5f} nats per token\n", plan.losses.mtp);
  }
  fmt::print("        objective {:.5f}, lower bound {:.5f}\n", plan.cost, plan.lower_bound);
  PrintBudget(plan);
  fmt::print("        {}\n", FormatCounts(plan.counts));
}

void PrintUniform(const PlannedAllocation& plan) {
  fmt::print("uniform: {:.6f} bpp, {}: {}\n", plan.bpp, FormatBytes(plan.file_bytes),
             FormatCounts(plan.counts));
}

void PrintFormatRow(const std::string& what, const std::string& format,
                    const FormatTotals& totals) {
  const double bits = totals.weights == 0 ? 0
                                          : 8.0 * static_cast<double>(totals.bytes) /
                                                static_cast<double>(totals.weights);
  fmt::print("{:<20} {:<8} {:>8} {:>16} {:>16} {:>8.4f}\n", what, format, totals.linears,
             totals.weights, totals.bytes, bits);
}

void PrintParts(const CheckpointSummary& summary) {
  fmt::print("{:<20} {:<8} {:>8} {:>16} {:>16} {:>8}\n", "part", "format", "Linears", "weights",
             "bytes", "bits");
  for (const auto& [part, content] : summary.parts) {
    const std::string name(PartName(part));
    for (const auto& [format, totals] : content.formats) PrintFormatRow(name, format, totals);
    if (content.other_parameters == 0) continue;
    PrintFormatRow(name, "other", {0, content.other_parameters, content.other_bytes, 0});
  }
  if (summary.active_bytes < summary.linear_bytes) {
    fmt::print("{:<20} {} of the Linears' {} are read for a token\n", "active",
               FormatBytes(summary.active_bytes), FormatBytes(summary.linear_bytes));
  }
}

Status PrintHeadCosts(Session& session) {
  if (session.model().FindPart(Part::kHead) == nullptr) {
    fmt::print("lm_head: tied to the embeddings, stays whole\n");
    return {};
  }
  PQ_ASSIGN_OR_RETURN(const auto losses, LinearLosses(session.model(), session.store(),
                                                      session.loss_tokens(), "lm_head"));
  if (losses.empty()) return {};
  std::string text;
  for (const Format* format : AllFormats()) {
    const auto found = losses.find(std::string(format->name()));
    if (format == &SourceFormat() || found == losses.end()) continue;
    text +=
        fmt::format("{}{} {:.5f}", text.empty() ? "" : ", ", format->name(), found->second.text);
  }
  fmt::print("lm_head would cost, in nats per token: {}\n", text);
  return {};
}

void PrintExperts(const Model& model, const Json& rendering) {
  std::map<int, std::vector<int64_t>> tokens;  // per layer, of each rendered expert
  std::map<int, int64_t> fallen_back;
  for (const LinearInfo& linear : model.linears()) {
    const auto entry = rendering.find(linear.name);
    if (!linear.is_expert || entry == rendering.end() || linear.name.ends_with("up_proj")) continue;
    if (linear.name.ends_with("down_proj")) continue;
    tokens[linear.layer].push_back((*entry)["tokens"].get<int64_t>());
    if ((*entry)["rendered"] == "rtn+scales") ++fallen_back[linear.layer];
  }
  if (tokens.empty()) return;
  fmt::print("{:<8} {:>8} {:>10} {:>10} {:>10}  rounded without inputs\n", "layer", "experts",
             "least", "median", "most");
  for (auto& [layer, counts] : tokens) {
    std::sort(counts.begin(), counts.end());
    fmt::print("{:<8} {:>8} {:>10} {:>10} {:>10}  {}\n", layer, counts.size(), counts.front(),
               counts[counts.size() / 2], counts.back(), fallen_back[layer]);
  }
}

namespace {

void PrintRow(const char* what, const std::string& value) {
  fmt::print("{:<22} {}\n", what, value);
}

void PrintKl(const char* part, double kl, double error, int64_t tokens, double predicted) {
  const std::string suffix = part[0] == 0 ? "" : fmt::format(", {}", part);
  if (predicted >= 0) {
    PrintRow(("predicted KL" + suffix).c_str(), fmt::format("{:.5f} nats per token", predicted));
  }
  PrintRow(("measured KL" + suffix).c_str(),
           fmt::format("{:.5f} ± {:.5f} nats per token over {} tokens", kl, error, tokens));
  if (predicted >= 0 && kl > 0) {
    PrintRow("predicted / measured", fmt::format("{:.3f}", predicted / kl));
  }
}

std::string Rates(const DraftAcceptance& drafts) {
  std::string text;
  for (int draft = 0; draft < kDrafts; ++draft) {
    const auto index = static_cast<size_t>(draft);
    if (drafts.judged[index] == 0) break;
    text += fmt::format("{}{:.1f} %", draft == 0 ? "" : ", ", 100 * drafts.rate(draft));
  }
  return text;
}

}  // namespace

void PrintEvaluation(const Evaluation& e, const PartLosses& predicted) {
  PrintRow("checkpoint",
           fmt::format("{} -> {} ({:.1f} %)", FormatBytes(e.bytes_source), FormatBytes(e.bytes),
                       100.0 * static_cast<double>(e.bytes) / static_cast<double>(e.bytes_source)));
  PrintKl("", e.kl, e.kl_stderr, e.tokens, predicted.text);
  PrintRow("perplexity", fmt::format("{:.3f} -> {:.3f}", e.ppl_source, e.ppl));
  PrintRow("top-1 agreement", fmt::format("{:.2f} %", 100 * e.top1));
  if (e.captions) {
    const CaptionEvaluation& c = *e.captions;
    const bool known = predicted.text >= 0 && predicted.caption > 0;
    PrintKl("captions", c.kl, c.kl_stderr, c.tokens, known ? predicted.caption : -1);
    PrintRow("caption loss", fmt::format("{:.4f} -> {:.4f} nats per token over {} images",
                                         c.loss_source, c.loss, c.images));
    PrintRow("caption accuracy",
             fmt::format("{:.1f} % -> {:.1f} %", 100 * c.accuracy_source, 100 * c.accuracy));
  }
  if (e.drafts) {
    PrintRow("MTP acceptance", fmt::format("{} -> {}", Rates(*e.drafts_source), Rates(*e.drafts)));
  }
  if (e.router_agreement) {
    PrintRow("router agreement", fmt::format("{:.2f} %", 100 * *e.router_agreement));
  }
}

}  // namespace prismaquant

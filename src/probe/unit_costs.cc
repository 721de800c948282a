#include "probe/unit_costs.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "formats/format.h"

namespace prismaquant {
namespace {

// Linear -> format -> cost.
struct CostTable {
  std::map<std::string, std::map<std::string, LinearCost>> rows;
  Rounding rounding = Rounding::kNearest;
};

Result<CostTable> LoadCosts(const Model& model, RunStore& store, Rounding rounding) {
  CostTable table{.rows = {}, .rounding = rounding};
  PQ_ASSIGN_OR_RETURN(table.rows, store.Costs());
  if (rounding == Rounding::kNearest) return table;
  PQ_ASSIGN_OR_RETURN(auto rounded, store.Costs(rounding));
  for (const LinearInfo& linear : model.linears()) {
    if (linear.part == Part::kHead || !linear.allocatable) continue;
    auto& row = table.rows[linear.name];
    std::erase_if(row,
                  [](const auto& cell) { return FindFormat(cell.first)->grid() != Grid::kNone; });
    row.merge(rounded[linear.name]);
  }
  return table;
}

bool IsAllocated(const LinearInfo& linear, const UnitRules& rules) {
  if (linear.part == Part::kHead) return rules.head != nullptr;
  return linear.allocatable && (linear.part != Part::kVision || rules.vision);
}

// Allocated Linears by unit, in model order.
std::vector<std::vector<LinearInfo>> GroupByUnit(const Model& model, const UnitRules& rules) {
  std::vector<std::vector<LinearInfo>> units;
  std::map<std::string, size_t> index;
  for (const LinearInfo& linear : model.linears()) {
    if (!IsAllocated(linear, rules)) continue;
    const auto [found, fresh] = index.try_emplace(linear.unit, units.size());
    if (fresh) units.emplace_back();
    units[found->second].push_back(linear);
  }
  return units;
}

bool Admissible(const Format& format, const std::vector<LinearInfo>& members,
                const UnitRules& rules) {
  // What a kernel multiplies at once: the fused Linears of a unit, or of one expert.
  std::map<std::string, int64_t> outputs;
  for (const LinearInfo& member : members) {
    if (!format.Supports(member.out, member.in)) return false;
    outputs[member.scale_group] += member.out;
  }
  return rules.any_kernel || std::all_of(outputs.begin(), outputs.end(), [&](const auto& fused) {
           return fused.second % format.kernel_out_multiple() == 0;
         });
}

bool IsAsked(const Format& format, const std::vector<std::string>& names) {
  return names.empty() || std::find(names.begin(), names.end(), format.name()) != names.end();
}

UnitCosts DescribeUnit(const std::vector<LinearInfo>& members, const UnitRules& rules) {
  UnitCosts unit{.name = members.front().unit, .linears = {}, .weights = 0, .formats = {}};
  for (const LinearInfo& member : members) {
    unit.linears.push_back(member.name);
    unit.weights += member.out * member.in;
  }
  const bool head = members.front().part == Part::kHead;
  if (head) unit.chosen = rules.head->name();
  for (const Format* format : AllFormats()) {
    if (head ? format != rules.head && format != &SourceFormat()
             : !IsAsked(*format, rules.formats)) {
      continue;
    }
    if (!Admissible(*format, members, rules)) continue;
    UnitFormat& entry = unit.formats.emplace_back();
    entry.format = format->name();
    for (const LinearInfo& member : members) {
      entry.bytes += format->Bytes(member.out, member.in, member.dtype);
      entry.payload_bytes += format->PayloadBytes(member.out, member.in, member.dtype);
    }
  }
  return unit;
}

Result<const LinearCost*> FindCost(const CostTable& costs, const std::string& linear,
                                   const std::string& format) {
  const auto row = costs.rows.find(linear);
  if (row != costs.rows.end()) {
    const auto cell = row->second.find(format);
    if (cell != row->second.end()) return &cell->second;
  }
  return Status::InvalidInput(fmt::format(
      "the run store has no cost of {} for {}; run `prismaquant probe --formats {}{}`", format,
      linear, format, costs.rounding == Rounding::kNearest ? "" : " --cost-render gptq"));
}

std::map<std::string, Part> PartsByName(const Model& model) {
  std::map<std::string, Part> parts;
  for (const LinearInfo& linear : model.linears()) parts[linear.name] = linear.part;
  return parts;
}

// Adds what one Linear has per sequence to the sums over a set of them.
void AddTo(std::vector<double>& sums, const std::vector<double>& values) {
  if (values.size() > sums.size()) sums.resize(values.size(), 0);
  for (size_t n = 0; n < values.size(); ++n) sums[n] += values[n];
}

// Half the sum of squares of the sequences [first, end), per token.
double HalfMean(const std::vector<double>& squares, size_t first, size_t end, int64_t tokens) {
  double sum = 0;
  for (size_t n = first; n < std::min(end, squares.size()); ++n) sum += squares[n];
  return tokens == 0 ? 0 : sum / 2 / static_cast<double>(tokens);
}

// `main`, `mtp`: squares per sequence.
PartLosses Losses(const std::vector<double>& main, const std::vector<double>& mtp,
                  const LossTokens& tokens) {
  const auto windows = static_cast<size_t>(tokens.windows);
  return {.text = HalfMean(main, 0, windows, tokens.text),
          .caption = HalfMean(main, windows, main.size(), tokens.caption),
          .mtp = HalfMean(mtp, 0, windows, tokens.mtp)};
}

// The sum of what the Linears lose on their own.
Result<PartLosses> DirectionalLosses(const CostTable& costs,
                                     const std::map<std::string, std::string>& choices,
                                     const std::map<std::string, Part>& parts,
                                     const LossTokens& tokens) {
  std::vector<double> main, mtp;
  for (const auto& [linear, format] : choices) {
    PQ_ASSIGN_OR_RETURN(const LinearCost* cost, FindCost(costs, linear, format));
    AddTo(parts.at(linear) == Part::kMtp ? mtp : main, cost->squares);
  }
  return Losses(main, mtp, tokens);
}

void Square(std::vector<double>& values) {
  for (double& value : values) value *= value;
}

// Per token of the losses that a Linear moves.
double TracePerToken(const LinearStats& stats, Part part, const LossTokens& tokens) {
  const int64_t count = part == Part::kMtp      ? tokens.mtp
                        : part == Part::kVision ? tokens.caption
                        : part == Part::kHead   ? tokens.text
                                                : tokens.text + tokens.caption;
  return count == 0 ? 0 : stats.fisher_trace / static_cast<double>(count);
}

// The trace of a Linear sums over all losses that it moves, so all of it counts as one part's.
PartLosses FisherTraceLosses(const LinearStats& stats, const LinearCost& cost, Part part,
                             const LossTokens& tokens) {
  const double loss = TracePerToken(stats, part, tokens) * cost.weight_mse / 2;
  if (part == Part::kMtp) return {.mtp = loss};
  if (part == Part::kVision) return {.caption = loss};
  return {.text = loss};
}

// The loss that a Linear of this part moves above all.
double OwnLoss(const PartLosses& losses, Part part) {
  if (part == Part::kMtp) return losses.mtp;
  return part == Part::kVision ? losses.caption : losses.text;
}

double Weighted(const PartLosses& losses, const PartWeights& weights) {
  return weights.text * losses.text + weights.caption * losses.caption + weights.mtp * losses.mtp;
}

Result<std::map<std::string, LinearStats>> StatsByName(RunStore& store) {
  PQ_ASSIGN_OR_RETURN(const std::vector<LinearStats> all, store.Stats());
  std::map<std::string, LinearStats> by_name;
  for (const LinearStats& stats : all) by_name[stats.name] = stats;
  return by_name;
}

}  // namespace

std::vector<UnitCosts> UnitsWithoutCosts(const Model& model, const UnitRules& rules) {
  std::vector<UnitCosts> units;
  for (const auto& members : GroupByUnit(model, rules)) {
    units.push_back(DescribeUnit(members, rules));
  }
  return units;
}

Result<std::vector<UnitCosts>> BuildUnitCosts(const Model& model, RunStore& store,
                                              const LossTokens& tokens,
                                              const UnitCostOptions& options) {
  const bool directional = options.cost == CostModel::kDirectional;
  PQ_ASSIGN_OR_RETURN(const CostTable costs,
                      LoadCosts(model, store, directional ? options.rounding : Rounding::kNearest));
  PQ_ASSIGN_OR_RETURN(const auto stats, StatsByName(store));
  const auto parts = PartsByName(model);
  std::vector<UnitCosts> units = UnitsWithoutCosts(model, options.rules);
  for (UnitCosts& unit : units) {
    for (UnitFormat& format : unit.formats) {
      if (directional) {
        std::map<std::string, std::string> choices;
        for (const std::string& linear : unit.linears) choices[linear] = format.format;
        PQ_ASSIGN_OR_RETURN(format.losses, DirectionalLosses(costs, choices, parts, tokens));
      } else {
        for (const std::string& linear : unit.linears) {
          PQ_ASSIGN_OR_RETURN(const LinearCost* cost, FindCost(costs, linear, format.format));
          const PartLosses losses =
              FisherTraceLosses(stats.at(linear), *cost, parts.at(linear), tokens);
          format.losses.text += losses.text;
          format.losses.caption += losses.caption;
          format.losses.mtp += losses.mtp;
        }
      }
      format.cost = Weighted(format.losses, options.weights);
    }
  }
  return units;
}

Result<PartLosses> JointLoss(const Model& model, RunStore& store, const LossTokens& tokens,
                             const std::map<std::string, std::string>& choices, Rounding rounding) {
  PQ_ASSIGN_OR_RETURN(const CostTable costs, LoadCosts(model, store, rounding));
  const auto parts = PartsByName(model);
  std::vector<double> main, mtp;
  for (const auto& [linear, format] : choices) {
    PQ_ASSIGN_OR_RETURN(const LinearCost* cost, FindCost(costs, linear, format));
    AddTo(parts.at(linear) == Part::kMtp ? mtp : main, cost->directional);
  }
  Square(main);
  Square(mtp);
  return Losses(main, mtp, tokens);
}

Result<std::map<std::string, PartLosses>> LinearLosses(const Model& model, RunStore& store,
                                                       const LossTokens& tokens,
                                                       const std::string& linear) {
  PQ_ASSIGN_OR_RETURN(const CostTable costs, LoadCosts(model, store, Rounding::kNearest));
  const auto parts = PartsByName(model);
  std::map<std::string, PartLosses> losses;
  const auto row = costs.rows.find(linear);
  if (row == costs.rows.end()) return losses;
  for (const auto& [format, cost] : row->second) {
    PQ_ASSIGN_OR_RETURN(losses[format],
                        DirectionalLosses(costs, {{linear, format}}, parts, tokens));
  }
  return losses;
}

Result<Json> ProbeToJson(const Model& model, RunStore& store, const LossTokens& tokens) {
  PQ_ASSIGN_OR_RETURN(const CostTable costs, LoadCosts(model, store, Rounding::kNearest));
  std::map<std::string, CostTable> further;
  for (const auto& [key, rounding] :
       {std::pair("directional_gptq", Rounding::kGptq),
        std::pair("directional_gptq_in_sample", Rounding::kGptqInSample)}) {
    PQ_ASSIGN_OR_RETURN(further[key].rows, store.Costs(rounding));
  }
  PQ_ASSIGN_OR_RETURN(const auto stats, StatsByName(store));
  const auto parts = PartsByName(model);
  Json json = {{"schema", 1},
               {"tokens", tokens.text},
               {"caption_tokens", tokens.caption},
               {"mtp_tokens", tokens.mtp},
               {"linears", Json::object()}};
  for (const LinearInfo& linear : model.linears()) {
    const auto found = stats.find(linear.name);
    if (found == stats.end()) continue;
    Json& entry = json["linears"][linear.name];
    entry = {{"out", linear.out},
             {"in", linear.in},
             {"unit", linear.unit},
             {"tokens", found->second.tokens},
             {"fisher_trace", TracePerToken(found->second, linear.part, tokens)},
             {"input_amax", found->second.input_amax},
             {"weight_amax", found->second.weight_amax},
             {"costs", Json::object()}};
    const auto row = costs.rows.find(linear.name);
    if (row == costs.rows.end()) continue;
    for (const auto& [format, cost] : row->second) {
      PQ_ASSIGN_OR_RETURN(const PartLosses losses,
                          DirectionalLosses(costs, {{linear.name, format}}, parts, tokens));
      const PartLosses trace = FisherTraceLosses(found->second, cost, linear.part, tokens);
      Json& priced = entry["costs"][format];
      priced = {{"directional", OwnLoss(losses, linear.part)},
                {"fisher_trace", trace.text + trace.caption + trace.mtp},
                {"weight_mse", cost.weight_mse},
                {"bytes", FindFormat(format)->Bytes(linear.out, linear.in, linear.dtype)}};
      for (const auto& [key, table] : further) {
        const auto found_row = table.rows.find(linear.name);
        if (found_row == table.rows.end() || found_row->second.count(format) == 0) continue;
        PQ_ASSIGN_OR_RETURN(const PartLosses further_losses,
                            DirectionalLosses(table, {{linear.name, format}}, parts, tokens));
        priced[key] = OwnLoss(further_losses, linear.part);
      }
      if (linear.part == Part::kText && tokens.caption > 0) {
        priced["directional_caption"] = losses.caption;
      }
    }
  }
  return json;
}

}  // namespace prismaquant

#include "probe/unit_costs.h"

#include <fmt/format.h>

#include <algorithm>

#include "formats/format.h"

namespace prismaquant {
namespace {

using CostTable = std::map<std::string, std::map<std::string, LinearCost>>;

// Allocatable Linears by unit, in model order.
std::vector<std::vector<LinearInfo>> GroupByUnit(const Model& model) {
  std::vector<std::vector<LinearInfo>> units;
  std::map<std::string, size_t> index;
  for (const LinearInfo& linear : model.linears()) {
    if (!linear.allocatable) continue;
    const auto [found, fresh] = index.try_emplace(linear.unit, units.size());
    if (fresh) units.emplace_back();
    units[found->second].push_back(linear);
  }
  return units;
}

bool Admissible(const Format& format, const std::vector<LinearInfo>& members, bool any_kernel) {
  int64_t fused_out = 0;
  for (const LinearInfo& member : members) {
    if (!format.Supports(member.out, member.in)) return false;
    fused_out += member.out;
  }
  return any_kernel || fused_out % format.kernel_out_multiple() == 0;
}

UnitCosts DescribeUnit(const std::vector<LinearInfo>& members, bool any_kernel) {
  UnitCosts unit{.name = members.front().unit, .linears = {}, .weights = 0, .formats = {}};
  for (const LinearInfo& member : members) {
    unit.linears.push_back(member.name);
    unit.weights += member.out * member.in;
  }
  for (const Format* format : AllFormats()) {
    if (!Admissible(*format, members, any_kernel)) continue;
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
  const auto row = costs.find(linear);
  if (row != costs.end()) {
    const auto cell = row->second.find(format);
    if (cell != row->second.end()) return &cell->second;
  }
  return Status::InvalidInput(
      fmt::format("the run store has no cost of {} for {}; run `prismaquant probe` to its end",
                  format, linear));
}

// Half the mean square of the members' summed s_n.
Result<double> DirectionalLoss(const CostTable& costs,
                               const std::map<std::string, std::string>& choices, int64_t tokens) {
  std::vector<double> sums;
  for (const auto& [linear, format] : choices) {
    PQ_ASSIGN_OR_RETURN(const LinearCost* cost, FindCost(costs, linear, format));
    if (cost->directional.size() > sums.size()) sums.resize(cost->directional.size(), 0);
    for (size_t n = 0; n < cost->directional.size(); ++n) sums[n] += cost->directional[n];
  }
  double squares = 0;
  for (const double s : sums) squares += s * s;
  return squares / 2 / static_cast<double>(tokens);
}

double FisherTraceLoss(const LinearStats& stats, const LinearCost& cost, int64_t tokens) {
  return stats.fisher_trace / static_cast<double>(tokens) * cost.weight_mse / 2;
}

Result<std::map<std::string, LinearStats>> StatsByName(RunStore& store) {
  PQ_ASSIGN_OR_RETURN(const std::vector<LinearStats> all, store.Stats());
  std::map<std::string, LinearStats> by_name;
  for (const LinearStats& stats : all) by_name[stats.name] = stats;
  return by_name;
}

}  // namespace

std::vector<UnitCosts> UnitsWithoutCosts(const Model& model, bool any_kernel) {
  std::vector<UnitCosts> units;
  for (const auto& members : GroupByUnit(model)) units.push_back(DescribeUnit(members, any_kernel));
  return units;
}

Result<std::vector<UnitCosts>> BuildUnitCosts(const Model& model, RunStore& store, int64_t tokens,
                                              const UnitCostOptions& options) {
  PQ_ASSIGN_OR_RETURN(const CostTable costs, store.Costs());
  PQ_ASSIGN_OR_RETURN(const auto stats, StatsByName(store));
  std::vector<UnitCosts> units = UnitsWithoutCosts(model, options.any_kernel);
  for (UnitCosts& unit : units) {
    for (UnitFormat& format : unit.formats) {
      if (options.cost == CostModel::kDirectional) {
        std::map<std::string, std::string> choices;
        for (const std::string& linear : unit.linears) choices[linear] = format.format;
        PQ_ASSIGN_OR_RETURN(format.cost, DirectionalLoss(costs, choices, tokens));
        continue;
      }
      for (const std::string& linear : unit.linears) {
        PQ_ASSIGN_OR_RETURN(const LinearCost* cost, FindCost(costs, linear, format.format));
        format.cost += FisherTraceLoss(stats.at(linear), *cost, tokens);
      }
    }
  }
  return units;
}

Result<double> JointLoss(RunStore& store, int64_t tokens,
                         const std::map<std::string, std::string>& choices) {
  PQ_ASSIGN_OR_RETURN(const CostTable costs, store.Costs());
  return DirectionalLoss(costs, choices, tokens);
}

Result<Json> ProbeToJson(const Model& model, RunStore& store, int64_t tokens) {
  PQ_ASSIGN_OR_RETURN(const CostTable costs, store.Costs());
  PQ_ASSIGN_OR_RETURN(const auto stats, StatsByName(store));
  Json json = {{"schema", 1}, {"tokens", tokens}, {"linears", Json::object()}};
  for (const LinearInfo& linear : model.linears()) {
    const auto found = stats.find(linear.name);
    if (found == stats.end()) continue;
    Json& entry = json["linears"][linear.name];
    entry = {{"out", linear.out},
             {"in", linear.in},
             {"unit", linear.unit},
             {"tokens", found->second.tokens},
             {"fisher_trace", found->second.fisher_trace / static_cast<double>(tokens)},
             {"input_amax", found->second.input_amax},
             {"weight_amax", found->second.weight_amax},
             {"costs", Json::object()}};
    const auto row = costs.find(linear.name);
    if (row == costs.end()) continue;
    for (const auto& [format, cost] : row->second) {
      PQ_ASSIGN_OR_RETURN(const double directional,
                          DirectionalLoss(costs, {{linear.name, format}}, tokens));
      entry["costs"][format] = {
          {"directional", directional},
          {"fisher_trace", FisherTraceLoss(found->second, cost, tokens)},
          {"weight_mse", cost.weight_mse},
          {"bytes", FindFormat(format)->Bytes(linear.out, linear.in, linear.dtype)}};
    }
  }
  return json;
}

}  // namespace prismaquant

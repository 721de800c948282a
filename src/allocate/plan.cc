#include "allocate/plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <regex>
#include <set>
#include <utility>

namespace prismaquant {
namespace {

const UnitFormat* FindUnitFormat(const UnitCosts& unit, const std::string& format) {
  for (const UnitFormat& candidate : unit.formats) {
    if (candidate.format == format) return &candidate;
  }
  return nullptr;
}

Result<std::regex> Compile(const char* option, const FormatRule& rule) {
  try {
    return std::regex(rule.pattern, std::regex::ECMAScript);
  } catch (const std::regex_error& error) {
    return Status::InvalidInput(fmt::format("{} {}={}: the pattern \"{}\" is malformed: {}", option,
                                            rule.pattern, rule.format, rule.pattern, error.what()));
  }
}

bool Matches(const UnitCosts& unit, const std::regex& regex) {
  return std::any_of(unit.linears.begin(), unit.linears.end(),
                     [&](const std::string& linear) { return std::regex_search(linear, regex); });
}

void KeepOnly(UnitCosts& unit, const std::vector<std::string>& formats) {
  std::erase_if(unit.formats, [&](const UnitFormat& f) {
    return std::find(formats.begin(), formats.end(), f.format) == formats.end();
  });
}

Status ApplyRule(std::vector<UnitCosts>& units, const std::vector<std::string>& formats,
                 const FormatRule& rule, bool pin) {
  const char* option = pin ? "--pin" : "--forbid";
  PQ_ASSIGN_OR_RETURN(const std::regex regex, Compile(option, rule));
  if (std::find(formats.begin(), formats.end(), rule.format) == formats.end()) {
    return Status::InvalidInput(fmt::format("{} {}={}: the format is none of --formats {}", option,
                                            rule.pattern, rule.format, fmt::join(formats, ",")));
  }
  bool matched = false;
  for (UnitCosts& unit : units) {
    if (!Matches(unit, regex)) continue;
    matched = true;
    if (!unit.chosen.empty()) continue;
    if (pin && FindUnitFormat(unit, rule.format) == nullptr) {
      return Status::InvalidInput(fmt::format("{} {}={}: {} cannot have this format", option,
                                              rule.pattern, rule.format, unit.name));
    }
    std::erase_if(unit.formats,
                  [&](const UnitFormat& f) { return (f.format == rule.format) != pin; });
    if (unit.formats.empty()) {
      return Status::InvalidInput(fmt::format("{} {}={}: leaves {} without a format", option,
                                              rule.pattern, rule.format, unit.name));
    }
  }
  if (matched) return {};
  return Status::InvalidInput(
      fmt::format("{} {}={}: matches no Linear", option, rule.pattern, rule.format));
}

std::vector<Unit> ToUnits(const std::vector<UnitCosts>& units, const std::vector<char>* counted) {
  std::vector<Unit> result;
  for (size_t i = 0; i < units.size(); ++i) {
    Unit unit{.name = units[i].name, .weights = units[i].weights, .choices = {}};
    for (const UnitFormat& f : units[i].formats) {
      const int64_t bytes = counted == nullptr ? f.bytes : ((*counted)[i] ? f.payload_bytes : 0);
      unit.choices.push_back({f.format, bytes, f.cost});
    }
    result.push_back(std::move(unit));
  }
  return result;
}

Json LossesToJson(const PartLosses& losses) {
  return {{"text", losses.text}, {"caption", losses.caption}, {"mtp", losses.mtp}};
}

Json BudgetToJson(const Budget& budget) {
  const DeviceBudget& device = budget.device;
  switch (budget.kind) {
    case Budget::Kind::kBpp:
      return {{"bpp", budget.bpp}};
    case Budget::Kind::kFileBytes:
      return {{"file_bytes", budget.file_bytes}};
    case Budget::Kind::kDevice:
      return {{"device_bytes", device.bytes},
              {"context", device.context},
              {"sequences", device.sequences},
              {"drafts", device.drafts}};
    case Budget::Kind::kMaxKl:
      return {{"max_kl", budget.max_kl}};
  }
  return nullptr;
}

Json DeviceToJson(const PlannedAllocation& plan) {
  return {{"weights_bytes", plan.file_bytes},
          {"kv_cache_bytes", plan.budget.device.kv_cache_bytes},
          {"state_bytes", plan.budget.device.state_bytes},
          {"free_bytes", FreeDeviceBytes(plan)}};
}

Json FrontierPoint(const PlannedAllocation& point) {
  Json json = {
      {"bpp", point.budget.bpp}, {"target_bpp", point.budget.bpp}, {"feasible", point.feasible}};
  if (!point.feasible) {
    json["smallest_feasible_bpp"] = point.smallest_bpp;
    return json;
  }
  json["bpp"] = point.bpp;
  json["bytes"] = point.bytes;
  json["file_bytes"] = point.file_bytes;
  json["predicted_kl"] = point.losses.text;
  json["objective"] = point.cost;
  json["formats"] = point.counts;
  return json;
}

}  // namespace

Result<FormatRule> ParseFormatRule(const std::string& option, const std::string& text) {
  const size_t equals = text.rfind('=');
  if (equals == std::string::npos || equals == 0 || equals + 1 == text.size()) {
    return Status::InvalidInput(fmt::format("{} {}: expected REGEX=FORMAT", option, text));
  }
  return FormatRule{text.substr(0, equals), text.substr(equals + 1)};
}

Result<int64_t> ParseSize(const std::string& option, const std::string& text) {
  // 2.01GB is an integer, although 2.01 is no binary fraction.
  constexpr long double kByteRounding = 0x1p-10L;
  static const std::map<std::string, long double> kUnits = {
      {"", 1},     {"B", 1},        {"kB", 1e3},     {"KB", 1e3},    {"MB", 1e6},
      {"GB", 1e9}, {"KiB", 0x1p10}, {"MiB", 0x1p20}, {"GiB", 0x1p30}};
  char* end = nullptr;
  const long double value = std::strtold(text.c_str(), &end);
  std::string unit = end;
  unit.erase(0, unit.find_first_not_of(' ') == std::string::npos ? unit.size()
                                                                 : unit.find_first_not_of(' '));
  const auto factor = kUnits.find(unit);
  if (end == text.c_str() || factor == kUnits.end() || !std::isfinite(value) || value <= 0 ||
      value * factor->second > 0x1p52) {
    return Status::InvalidInput(
        fmt::format("{} {}: expected a size as 23GB or 1.5GiB", option, text));
  }
  return static_cast<int64_t>(value * factor->second + kByteRounding);
}

Result<Planner> Planner::Make(std::vector<UnitCosts> units, const PlanRules& rules,
                              int64_t fixed_bytes) {
  Planner planner;
  planner.fixed_bytes_ = fixed_bytes;
  for (UnitCosts& unit : units) {
    const bool chosen = !unit.chosen.empty();
    if (!chosen) KeepOnly(unit, rules.formats);
    const bool counted = unit.formats.size() >= 2;
    if (chosen) KeepOnly(unit, {unit.chosen});
    if (unit.formats.empty()) {
      return Status::InvalidInput(
          chosen ? fmt::format("{}: cannot be stored as {}", unit.name, unit.chosen)
                 : fmt::format("--formats {}: none of them can hold {}",
                               fmt::join(rules.formats, ","), unit.name));
    }
    planner.counted_.push_back(counted ? 1 : 0);
    if (counted) planner.counted_weights_ += unit.weights;
  }
  for (const FormatRule& rule : rules.pin)
    PQ_RETURN_IF_ERROR(ApplyRule(units, rules.formats, rule, /*pin=*/true));
  for (const FormatRule& rule : rules.forbid)
    PQ_RETURN_IF_ERROR(ApplyRule(units, rules.formats, rule, /*pin=*/false));
  planner.units_ = std::move(units);
  return planner;
}

double Planner::BppOf(int64_t payload) const {
  if (counted_weights_ == 0) return 0;
  return 8.0 * static_cast<double>(payload) / static_cast<double>(counted_weights_);
}

int64_t Planner::PayloadWithin(double bpp) const {
  if (counted_weights_ == 0) return 0;
  const double bytes = std::floor(bpp * static_cast<double>(counted_weights_) / 8);
  int64_t payload = static_cast<int64_t>(std::clamp(bytes, -1.0, 0x1p52));
  if (BppOf(payload + 1) <= bpp) ++payload;
  if (BppOf(payload) > bpp) --payload;
  return payload;
}

double Planner::SmallestBpp() const { return BppOf(SmallestBytes(ToUnits(units_, &counted_))); }

PlannedAllocation Planner::Describe(const std::vector<int>& choice) const {
  PlannedAllocation plan;
  plan.feasible = true;
  int64_t payload = 0;
  for (size_t i = 0; i < units_.size(); ++i) {
    const UnitFormat& format = units_[i].formats[static_cast<size_t>(choice[i])];
    for (const std::string& linear : units_[i].linears) plan.choices[linear] = format.format;
    plan.counts[format.format] += static_cast<int64_t>(units_[i].linears.size());
    plan.bytes += format.bytes;
    plan.cost += format.cost;
    plan.losses.text += format.losses.text;
    plan.losses.caption += format.losses.caption;
    plan.losses.mtp += format.losses.mtp;
    if (counted_[i]) payload += format.payload_bytes;
  }
  plan.file_bytes = fixed_bytes_ + plan.bytes;
  plan.bpp = BppOf(payload);
  return plan;
}

PlannedAllocation Planner::Describe(const Budget& budget, const Allocation& allocation) const {
  PlannedAllocation plan = Describe(allocation.choice);
  plan.budget = budget;
  plan.lower_bound = allocation.lower_bound;
  plan.price = allocation.price;
  plan.slack = allocation.slack;
  return plan;
}

int64_t Planner::LimitOf(const Budget& budget) const {
  if (budget.kind == Budget::Kind::kBpp) return PayloadWithin(budget.bpp);
  if (budget.kind == Budget::Kind::kFileBytes) return budget.file_bytes - fixed_bytes_;
  const DeviceBudget& device = budget.device;
  return device.bytes - device.kv_cache_bytes - device.state_bytes - fixed_bytes_;
}

Status Planner::Refusal(const Budget& budget, int64_t smallest) const {
  if (budget.kind == Budget::Kind::kBpp) {
    return Status::Unmet(fmt::format("--bpp {} cannot be met: the smallest feasible is {}",
                                     budget.bpp, SmallestBpp()));
  }
  const int64_t weights = smallest + fixed_bytes_;
  if (budget.kind == Budget::Kind::kFileBytes) {
    return Status::Unmet(
        fmt::format("--size of {} bytes cannot be met: the smallest feasible is {} bytes",
                    budget.file_bytes, weights));
  }
  const DeviceBudget& device = budget.device;
  return Status::Unmet(
      fmt::format("--device-memory of {} bytes cannot be met: the smallest feasible is {} bytes, "
                  "{} of weights, "
                  "{} of KV cache and {} of state",
                  device.bytes, weights + device.kv_cache_bytes + device.state_bytes, weights,
                  device.kv_cache_bytes, device.state_bytes));
}

Result<PlannedAllocation> Planner::Plan(const Budget& budget) const {
  if (budget.kind == Budget::Kind::kMaxKl) return Smallest(budget);
  const bool by_bpp = budget.kind == Budget::Kind::kBpp;
  if (by_bpp && std::isnan(budget.bpp))
    return Status::InvalidInput("a budget of nan bpp: expected a number");
  const int64_t limit = LimitOf(budget);
  const std::vector<Unit> units = ToUnits(units_, by_bpp ? &counted_ : nullptr);
  if (const int64_t smallest = SmallestBytes(units); limit < smallest)
    return Refusal(budget, smallest);
  PQ_ASSIGN_OR_RETURN(const Allocation allocation, Allocate(units, limit));
  return Describe(budget, allocation);
}

Result<PlannedAllocation> Planner::Smallest(const Budget& budget) const {
  PQ_ASSIGN_OR_RETURN(const SmallestAllocation found,
                      AllocateSmallest(ToUnits(units_, nullptr), budget.max_kl));
  PlannedAllocation plan = Describe(budget, found.allocation);
  plan.bytes_bound = found.bytes_bound;
  return plan;
}

Result<std::vector<PlannedAllocation>> Planner::Sweep(const std::vector<double>& bpps) const {
  std::vector<PlannedAllocation> sweep;
  for (const double bpp : bpps) {
    const Budget budget{.kind = Budget::Kind::kBpp, .bpp = bpp};
    Result<PlannedAllocation> plan = Plan(budget);
    if (!plan.ok() && plan.status().code() != StatusCode::kUnmet) return plan.status();
    PlannedAllocation point;
    if (plan.ok()) point = std::move(plan).value();
    point.budget = budget;
    point.smallest_bpp = SmallestBpp();
    sweep.push_back(std::move(point));
  }
  return sweep;
}

Result<PlannedAllocation> Planner::Uniform(const std::string& format) const {
  std::vector<int> choice;
  for (const UnitCosts& unit : units_) {
    int best = 0;
    for (size_t f = 0; f < unit.formats.size(); ++f) {
      if (unit.formats[f].bytes > unit.formats[static_cast<size_t>(best)].bytes)
        best = static_cast<int>(f);
    }
    for (size_t f = 0; f < unit.formats.size(); ++f) {
      if (unit.formats[f].format == format) best = static_cast<int>(f);
    }
    choice.push_back(best);
  }
  PlannedAllocation plan = Describe(choice);
  plan.lower_bound = plan.cost;
  plan.budget = {.kind = Budget::Kind::kBpp, .bpp = plan.bpp};
  return plan;
}

int64_t FreeDeviceBytes(const PlannedAllocation& plan) {
  const DeviceBudget& device = plan.budget.device;
  return device.bytes - plan.file_bytes - device.kv_cache_bytes - device.state_bytes;
}

int KneeOf(const std::vector<PlannedAllocation>& sweep) {
  std::vector<double> x, y;
  std::vector<int> index;
  for (size_t i = 0; i < sweep.size(); ++i) {
    if (!sweep[i].feasible) continue;
    x.push_back(sweep[i].bpp);
    y.push_back(sweep[i].cost);
    index.push_back(static_cast<int>(i));
  }
  const int knee = Knee(x, y);
  return knee < 0 ? -1 : index[static_cast<size_t>(knee)];
}

Json PlanToJson(const PlannedAllocation& plan, const std::vector<PlannedAllocation>& sweep) {
  Json json = {{"schema", 1},
               {"budget", BudgetToJson(plan.budget)},
               {"bpp", plan.bpp},
               {"bytes", plan.bytes},
               {"file_bytes", plan.file_bytes},
               {"predicted_kl", plan.losses.text},
               {"predicted", LossesToJson(plan.losses)},
               {"objective", plan.cost},
               {"lower_bound", plan.lower_bound},
               {"gap", plan.cost - plan.lower_bound},
               {"slack_bytes", plan.slack},
               {"price_nats_per_byte", plan.price},
               {"formats", plan.counts},
               {"choices", plan.choices},
               {"frontier", Json::array()},
               {"knee", nullptr}};
  if (plan.budget.kind == Budget::Kind::kDevice) json["device"] = DeviceToJson(plan);
  if (plan.budget.kind == Budget::Kind::kMaxKl) json["bytes_lower_bound"] = plan.bytes_bound;
  for (const PlannedAllocation& point : sweep) json["frontier"].push_back(FrontierPoint(point));
  if (const int knee = KneeOf(sweep); knee >= 0)
    json["knee"] = {{"bpp", sweep[static_cast<size_t>(knee)].bpp}};
  return json;
}

Result<std::map<std::string, std::string>> ChoicesFromJson(
    const Json& json, const std::string& origin, const std::vector<std::string>& linears) {
  if (!json.is_object() || !json.contains("choices") || !json["choices"].is_object()) {
    return Status::InvalidInput(
        fmt::format("{}: no object \"choices\" of Linear names and formats", origin));
  }
  std::map<std::string, std::string> choices;
  const std::set<std::string> known(linears.begin(), linears.end());
  for (const auto& [linear, format] : json["choices"].items()) {
    if (!format.is_string())
      return Status::InvalidInput(
          fmt::format("{}: the format of {} is not a string", origin, linear));
    if (!known.count(linear))
      return Status::InvalidInput(fmt::format("{}: the model has no Linear {}", origin, linear));
    choices[linear] = format.get<std::string>();
  }
  for (const std::string& linear : linears) {
    if (!choices.count(linear))
      return Status::InvalidInput(fmt::format("{}: no choice for Linear {}", origin, linear));
  }
  return choices;
}

Result<std::vector<Unit>> UnitsFromJson(const Json& json, const std::string& origin) {
  PQ_ASSIGN_OR_RETURN(const int64_t schema, JsonInt(json, "schema", origin));
  if (schema != 1)
    return Status::InvalidInput(fmt::format("{}: schema {}, expected 1", origin, schema));
  if (!json.contains("units") || !json["units"].is_array()) {
    return Status::InvalidInput(fmt::format("{}: no list \"units\"", origin));
  }
  std::vector<Unit> units;
  std::set<std::string> names;
  for (const Json& entry : json["units"]) {
    Unit unit;
    PQ_ASSIGN_OR_RETURN(
        unit.name, JsonString(entry, "name", fmt::format("{}: unit {}", origin, units.size())));
    const std::string where = fmt::format("{}: unit {}", origin, unit.name);
    if (!names.insert(unit.name).second) return Status::InvalidInput(where + " is listed twice");
    if (entry.contains("weights")) {
      PQ_ASSIGN_OR_RETURN(unit.weights, JsonInt(entry, "weights", where));
      if (unit.weights < 0)
        return Status::InvalidInput(fmt::format("{}: {} weights", where, unit.weights));
    }
    if (!entry.contains("choices") || !entry["choices"].is_array()) {
      return Status::InvalidInput(where + ": no list \"choices\"");
    }
    for (const Json& option : entry["choices"]) {
      Choice choice;
      PQ_ASSIGN_OR_RETURN(choice.format, JsonString(option, "format", where));
      PQ_ASSIGN_OR_RETURN(choice.bytes, JsonInt(option, "bytes", where));
      PQ_ASSIGN_OR_RETURN(choice.cost, JsonDouble(option, "cost", where));
      unit.choices.push_back(std::move(choice));
    }
    units.push_back(std::move(unit));
  }
  return units;
}

Json AllocationToJson(const std::vector<Unit>& units, const Allocation& allocation,
                      const Json& budget) {
  Json choices = Json::object();
  std::map<std::string, int64_t> counts;
  double weights = 0;
  for (size_t i = 0; i < units.size(); ++i) {
    const Choice& choice = units[i].choices[static_cast<size_t>(allocation.choice[i])];
    choices[units[i].name] = choice.format;
    ++counts[choice.format];
    weights += static_cast<double>(units[i].weights);
  }
  Json json = {{"schema", 1},
               {"budget", budget},
               {"bytes", allocation.bytes},
               {"predicted_kl", allocation.cost},
               {"lower_bound", allocation.lower_bound},
               {"gap", allocation.gap()},
               {"slack_bytes", allocation.slack},
               {"price_nats_per_byte", allocation.price},
               {"formats", counts},
               {"choices", choices},
               {"bpp", nullptr}};
  if (weights > 0) json["bpp"] = 8.0 * static_cast<double>(allocation.bytes) / weights;
  return json;
}

}  // namespace prismaquant

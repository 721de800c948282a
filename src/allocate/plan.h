#ifndef PRISMAQUANT_ALLOCATE_PLAN_H_
#define PRISMAQUANT_ALLOCATE_PLAN_H_

// The plan of a model: which format each Linear gets. Between the bare knapsack (allocate.h) and
// the user: units of fused Linears with their costs, rules that pin or forbid formats, budgets in
// bits per parameter, bytes of the checkpoint or of a device, or nats, sweeps over several budgets,
// and the JSON that the allocate command prints and export reads back.

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "allocate/allocate.h"
#include "base/json.h"
#include "base/status.h"

namespace prismaquant {

// Predicted losses, in nats per token of the text, of the captions, and of the MTP head.
struct PartLosses {
  double text = 0, caption = 0, mtp = 0;
};

// One format of a unit: sums over its Linears.
struct UnitFormat {
  std::string format;
  int64_t bytes = 0;          // all tensors
  int64_t payload_bytes = 0;  // codes and group or channel scales: what bpp counts
  double cost = 0;            // what the allocation minimises: the weighted sum of `losses`
  PartLosses losses = {};
};

struct UnitCosts {
  std::string name;
  std::vector<std::string> linears;
  int64_t weights = 0;
  std::vector<UnitFormat> formats;
  // The format that it gets whatever the rules admit; empty: they decide.
  std::string chosen = {};
};

// "REGEX=FORMAT" of --pin and --forbid: ECMAScript, searched in the names of a unit's Linears.
struct FormatRule {
  std::string pattern;
  std::string format;
};
Result<FormatRule> ParseFormatRule(const std::string& option, const std::string& text);

struct PlanRules {
  std::vector<std::string> formats;  // admitted ones
  std::vector<FormatRule> pin, forbid;
};

// A device that is to hold the checkpoint's files and what its server keeps for this load.
struct DeviceBudget {
  int64_t bytes = 0;
  int64_t context = 0, sequences = 1, drafts = 0;
  int64_t kv_cache_bytes = 0, state_bytes = 0;
};

// What the budget is and what it counts.
struct Budget {
  enum class Kind { kBpp, kFileBytes, kDevice, kMaxKl } kind = Kind::kBpp;
  double bpp = 0;
  int64_t file_bytes = 0;
  DeviceBudget device = {};
  double max_kl = 0;  // nats per token of the cost
};
// "23GB" (10^9), "1.5GiB" (2^30), MB, MiB, kB, KiB, or plain bytes.
Result<int64_t> ParseSize(const std::string& option, const std::string& text);

struct PlannedAllocation {
  bool feasible = false;
  Budget budget;
  std::map<std::string, std::string> choices;  // Linear -> format
  double bpp = 0;
  int64_t bytes = 0;       // of the units, all tensors
  int64_t file_bytes = 0;  // of the whole checkpoint
  double cost = 0, lower_bound = 0, price = 0;
  PartLosses losses;
  int64_t slack = 0;                      // in what the budget counts; kMaxKl: 0
  int64_t bytes_bound = 0;                // kMaxKl: no fewer `bytes` meet the budget
  std::map<std::string, int64_t> counts;  // format -> number of Linears
  double smallest_bpp = 0;                // of a sweep: the least budget that is feasible
};

class Planner {
 public:
  // `fixed_bytes`: checkpoint bytes outside the units. A rule that matches nothing, names a
  // format that is not admitted, or leaves a unit without a format is kInvalidInput.
  static Result<Planner> Make(std::vector<UnitCosts> units, const PlanRules& rules,
                              int64_t fixed_bytes);

  // The plan of least cost, or of kMaxKl the one of fewest bytes; an infeasible budget is kUnmet
  // and says the smallest feasible one, with every digit that it takes to be feasible when it is
  // given back.
  Result<PlannedAllocation> Plan(const Budget& budget) const;
  // One plan per bpp; infeasible ones are marked.
  Result<std::vector<PlannedAllocation>> Sweep(const std::vector<double>& bpps) const;
  double SmallestBpp() const;
  // The plan that gives every unit this format (the largest other admitted one where a unit has no
  // such choice).
  Result<PlannedAllocation> Uniform(const std::string& format) const;

 private:
  Result<PlannedAllocation> Smallest(const Budget& budget) const;
  PlannedAllocation Describe(const Budget& budget, const Allocation& allocation) const;
  PlannedAllocation Describe(const std::vector<int>& choice) const;
  // Bytes of the units that the budget leaves, in what it counts.
  int64_t LimitOf(const Budget& budget) const;
  // That the budget cannot be met, where the units take `smallest` bytes at least.
  Status Refusal(const Budget& budget, int64_t smallest) const;
  double BppOf(int64_t payload) const;
  // The most payload bytes whose bpp is not above this one, both rounded to double alike.
  int64_t PayloadWithin(double bpp) const;

  std::vector<UnitCosts> units_;  // formats after the rules
  std::vector<char> counted_;     // per unit: had two formats before the rules, so it counts in bpp
  int64_t counted_weights_ = 0;
  int64_t fixed_bytes_ = 0;
};

// Of a kDevice budget: what neither weights nor caches take.
int64_t FreeDeviceBytes(const PlannedAllocation& plan);

// Index of the knee among the feasible plans, -1 if there is none.
int KneeOf(const std::vector<PlannedAllocation>& sweep);

// The JSON of the allocate command (docs/commands.md).
Json PlanToJson(const PlannedAllocation& plan, const std::vector<PlannedAllocation>& sweep);
// Linear -> format from such a JSON; every Linear of `linears` must be listed and no other.
Result<std::map<std::string, std::string>> ChoicesFromJson(const Json& json,
                                                           const std::string& origin,
                                                           const std::vector<std::string>& linears);

// `allocate --costs`: a table of units and choices made elsewhere, and its solution as JSON.
Result<std::vector<Unit>> UnitsFromJson(const Json& json, const std::string& origin);
// `budget`: {"bytes": N} or {"max_kl": X}.
Json AllocationToJson(const std::vector<Unit>& units, const Allocation& allocation,
                      const Json& budget);

}  // namespace prismaquant

#endif  // PRISMAQUANT_ALLOCATE_PLAN_H_

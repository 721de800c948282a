#ifndef PRISMAQUANT_PROBE_UNIT_COSTS_H_
#define PRISMAQUANT_PROBE_UNIT_COSTS_H_

// From the statistics in the run store to what the allocation chooses among: units of fused
// Linears, each with its admissible formats, bytes and predicted loss (docs/cost-models.md).

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "allocate/plan.h"
#include "base/status.h"
#include "model/model.h"
#include "store/run_store.h"

namespace prismaquant {

enum class CostModel {
  kDirectional,  // 1/2 sum_n (sum over members s_nf)^2 / tokens
  kFisherTrace,  // sum over members of 1/2 (fisher_trace / tokens) mean(dW^2)
};

struct UnitCostOptions {
  CostModel cost = CostModel::kDirectional;
  bool any_kernel = false;  // ignore the shape rules of vLLM's GPU kernels
};

// Units in model order; Linears that the profile keeps unquantized are left out. `tokens`:
// positions with a loss.
Result<std::vector<UnitCosts>> BuildUnitCosts(const Model& model, RunStore& store, int64_t tokens,
                                              const UnitCostOptions& options);

// The same units without a probe: every cost zero. For uniform formats.
std::vector<UnitCosts> UnitsWithoutCosts(const Model& model, bool any_kernel);

// The loss of a whole choice with the cross terms between units, 1/2 sum_n (sum over units s_n)^2 /
// tokens.
Result<double> JointLoss(RunStore& store, int64_t tokens,
                         const std::map<std::string, std::string>& choices);

// The JSON of the probe command (docs/commands.md).
Result<Json> ProbeToJson(const Model& model, RunStore& store, int64_t tokens);

}  // namespace prismaquant

#endif  // PRISMAQUANT_PROBE_UNIT_COSTS_H_

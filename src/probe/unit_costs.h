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
#include "formats/format.h"
#include "model/model.h"
#include "probe/probe.h"
#include "store/run_store.h"

namespace prismaquant {

enum class CostModel {
  kDirectional,  // 1/2 sum_n (sum over members q_nf) / tokens, per part
  kFisherTrace,  // sum over members of 1/2 (fisher_trace / tokens) mean(dW^2)
};

// What a nat of each part counts in the cost that the allocation minimises. A worse MTP head costs
// accepted drafts, not the model's output, so it counts less.
struct PartWeights {
  double text = 1, caption = 1, mtp = 0.1;
};

// Which Linears are allocated, and among which formats.
struct UnitRules {
  bool any_kernel = false;                // ignore the shape rules of vLLM's GPU kernels
  bool vision = false;                    // the vision tower too: images have reached it
  const Format* head = nullptr;           // of the output projection, if it is to be a unit
  std::vector<std::string> formats = {};  // names; empty: all
};

struct UnitCostOptions {
  CostModel cost = CostModel::kDirectional;
  // Of the weights whose errors `directional` prices: kNearest, or kGptq where there is such a cost
  // (not of the output projection, nor of formats without a grid).
  Rounding rounding = Rounding::kNearest;
  PartWeights weights;
  UnitRules rules;
};

// Units in model order; Linears that the profile keeps unquantized are left out. kInvalidInput if
// the store lacks a cost.
Result<std::vector<UnitCosts>> BuildUnitCosts(const Model& model, RunStore& store,
                                              const LossTokens& tokens,
                                              const UnitCostOptions& options);

// The same units without a probe: every cost zero. For uniform formats.
std::vector<UnitCosts> UnitsWithoutCosts(const Model& model, const UnitRules& rules);

// The losses of a whole choice with the cross terms of all errors, 1/2 sum_n (sum over Linears
// s_nf)^2 / tokens.
Result<PartLosses> JointLoss(const Model& model, RunStore& store, const LossTokens& tokens,
                             const std::map<std::string, std::string>& choices,
                             Rounding rounding = Rounding::kNearest);

// Format -> losses of one Linear in it rounded to nearest, for every format that the store prices.
Result<std::map<std::string, PartLosses>> LinearLosses(const Model& model, RunStore& store,
                                                       const LossTokens& tokens,
                                                       const std::string& linear);

// The JSON of the probe command (docs/commands.md).
Result<Json> ProbeToJson(const Model& model, RunStore& store, const LossTokens& tokens);

}  // namespace prismaquant

#endif  // PRISMAQUANT_PROBE_UNIT_COSTS_H_

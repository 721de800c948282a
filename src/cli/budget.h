#ifndef PRISMAQUANT_CLI_BUDGET_H_
#define PRISMAQUANT_CLI_BUDGET_H_

// The options that say how large a plan may be: one budget, and the sweep shown beside it.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "allocate/plan.h"
#include "cli/command.h"
#include "model/cache_memory.h"
#include "model/model.h"
#include "probe/probe.h"

namespace prismaquant {

struct BudgetFlags {
  std::optional<double> bpp;  // the budget if none is given
  std::string size, device_memory;
  ServedLoad load;  // of device_memory
  std::optional<double> max_kl;
  bool knee = false;
  std::vector<double> sweep;

  void Register(CLI::App& command);
  // The options that were given, each with a space before it.
  std::string ToText() const;
};

// The budget that the flags name, 5.5 bpp if none; --knee is left to the sweep. A budget that this
// model or labels of this kind have not is kInvalidInput.
Result<Budget> ToBudget(const BudgetFlags& flags, const Model& model, LabelRule labels);

}  // namespace prismaquant

#endif  // PRISMAQUANT_CLI_BUDGET_H_

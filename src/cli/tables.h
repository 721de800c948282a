#ifndef PRISMAQUANT_CLI_TABLES_H_
#define PRISMAQUANT_CLI_TABLES_H_

// The tables that commands print on standard output.

#include <string>
#include <vector>

#include "allocate/plan.h"
#include "base/progress.h"
#include "evaluate/evaluate.h"
#include "probe/probe.h"

namespace prismaquant {

// "nvfp4 145, fp8 62, bf16 3"
std::string FormatCounts(const std::map<std::string, int64_t>& counts);

// The plan and the sweep around it. With data labels the predicted numbers are called scores.
void PrintPlan(const PlannedAllocation& plan, const std::vector<PlannedAllocation>& sweep,
               LabelRule labels);

// Measured figures; `predicted` nats per token are put beside the KL unless negative.
void PrintEvaluation(const Evaluation& evaluation, double predicted);

void PrintTimes(const std::vector<StageTime>& times);

}  // namespace prismaquant

#endif  // PRISMAQUANT_CLI_TABLES_H_

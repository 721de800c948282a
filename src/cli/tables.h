#ifndef PRISMAQUANT_CLI_TABLES_H_
#define PRISMAQUANT_CLI_TABLES_H_

// The tables that commands print on standard output.

#include <string>
#include <vector>

#include "allocate/plan.h"
#include "cli/session.h"
#include "evaluate/evaluate.h"
#include "export/summary.h"
#include "probe/probe.h"

namespace prismaquant {

// "nvfp4 145, fp8 62, bf16 3"
std::string FormatCounts(const std::map<std::string, int64_t>& counts);

// The plan and the sweep around it. With data labels the predicted numbers are called scores.
void PrintPlan(const PlannedAllocation& plan, const std::vector<PlannedAllocation>& sweep,
               LabelRule labels);
// A plan without costs.
void PrintUniform(const PlannedAllocation& plan);

// Linears, weights and bytes by part and format.
void PrintParts(const CheckpointSummary& summary);
// One row of it: `what` is a part or a layer.
void PrintFormatRow(const std::string& what, const std::string& format, const FormatTotals& totals);

// What the output projection would cost in other formats, as the probe found; that it is tied if it
// is.
Status PrintHeadCosts(Session& session);

// Of a mixture of experts: per layer, how many tokens its experts were rounded for, and how many of
// them were rounded without their inputs because they saw too few. `rendering` as RenderReport.
void PrintExperts(const Model& model, const Json& rendering);

// Measured figures; `predicted` nats per token are put beside the KL unless text is negative.
void PrintEvaluation(const Evaluation& evaluation, const PartLosses& predicted);

}  // namespace prismaquant

#endif  // PRISMAQUANT_CLI_TABLES_H_

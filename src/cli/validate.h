#ifndef PRISMAQUANT_CLI_VALIDATE_H_
#define PRISMAQUANT_CLI_VALIDATE_H_

// Validation: plans are rendered into the run store and their KL on text is measured as they would
// be served, before any checkpoint is written. It shows how far predictions come true, and:
// - --max-kl: chooses the smallest plan that holds the limit. The first is the one that is
//   predicted to; each next one is planned for the limit over what the last one's measured KL was
//   to its objective.
// - --knee: chooses the knee of the measured points.
// - any other budget: its own plan stays.
// A rendering that may yet be chosen stays for the export, the others are dropped. A measured point
// is noted in the store and not measured again.

#include <string>
#include <vector>

#include "base/json.h"
#include "base/status.h"
#include "cli/session.h"
#include "evaluate/kl_meter.h"

namespace prismaquant {

struct ValidatedPlan {
  PlannedAllocation plan;
  std::string rendering;  // its RenderKey
  MeasuredKl measured;
};

struct Validation {
  std::vector<ValidatedPlan> points;  // by size; the budget's own plan is among them
  size_t chosen = 0;
  // Geometric mean of measured / predicted, of the points that lose something.
  double ratio = 1;

  // The "validation" of allocate's JSON.
  Json ToJson() const;
};

// Measures up to `count` plans: for --max-kl one attempt after another, else the budget's own and
// those of the sweep that are nearest to it. kUnmet if no attempt holds --max-kl.
Result<Validation> Validate(Session& session, const Planner& planner, const ChosenPlan& chosen,
                            bool knee, const RenderOptions& options, const TokenWindows& text,
                            int count);

void PrintValidation(const Validation& validation);

}  // namespace prismaquant

#endif  // PRISMAQUANT_CLI_VALIDATE_H_

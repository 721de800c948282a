#include "bench/fidelity/estimators.h"

#include <fmt/format.h>

#include <cmath>

namespace prismaquant {
namespace {

Estimator OfTerm(std::string name, Term term) {
  return {std::move(name),
          [term](const CaseObservations&, const FormatObservations& format, int64_t tokens) {
            return format.Cost(term, tokens);
          }};
}

Estimator OfTerms(std::string name, Term weights, Term inputs) {
  return {
      std::move(name),
      [weights, inputs](const CaseObservations&, const FormatObservations& format, int64_t tokens) {
        return format.Cost(weights, tokens) + format.Cost(inputs, tokens);
      }};
}

// share * rows + (1 - share) * whole
Estimator Mixed(double share) {
  return {fmt::format("{:.2f} rows + {:.2f} directional", share, 1 - share),
          [share](const CaseObservations&, const FormatObservations& format, int64_t tokens) {
            return share * format.Cost(Term::kRows, tokens) +
                   (1 - share) * format.Cost(Term::kWhole, tokens);
          }};
}

Estimator GeometricMean() {
  return {"sqrt(rows * directional)",
          [](const CaseObservations&, const FormatObservations& format, int64_t tokens) {
            return std::sqrt(format.Cost(Term::kRows, tokens) * format.Cost(Term::kWhole, tokens));
          }};
}

Estimator FisherTrace() {
  return {"fisher-trace",
          [](const CaseObservations& one, const FormatObservations& format, int64_t tokens) {
            return 0.5 * one.fisher_trace / static_cast<double>(tokens) * format.weight_mse;
          }};
}

}  // namespace

std::vector<Estimator> AllEstimators() {
  return {OfTerm("directional", Term::kWhole),
          OfTerm("directional, weights alone", Term::kWeights),
          OfTerm("windows of 256", Term::kWhole256),
          OfTerm("windows of 128", Term::kWhole128),
          OfTerm("windows of 64", Term::kWhole64),
          OfTerm("windows of 32", Term::kWhole32),
          OfTerm("windows of 16", Term::kWhole16),
          OfTerm("tokens", Term::kTokens),
          OfTerm("rows", Term::kRows),
          OfTerm("rows, windows of 64", Term::kRows64),
          OfTerm("elements of y", Term::kElements),
          Mixed(0.25),
          Mixed(0.5),
          Mixed(0.75),
          GeometricMean(),
          OfTerms("W rows + x tokens", Term::kWeightRows, Term::kInputTokens),
          OfTerms("W columns + x columns", Term::kWeightColumns, Term::kInputColumns),
          OfTerms("W rows + x columns", Term::kWeightRows, Term::kInputColumns),
          OfTerms("W elements + x tokens", Term::kWeightElements, Term::kInputTokens),
          OfTerms("W elements + x columns", Term::kWeightElements, Term::kInputColumns),
          OfTerms("W elements + x elements", Term::kWeightElements, Term::kInputElements),
          FisherTrace()};
}

}  // namespace prismaquant

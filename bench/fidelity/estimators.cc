#include "bench/fidelity/estimators.h"

#include <fmt/format.h>

#include <cmath>
#include <numeric>

namespace prismaquant {
namespace {

Estimator OfTerm(std::string name, Term term) { return {std::move(name), {{{term}}}}; }

Estimator OfParts(std::string name, Term weights, Term inputs) {
  return {std::move(name), {{{weights}, {inputs}}}};
}

Estimator Mixed(double rows) {
  return {fmt::format("{} rows + {} whole", rows, 1 - rows),
          {{{Term::kRows, rows}, {Term::kWhole, 1 - rows}}}};
}

}  // namespace

double RelativeError(const std::vector<double>& values) {
  const auto count = static_cast<double>(values.size());
  if (values.size() < 2) return 0;
  const double sum = std::accumulate(values.begin(), values.end(), 0.0);
  double squares = 0;
  for (const double value : values) squares += std::pow(value - sum / count, 2);
  return std::sqrt(squares * count / (count - 1)) / sum;
}

Estimate Estimator::Predict(const FormatObservations& format, int64_t tokens) const {
  const double scale = 0.5 / static_cast<double>(tokens);
  double log_kl = 0, error = 0;
  for (const std::vector<WeightedTerm>& sum : sums_) {
    const std::vector<double> values = format.PerSequence(sum);
    log_kl += std::log(scale * std::accumulate(values.begin(), values.end(), 0.0));
    error += RelativeError(values);
  }
  const auto count = static_cast<double>(sums_.size());
  return {.kl = std::exp(log_kl / count), .relative_error = error / count};
}

std::vector<Estimator> AllEstimators() {
  return {OfTerm("whole", Term::kWhole),
          OfTerm("whole, weights alone", Term::kWeights),
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
          {"sqrt(rows * whole)", {{{Term::kRows}}, {{Term::kWhole}}}},
          OfParts("W whole + x whole", Term::kWeights, Term::kInputs),
          OfParts("W rows + x tokens", Term::kWeightRows, Term::kInputTokens),
          OfParts("W columns + x columns", Term::kWeightColumns, Term::kInputColumns),
          OfParts("W elements + x whole", Term::kWeightElements, Term::kInputs),
          OfParts("W elements + x tokens", Term::kWeightElements, Term::kInputTokens),
          OfParts("W elements + x columns", Term::kWeightElements, Term::kInputColumns),
          OfParts("W elements + x elements", Term::kWeightElements, Term::kInputElements),
          OfParts("W tokens' elements + x elements", Term::kWeightTokens, Term::kInputElements),
          OfParts("directional (W rows + x columns)", Term::kWeightRows, Term::kInputColumns),
          OfParts("W rows + x columns apart", Term::kWeightRows, Term::kInputColumnsApart),
          OfTerm("fisher-trace", Term::kFisherTrace)};
}

}  // namespace prismaquant

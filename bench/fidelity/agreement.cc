#include "bench/fidelity/agreement.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace prismaquant {
namespace {

double Mean(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

// Sum of the products of deviations from the means.
double Covariation(const std::vector<double>& a, const std::vector<double>& b) {
  const double mean_a = Mean(a), mean_b = Mean(b);
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += (a[i] - mean_a) * (b[i] - mean_b);
  return sum;
}

double Correlation(const std::vector<double>& a, const std::vector<double>& b) {
  return Covariation(a, b) / std::sqrt(Covariation(a, a) * Covariation(b, b));
}

std::vector<double> Logarithms(std::vector<double> values) {
  for (double& value : values) value = std::log(value);
  return values;
}

}  // namespace

std::vector<double> Ranks(const std::vector<double>& values) {
  std::vector<size_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return values[a] < values[b]; });
  std::vector<double> ranks(values.size());
  for (size_t begin = 0; begin < order.size();) {
    size_t end = begin + 1;
    while (end < order.size() && values[order[end]] == values[order[begin]]) ++end;
    for (size_t i = begin; i < end; ++i) ranks[order[i]] = static_cast<double>(begin + 1 + end) / 2;
    begin = end;
  }
  return ranks;
}

Agreement Compare(const std::vector<double>& predicted, const std::vector<double>& measured) {
  const std::vector<double> log_predicted = Logarithms(predicted);
  const std::vector<double> log_measured = Logarithms(measured);
  std::vector<double> log_ratio;
  for (size_t i = 0; i < predicted.size(); ++i) {
    log_ratio.push_back(log_predicted[i] - log_measured[i]);
  }
  const double variance =
      Covariation(log_ratio, log_ratio) / static_cast<double>(log_ratio.size() - 1);
  return {.rank_correlation = Correlation(Ranks(predicted), Ranks(measured)),
          .log_correlation = Correlation(log_predicted, log_measured),
          .geometric_mean = std::exp(Mean(log_ratio)),
          .spread = std::exp(std::sqrt(variance)),
          .ratio_of_sums = Mean(predicted) / Mean(measured)};
}

}  // namespace prismaquant

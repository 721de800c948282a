#ifndef PRISMAQUANT_BENCH_FIDELITY_ESTIMATORS_H_
#define PRISMAQUANT_BENCH_FIDELITY_ESTIMATORS_H_

// Estimator: a cost model that predicts the KL of a case in a format, nats per token, from what
// backward passes told.

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "bench/fidelity/observations.h"

namespace prismaquant {

// Standard error of the sum of the values, drawn independently, relative to it; 0 for one value.
double RelativeError(const std::vector<double>& values);

struct Estimate {
  double kl = 0;
  double relative_error = 0;  // standard error over the sequences / kl
};

class Estimator {
 public:
  // 1/2 of the weighted sum of terms, summed over the sequences and divided by the tokens; with
  // several such sums their geometric mean.
  Estimator(std::string name, std::vector<std::vector<WeightedTerm>> sums)
      : name_(std::move(name)), sums_(std::move(sums)) {}

  const std::string& name() const { return name_; }
  // `tokens`: positions with a loss.
  Estimate Predict(const FormatObservations& format, int64_t tokens) const;

 private:
  std::string name_;
  std::vector<std::vector<WeightedTerm>> sums_;
};

std::vector<Estimator> AllEstimators();

}  // namespace prismaquant

#endif  // PRISMAQUANT_BENCH_FIDELITY_ESTIMATORS_H_

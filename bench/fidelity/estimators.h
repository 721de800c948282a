#ifndef PRISMAQUANT_BENCH_FIDELITY_ESTIMATORS_H_
#define PRISMAQUANT_BENCH_FIDELITY_ESTIMATORS_H_

// Estimator: a cost model that predicts the KL of a case in a format, nats per token, from what
// backward passes told.

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "bench/fidelity/observations.h"

namespace prismaquant {

struct Estimator {
  std::string name;
  // `tokens`: positions with a loss.
  std::function<double(const CaseObservations& one, const FormatObservations& format,
                       int64_t tokens)>
      predict;
};

std::vector<Estimator> AllEstimators();

}  // namespace prismaquant

#endif  // PRISMAQUANT_BENCH_FIDELITY_ESTIMATORS_H_

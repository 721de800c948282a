#ifndef PRISMAQUANT_BENCH_FIDELITY_AGREEMENT_H_
#define PRISMAQUANT_BENCH_FIDELITY_AGREEMENT_H_

// Agreement: how well predicted numbers agree with measured ones.

#include <vector>

namespace prismaquant {

struct Agreement {
  double rank_correlation = 0;  // Spearman's, ties share their mean rank
  double log_correlation = 0;   // Pearson's of the logarithms
  double geometric_mean = 0;    // of predicted / measured
  double spread = 0;            // exp(standard deviation of log(predicted / measured))
  double ratio_of_sums = 0;     // sum of predicted / sum of measured
};

// Two vectors of one length, at least 2, all positive.
Agreement Compare(const std::vector<double>& predicted, const std::vector<double>& measured);

// The rank of each value, from 1.
std::vector<double> Ranks(const std::vector<double>& values);

}  // namespace prismaquant

#endif  // PRISMAQUANT_BENCH_FIDELITY_AGREEMENT_H_

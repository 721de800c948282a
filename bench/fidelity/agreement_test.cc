#include "bench/fidelity/agreement.h"

#include <gtest/gtest.h>

#include <cmath>

namespace prismaquant {
namespace {

TEST(AgreementTest, TiesShareTheirMeanRank) {
  EXPECT_EQ(Ranks({3, 1, 3, 2, 3}), (std::vector<double>{4, 1, 4, 2, 4}));
}

TEST(AgreementTest, AConstantFactorIsNoSpread) {
  const Agreement found = Compare({2, 20, 8}, {1, 10, 4});
  EXPECT_DOUBLE_EQ(found.rank_correlation, 1);
  EXPECT_DOUBLE_EQ(found.log_correlation, 1);
  EXPECT_NEAR(found.geometric_mean, 2, 1e-12);
  EXPECT_NEAR(found.spread, 1, 1e-7);
  EXPECT_DOUBLE_EQ(found.ratio_of_sums, 2);
}

TEST(AgreementTest, SpreadIsTheFactorOfOneStandardDeviation) {
  const Agreement found = Compare({2, 1, 2, 1}, {1, 2, 4, 8});
  EXPECT_NEAR(found.geometric_mean, 1 / std::sqrt(std::sqrt(16.0)), 1e-12);
  const double deviations[] = {1 + 1, -1 + 1, -1 + 1, -3 + 1};
  double squares = 0;
  for (const double d : deviations) squares += d * d;
  EXPECT_NEAR(found.spread, std::exp2(std::sqrt(squares / 3)), 1e-12);
  EXPECT_NEAR(found.rank_correlation, -1 / std::sqrt(5.0), 1e-12);
  EXPECT_NEAR(found.ratio_of_sums, 6.0 / 15, 1e-12);
}

}  // namespace
}  // namespace prismaquant

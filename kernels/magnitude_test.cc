#include "kernels/magnitude.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <limits>

namespace prismaquant {
namespace {

class LargestMagnitudeTest : public ::testing::TestWithParam<at::ScalarType> {};

TEST_P(LargestMagnitudeTest, IsThatOfLibtorch) {
  for (const int64_t size : {1, 7, 1000, 300'000}) {
    const at::Tensor x = at::randn({size}).to(GetParam());
    EXPECT_EQ(ops::LargestMagnitude(x), x.to(at::kDouble).abs().max().item<double>());
  }
  EXPECT_EQ(ops::LargestMagnitude(at::empty({0, 3}, GetParam())), 0);
}

TEST_P(LargestMagnitudeTest, FindsWhatIsNotFinite) {
  for (const int64_t place : {0, 12'345, 199'999}) {
    at::Tensor x = at::ones({200'000}, GetParam());
    x[place] = -std::numeric_limits<double>::infinity();
    EXPECT_TRUE(std::isinf(ops::LargestMagnitude(x)));
    x[place] = std::nan("");
    EXPECT_TRUE(std::isnan(ops::LargestMagnitude(x)));
  }
}

INSTANTIATE_TEST_SUITE_P(Types, LargestMagnitudeTest,
                         ::testing::Values(at::kFloat, at::kHalf, at::kBFloat16));

TEST(LargestMagnitude, RefusesOtherTensors) {
  EXPECT_THROW(ops::LargestMagnitude(at::ones({2, 3}).t()), c10::Error);
  EXPECT_THROW(ops::LargestMagnitude(at::ones({2}, at::kDouble)), c10::Error);
}

}  // namespace
}  // namespace prismaquant

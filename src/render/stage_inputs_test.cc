#include "render/stage_inputs.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <limits>
#include <vector>

namespace prismaquant {
namespace {

TEST(StageInputs, LinearsThatReadTheSameShareASet) {
  std::vector<LinearInfo> stage(3);
  stage[0].input_group = stage[1].input_group = "a";
  stage[2].input_group = "b";
  const at::Tensor x = torch::randn({4, 8}), y = torch::randn({2, 8}), other = x.clone();
  StageInputs inputs(stage, {{x, x, other}, {y, y, y}});
  EXPECT_EQ(&inputs.of(0), &inputs.of(1));
  EXPECT_NE(&inputs.of(0), &inputs.of(2));
  EXPECT_EQ(inputs.of(0).tokens(), 6);
}

// Of one Linear that reads x.
double RangeOf(const at::Tensor& x, const char* format) {
  std::vector<LinearInfo> stage(1);
  stage[0].input_group = "a";
  return StageInputs(stage, {{x}}).GroupRange("a", *FindFormat(format));
}

TEST(StageInputs, AGroupsScaleReachesBeyondWhatWasSeen) {
  const at::Tensor x = torch::randn({64, 32});
  const double amax = x.abs().max().item<double>();
  EXPECT_DOUBLE_EQ(RangeOf(x, "nvfp4"), 4 * amax);
  EXPECT_DOUBLE_EQ(RangeOf(x, "fp8"), amax);
  EXPECT_EQ(RangeOf(at::zeros({4, 32}), "nvfp4"), 0);
  EXPECT_EQ(RangeOf(at::zeros({0, 32}), "nvfp4"), 0);
  const double largest = std::numeric_limits<float>::max();
  EXPECT_DOUBLE_EQ(RangeOf(at::full({4, 32}, largest / 3), "nvfp4"), largest / 3 * 2);

  // All members of the group count, and tokens that others read too.
  std::vector<LinearInfo> stage(3);
  stage[0].input_group = stage[1].input_group = "a";
  stage[2].input_group = "b";
  StageInputs inputs(stage, {{x, 3 * x, x}, {x, 2 * x, x}});
  EXPECT_NEAR(inputs.GroupRange("a", *FindFormat("nvfp4")), 12 * amax, 1e-5 * amax);
  EXPECT_DOUBLE_EQ(inputs.GroupRange("b", *FindFormat("nvfp4")), 4 * amax);
}

// Group scales are E4M3, whose exponents end at 2^-6: where one token is 2^14.5 times the others,
// theirs have no bit to spare.
TEST(StageInputs, InputsFarApartLeaveNoHeadroom) {
  const auto range = [](double times) {
    at::Tensor x = torch::rand({64, 32}) + 1;
    x[0] *= times;
    return RangeOf(x, "nvfp4") / x.abs().max().item<double>();
  };
  torch::manual_seed(1);
  EXPECT_EQ(range(1000), 4);
  EXPECT_EQ(range(28672 / 1.5), 1);
}

}  // namespace
}  // namespace prismaquant

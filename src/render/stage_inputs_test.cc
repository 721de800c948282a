#include "render/stage_inputs.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

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
  EXPECT_FLOAT_EQ(static_cast<float>(inputs.GroupMaximum("a")),
                  at::cat({x, y}).abs().max().item<float>());
}

}  // namespace
}  // namespace prismaquant

#include "round/scale_sweep.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace prismaquant {
namespace {

constexpr int64_t kOut = 6, kIn = 64, kGroup = 16;

double Nearest(double x) {
  double best = 0;
  for (const double value : {0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0}) {
    if (std::abs(value - std::abs(x)) < std::abs(best - std::abs(x))) best = value;
  }
  return std::copysign(best, x);
}

class ScaleSweepTest : public ::testing::Test {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
    weight_ = torch::randn({kOut, kIn}) * 0.02;
    importance_ = torch::rand({kIn}) + 0.1;
    stored_ = format_.Encode(weight_, {.weight_amax = 0.1, .input_amax = 1}, DType::kBF16);
  }
  double GroupError(const at::Tensor& decoded, int64_t row, int64_t group) const {
    const at::Tensor d = (decoded - weight_)[row].narrow(0, group * kGroup, kGroup);
    return (d.square() * importance_.narrow(0, group * kGroup, kGroup)).sum().item<double>();
  }

  const Format& format_ = *FindFormat("nvfp4");
  at::Tensor weight_, importance_;
  StoredTensors stored_;
};

TEST_F(ScaleSweepTest, TakesTheBestOfTheScalesPerGroup) {
  const at::Tensor before = format_.Decode(stored_);
  SweepScales(weight_, importance_, format_, stored_);
  const at::Tensor after = format_.Decode(stored_);
  const double global = stored_.at("weight_global_scale").item<double>();
  int64_t gained = 0;
  for (int64_t row = 0; row < kOut; ++row) {
    for (int64_t group = 0; group < kIn / kGroup; ++group) {
      double least = GroupError(before, row, group);
      gained += GroupError(after, row, group) < least;
      const at::Tensor w = weight_[row].narrow(0, group * kGroup, kGroup);
      const double ideal = w.abs().max().item<double>() / 6 * global;
      for (int i = 0; i < 32; ++i) {
        const double scale = at::tensor(ideal * (0.5 + i / 31.0))
                                 .to(at::kFloat8_e4m3fn)
                                 .to(at::kFloat)
                                 .item<double>() /
                             global;
        double error = 0;
        for (int64_t j = 0; j < kGroup; ++j) {
          const double x = w[j].item<double>();
          error += std::pow(Nearest(x / scale) * scale - x, 2) *
                   importance_[group * kGroup + j].item<double>();
        }
        least = std::min(least, error);
      }
      EXPECT_NEAR(GroupError(after, row, group) / least, 1, 1e-4) << row << " " << group;
    }
  }
  EXPECT_GT(gained, kOut);
}

TEST_F(ScaleSweepTest, KeepsAGroupThatIsBetterAlready) {
  const at::Tensor exact = format_.Decode(stored_);
  StoredTensors swept = stored_;
  SweepScales(exact, importance_, format_, swept);
  EXPECT_TRUE(swept.at("weight_packed").equal(stored_.at("weight_packed")));
  EXPECT_TRUE(
      swept.at("weight_scale").view(at::kByte).equal(stored_.at("weight_scale").view(at::kByte)));
}

TEST_F(ScaleSweepTest, AGroupOfZerosStaysZero) {
  weight_.narrow(1, 16, 16).zero_();
  stored_ = format_.Encode(weight_, {.weight_amax = 0.1, .input_amax = 1}, DType::kBF16);
  SweepScales(weight_, importance_, format_, stored_);
  const at::Tensor decoded = format_.Decode(stored_);
  EXPECT_EQ(decoded.narrow(1, 16, 16).abs().max().item<float>(), 0);
  EXPECT_TRUE(decoded.isfinite().all().item<bool>());
}

}  // namespace
}  // namespace prismaquant

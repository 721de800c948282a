#include "probe/loss.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <utility>

#include "probe/linear_probe.h"

namespace prismaquant {
namespace {

constexpr int64_t kVocabulary = 11, kHidden = 5;

class PlainHead : public OutputHead {
 public:
  explicit PlainHead(at::Tensor weight) : weight_(std::move(weight)) {}
  at::Tensor Logits(const at::Tensor& hidden) const override {
    return at::linear(hidden.tanh(), weight_);
  }
  int64_t vocab_size() const override { return weight_.size(0); }

 private:
  at::Tensor weight_;
};

PlainHead MakeHead(at::ScalarType type) {
  torch::manual_seed(1);
  return PlainHead(torch::randn({kVocabulary, kHidden}).to(type));
}

std::vector<int32_t> MakeIds(int64_t tokens) {
  std::vector<int32_t> ids;
  for (int64_t t = 0; t < tokens; ++t) ids.push_back(static_cast<int32_t>(t * 7 % kVocabulary));
  return ids;
}

TEST(UniformAt, IsAPureFunctionInTheUnitInterval) {
  double sum = 0, squares = 0;
  constexpr int kDraws = 20000;
  for (int i = 0; i < kDraws; ++i) {
    const double u = UniformAt(3, static_cast<uint64_t>(i / 100), static_cast<uint64_t>(i % 100));
    ASSERT_GE(u, 0);
    ASSERT_LT(u, 1);
    sum += u;
    squares += u * u;
  }
  EXPECT_NEAR(sum / kDraws, 0.5, 0.01);
  EXPECT_NEAR(squares / kDraws, 1.0 / 3, 0.01);
  EXPECT_EQ(UniformAt(1, 2, 3), UniformAt(1, 2, 3));
  EXPECT_NE(UniformAt(1, 2, 3), UniformAt(1, 3, 2));
  EXPECT_NE(UniformAt(1, 2, 3), UniformAt(2, 2, 3));
}

class LossRules : public ::testing::TestWithParam<LabelRule> {};

TEST_P(LossRules, GradientIsThatOfCentralDifferences) {
  const PlainHead head = MakeHead(at::kDouble);
  const std::vector<int32_t> ids = MakeIds(9);
  const at::Tensor hidden = torch::randn({9, kHidden}, at::kDouble);
  const ProbeOptions options{.labels = GetParam(), .seed = 5, .compute = {.dtype = at::kDouble}};
  const SequenceLoss exact = LossAndGradient(head, hidden, ids, 2, options);
  EXPECT_GT(exact.loss, 0);
  // Losses come out in float32: steps and tolerance are wide.
  constexpr double kStep = 1e-2;
  for (int64_t t = 0; t < 9; ++t) {
    for (int64_t i = 0; i < kHidden; ++i) {
      at::Tensor up = hidden.clone(), down = hidden.clone();
      up[t][i] += kStep;
      down[t][i] -= kStep;
      const double slope = (LossAndGradient(head, up, ids, 2, options).loss -
                            LossAndGradient(head, down, ids, 2, options).loss) /
                           (2 * kStep);
      EXPECT_NEAR(exact.gradient[t][i].item<double>(), slope, 2e-3) << t << " " << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Loss, LossRules, ::testing::Values(LabelRule::kSampled, LabelRule::kData));

TEST(Loss, DataLabelsAreTheNextTokensAndSummed) {
  const PlainHead head = MakeHead(at::kFloat);
  const std::vector<int32_t> ids = MakeIds(6);
  const at::Tensor hidden = torch::randn({6, kHidden});
  const SequenceLoss found = LossAndGradient(head, hidden, ids, 0, {.labels = LabelRule::kData});
  const at::Tensor log_probs = at::log_softmax(head.Logits(hidden), -1);
  double expected = 0;
  for (int64_t t = 0; t + 1 < 6; ++t) {
    expected -= log_probs[t][ids[static_cast<size_t>(t) + 1]].item<double>();
  }
  EXPECT_NEAR(found.loss, expected, 1e-5);
  EXPECT_EQ(found.gradient[5].abs().max().item<float>(), 0) << "the last position has no label";
}

TEST(Loss, SampledLabelsDependOnSeedSequenceAndPositionOnly) {
  const PlainHead head = MakeHead(at::kFloat);
  const at::Tensor hidden = torch::randn({40, kHidden});
  const auto gradient = [&](const at::Tensor& x, int64_t sequence, uint64_t seed) {
    const auto ids = MakeIds(x.size(0));
    return LossAndGradient(head, x, ids, sequence, {.seed = seed}).gradient;
  };
  EXPECT_TRUE(gradient(hidden, 1, 0).equal(gradient(hidden, 1, 0)));
  EXPECT_TRUE(
      gradient(hidden, 1, 0).narrow(0, 0, 20).allclose(gradient(hidden.narrow(0, 0, 20), 1, 0)));
  EXPECT_FALSE(gradient(hidden, 1, 0).allclose(gradient(hidden, 2, 0)));
  EXPECT_FALSE(gradient(hidden, 1, 0).allclose(gradient(hidden, 1, 1)));
}

TEST(Loss, SampledLabelsFollowTheModelsDistribution) {
  const PlainHead head = MakeHead(at::kFloat);
  constexpr int64_t kPositions = 8000;
  const at::Tensor row = torch::randn({1, kHidden});
  const SequenceLoss found = LossAndGradient(head, row.repeat({kPositions, 1}), MakeIds(kPositions),
                                             0, {.labels = LabelRule::kSampled});
  const at::Tensor log_probs = at::log_softmax(head.Logits(row), -1);
  const double entropy = -(log_probs.exp() * log_probs).sum().item<double>();
  EXPECT_NEAR(found.loss / kPositions, entropy, 0.04);
  // The expected score is zero.
  EXPECT_LT(found.gradient.mean(0).abs().max().item<double>(), 0.05);
}

class Recorder : public LinearObserver {
 public:
  void Observe(int seen, const at::Tensor& input, const at::Tensor& output_gradient,
               const at::Tensor& input_gradient) override {
    id = seen;
    x = input.clone();
    g = output_gradient.clone();
    dx = input_gradient.clone();
  }
  int id = -1;
  at::Tensor x, g, dx;
};

TEST(LinearProbe, ShowsWhatAutogradComputes) {
  torch::manual_seed(3);
  const at::Tensor weight = torch::randn({4, 6}, at::kDouble),
                   bias = torch::randn({4}, at::kDouble);
  const at::Tensor x = torch::randn({1, 3, 6}, at::kDouble).requires_grad_(true);
  Recorder recorder;
  const at::Tensor y = ApplyProbed(x, weight, bias, 7, recorder);
  EXPECT_TRUE(y.allclose(at::linear(x, weight, bias)));
  const at::Tensor loss = (y.sin() * y).sum();
  const at::Tensor dx = torch::autograd::grad({loss}, {x})[0];

  const at::Tensor plain = x.detach().clone().requires_grad_(true);
  const at::Tensor y_plain = at::linear(plain, weight, bias);
  const auto expected = torch::autograd::grad({(y_plain.sin() * y_plain).sum()}, {plain, y_plain});
  EXPECT_EQ(recorder.id, 7);
  EXPECT_TRUE(dx.allclose(expected[0]));
  EXPECT_TRUE(recorder.dx.allclose(expected[0].flatten(0, 1)));
  EXPECT_TRUE(recorder.g.allclose(expected[1].flatten(0, 1)));
  EXPECT_TRUE(recorder.x.equal(x.detach().flatten(0, 1)));
}

}  // namespace
}  // namespace prismaquant

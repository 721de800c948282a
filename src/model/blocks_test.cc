#include "model/blocks.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <optional>

namespace prismaquant {
namespace {

// Positions of a text: the same in all three rows.
at::Tensor Text(int64_t tokens) { return at::arange(tokens, at::kLong).expand({3, tokens}); }

ModelConfig RotaryConfig() {
  ModelConfig config;
  config.head_dim = 8;
  config.rotary_dim = 4;
  config.rope_theta = 100;
  return config;
}

at::Tensor Double(at::IntArrayRef shape) { return torch::randn(shape, torch::dtype(at::kDouble)); }

TEST(Blocks, NormsDivideByTheRootMeanSquare) {
  const at::Tensor x = torch::tensor({3.0, -4.0}, torch::dtype(at::kDouble));
  const at::Tensor w = torch::tensor({2.0, 0.5}, torch::dtype(at::kDouble));
  const double rms = std::sqrt(12.5);
  EXPECT_NEAR(RmsNorm(x, w, 0)[0].item<double>(), 6 / rms, 1e-15);
  EXPECT_NEAR(RmsNorm(x, w, 0)[1].item<double>(), -2 / rms, 1e-15);
  EXPECT_NEAR(RmsNormPlusOne(x, w, 0)[0].item<double>(), 9 / rms, 1e-15);
  EXPECT_NEAR(RmsNorm(x, w, 100)[0].item<double>(), 6 / std::sqrt(112.5), 1e-15);
  const at::Tensor gate = torch::tensor({0.0, 2.0}, torch::dtype(at::kDouble));
  const at::Tensor gated = GatedRmsNorm(x, w, gate, 0);
  EXPECT_EQ(gated[0].item<double>(), 0);
  EXPECT_NEAR(gated[1].item<double>(), -2 / rms * 2 / (1 + std::exp(-2.0)), 1e-14);
}

TEST(Blocks, HalfPrecisionNormsRoundOnceAfterTheDivision) {
  torch::manual_seed(1);
  const at::Tensor x = torch::randn({4, 64}).to(at::kBFloat16);
  const at::Tensor w = torch::randn({64}).to(at::kBFloat16);
  const at::Tensor wide = x.to(at::kFloat);
  const at::Tensor unit = wide * at::rsqrt(wide.square().mean(-1, true) + 1e-6);
  EXPECT_TRUE(at::equal(RmsNorm(x, w, 1e-6), w * unit.to(at::kBFloat16)));
  EXPECT_TRUE(
      at::equal(RmsNormPlusOne(x, w, 1e-6), (unit * (1.0 + w.to(at::kFloat))).to(at::kBFloat16)));
}

TEST(Blocks, RotaryTurnsPairedHalvesAndLeavesTheRest) {
  const SequenceContext context = RotaryContext(RotaryConfig(), Text(3), {.dtype = at::kDouble});
  ASSERT_EQ(context.cos.sizes(), (std::vector<int64_t>{3, 4}));
  torch::manual_seed(1);
  const at::Tensor x = Double({1, 2, 3, 8});
  const at::Tensor y = ApplyRotary(x, context.cos, context.sin);
  EXPECT_TRUE(at::equal(x.narrow(-1, 4, 4), y.narrow(-1, 4, 4)));
  EXPECT_TRUE(at::equal(x.select(2, 0), y.select(2, 0)));
  const double angle = 2 / std::sqrt(100.0);  // position 2, second pair
  const double a = x[0][1][2][1].item<double>(), b = x[0][1][2][3].item<double>();
  EXPECT_NEAR(y[0][1][2][1].item<double>(), a * std::cos(angle) - b * std::sin(angle), 1e-6);
  EXPECT_NEAR(y[0][1][2][3].item<double>(), b * std::cos(angle) + a * std::sin(angle), 1e-6);
}

TEST(Blocks, Llama3ScalingSlowsLongWavesOnly) {
  ModelConfig config = RotaryConfig();
  config.rotary_dim = 8;
  config.rope_theta = 1e6;
  const ComputeOptions options = {.dtype = at::kDouble};
  const SequenceContext plain = RotaryContext(config, Text(2), options);
  config.rope_scaling = {
      .factor = 8, .low_freq_factor = 1, .high_freq_factor = 4, .original_max_position = 300};
  const SequenceContext scaled = RotaryContext(config, Text(2), options);
  const at::Tensor before = plain.sin[1].asin(), after = scaled.sin[1].asin();
  EXPECT_EQ(after[0].item<double>(), before[0].item<double>());  // wavelength 2 pi < 300 / 4
  // wavelength 2 pi * 1e6^(1/4) = 198.7 between 300 / 4 and 300: blended
  const double smooth = (300 / (2 * M_PI * std::pow(1e6, 0.25)) - 1) / 3;
  EXPECT_NEAR(after[1].item<double>() / before[1].item<double>(), (1 - smooth) / 8 + smooth, 1e-5);
  EXPECT_NEAR(after[3].item<double>() / before[3].item<double>(), 1.0 / 8, 1e-5);
}

TEST(Blocks, LinearScalingSlowsAllWavesButTheLocalOnes) {
  ModelConfig config = RotaryConfig();
  const ComputeOptions options = {.dtype = at::kDouble};
  const SequenceContext plain = RotaryContext(config, Text(3), options);
  EXPECT_FALSE(plain.local_cos.defined());
  config.rope_factor = 2;
  config.local_rope_theta = 100;
  const SequenceContext scaled = RotaryContext(config, Text(3), options);
  EXPECT_TRUE(at::equal(scaled.sin[2], plain.sin[1]));
  EXPECT_TRUE(at::equal(scaled.cos[2], plain.cos[1]));
  EXPECT_TRUE(at::equal(scaled.local_sin, plain.sin));
  EXPECT_TRUE(at::equal(scaled.local_cos, plain.cos));
}

// Four query heads of width 4 share two key-value heads; `unseen` marks the scores left out.
void ExpectSoftmaxAttention(const at::Tensor& unseen, double scale, std::optional<double> given,
                            int64_t window) {
  torch::manual_seed(1);
  const int64_t tokens = unseen.size(0), dim = 4;
  const at::Tensor q = Double({2, 4, tokens, dim}), k = Double({2, 2, tokens, dim}),
                   v = Double({2, 2, tokens, dim});
  const at::Tensor y = CausalAttention(q, k, v, given, window);
  ASSERT_EQ(y.sizes(), (std::vector<int64_t>{2, tokens, 4 * dim}));
  for (int64_t head = 0; head < 4; ++head) {
    const at::Tensor scores = at::matmul(q.select(1, head), k.select(1, head / 2).mT()) * scale;
    const at::Tensor weights = scores.masked_fill(unseen, -INFINITY).softmax(-1);
    const at::Tensor expected = at::matmul(weights, v.select(1, head / 2));
    EXPECT_TRUE(at::allclose(y.narrow(-1, head * dim, dim), expected, 1e-12, 1e-12));
  }
}

TEST(Blocks, AttentionIsCausalSoftmaxWithSharedHeads) {
  const at::Tensor later = at::ones({5, 5}, torch::dtype(at::kBool)).triu(1);
  ExpectSoftmaxAttention(later, 0.5, std::nullopt, 0);
  ExpectSoftmaxAttention(later, 0.3, 0.3, 0);
}

TEST(Blocks, AWindowLimitsWhatAQuerySees) {
  const at::Tensor position = at::arange(6);
  const at::Tensor distance = position.unsqueeze(1) - position;  // [query, key]
  for (const int64_t window : {1, 2, 5, 6, 7}) {
    ExpectSoftmaxAttention(at::logical_or(distance < 0, distance >= window), 0.5, std::nullopt,
                           window);
  }
}

}  // namespace
}  // namespace prismaquant

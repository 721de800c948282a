#include "probe/statistics.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <set>
#include <string>

namespace prismaquant {
namespace {

constexpr int64_t kOut = 6, kIn = 64, kTokens = 9;

struct Sequence {
  at::Tensor x, g;
};

Sequence MakeSequence(int64_t in) {
  return {torch::randn({kTokens, in}), torch::randn({kTokens, kOut})};
}

LinearInfo MakeLinear(int64_t in) {
  LinearInfo linear;
  linear.name = linear.unit = "l.q_proj";
  linear.out = kOut;
  linear.in = in;
  return linear;
}

std::set<std::string> Names(const LinearStatistics& statistics) {
  std::set<std::string> names;
  for (const LinearCost& cost : statistics.Costs()) names.insert(cost.format);
  return names;
}

std::set<std::string> Supporting(int64_t out, int64_t in) {
  std::set<std::string> names;
  for (const Format* format : AllFormats()) {
    if (format->Supports(out, in)) names.emplace(format->name());
  }
  return names;
}

// sum_t g_t . (dW x_t + W dx_t), element by element in float64.
double NaiveDirectional(const at::Tensor& weight, const at::Tensor& weight_error,
                        const at::Tensor& input_error, const Sequence& sequence) {
  double sum = 0;
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t o = 0; o < weight.size(0); ++o) {
      double change = 0;
      for (int64_t i = 0; i < weight.size(1); ++i) {
        change += weight_error[o][i].item<double>() * sequence.x[t][i].item<double>() +
                  weight[o][i].item<double>() * input_error[t][i].item<double>();
      }
      sum += sequence.g[t][o].item<double>() * change;
    }
  }
  return sum;
}

TEST(LinearStatistics, AreTheDefinitionsOfTheCostModels) {
  torch::manual_seed(1);
  const at::Tensor weight = torch::randn({kOut, kIn});
  const SharedScales scales{.weight_amax = weight.abs().max().item<double>() * 1.5,
                            .input_amax = 4};
  LinearStatistics statistics(
      MakeLinear(kIn), weight, scales,
      NearestErrors(MakeLinear(kIn), weight, scales, AllFormats(), at::kFloat), 3);
  StatisticsBuffers buffers;
  const Sequence sequences[] = {MakeSequence(kIn), MakeSequence(kIn), MakeSequence(kIn)};
  double trace = 0, squares = 0;
  int64_t number = 0;
  for (const Sequence& s : sequences) {
    statistics.AddSequence(number++, s.x, s.g, at::matmul(s.g, weight), buffers);
    for (int64_t t = 0; t < kTokens; ++t) {
      const double g2 = s.g[t].square().sum().item<double>();
      trace += g2 * s.x[t].square().sum().item<double>();
      squares += g2;
    }
  }
  const LinearStats stats = statistics.Stats();
  EXPECT_NEAR(stats.fisher_trace, trace, 1e-4 * trace);
  EXPECT_NEAR(stats.grad_square, squares, 1e-5 * squares);
  EXPECT_EQ(stats.tokens, 3 * kTokens);
  EXPECT_FLOAT_EQ(static_cast<float>(stats.weight_amax), weight.abs().max().item<float>());
  EXPECT_TRUE(statistics.TokenWeights()
                  .narrow(0, kTokens, kTokens)
                  .allclose(sequences[1].g.square().sum(-1)));

  for (const LinearCost& cost : statistics.Costs()) {
    const Format& format = *FindFormat(cost.format);
    const StoredTensors stored = format.Encode(weight, scales, DType::kBF16);
    const at::Tensor error =
        cost.format == "bf16" ? at::zeros_like(weight) : format.Decode(stored) - weight;
    EXPECT_NEAR(cost.weight_mse, error.square().mean().item<double>(), 1e-6 * cost.weight_mse);
    ASSERT_EQ(cost.directional.size(), 3U);
    for (size_t n = 0; n < 3; ++n) {
      const at::Tensor input_error =
          format.QuantizeActivation(sequences[n].x, stored) - sequences[n].x;
      const double expected = NaiveDirectional(weight, error, input_error, sequences[n]);
      EXPECT_NEAR(cost.directional[n], expected, 1e-4 * (1 + std::abs(expected))) << cost.format;
    }
  }
  EXPECT_EQ(Names(statistics), Supporting(kOut, kIn));
}

TEST(LinearStatistics, AFormatThatCannotHoldTheWeightHasNoCost) {
  for (const int64_t in : {17, 48}) {
    const at::Tensor weight = torch::randn({kOut, in});
    const SharedScales scales{.weight_amax = 3, .input_amax = 3};
    LinearStatistics statistics(
        MakeLinear(in), weight, scales,
        NearestErrors(MakeLinear(in), weight, scales, AllFormats(), at::kFloat), 1);
    StatisticsBuffers buffers;
    const Sequence s = MakeSequence(in);
    statistics.AddSequence(0, s.x, s.g, at::matmul(s.g, weight), buffers);
    EXPECT_EQ(Names(statistics), Supporting(kOut, in));
    EXPECT_EQ(Names(statistics).contains("nvfp4"), in == 48);
    EXPECT_FALSE(Names(statistics).contains("mxfp8"));
    for (const LinearCost& cost : statistics.Costs()) EXPECT_EQ(cost.directional.size(), 1U);
  }
}

TEST(LinearStatistics, ASequenceThatDidNotReachTheLinearCostsNothing) {
  torch::manual_seed(2);
  const at::Tensor weight = torch::randn({kOut, kIn});
  const std::vector<const Format*> formats = {FindFormat("nvfp4"), FindFormat("bf16")};
  const SharedScales scales{.weight_amax = 3, .input_amax = 3};
  LinearStatistics statistics(MakeLinear(kIn), weight, scales,
                              NearestErrors(MakeLinear(kIn), weight, scales, formats, at::kFloat),
                              3);
  StatisticsBuffers buffers;
  const Sequence s = MakeSequence(kIn);
  statistics.AddSequence(1, s.x, s.g, at::matmul(s.g, weight), buffers);
  EXPECT_EQ(Names(statistics), (std::set<std::string>{"nvfp4", "bf16"}));
  for (const LinearCost& cost : statistics.Costs()) {
    ASSERT_EQ(cost.directional.size(), 3U);
    EXPECT_EQ(cost.directional[0], 0);
    EXPECT_EQ(cost.directional[2], 0);
    EXPECT_EQ(cost.directional[1] != 0, cost.format == "nvfp4");
  }
}

TEST(LinearStatistics, PricesEachHalfWithTheErrorOfTheOther) {
  torch::manual_seed(3);
  const at::Tensor weight = torch::randn({kOut, kIn});
  const SharedScales scales{.weight_amax = 3, .input_amax = 3};
  const Format& format = *FindFormat("int8");  // leaves activations alone
  const std::array<at::Tensor, 2> errors = {torch::randn({kOut, kIn}), torch::randn({kOut, kIn})};
  LinearStatistics statistics(MakeLinear(kIn), weight, scales,
                              {WeightErrors(format, errors[0], errors[1], at::kFloat)}, 4);
  StatisticsBuffers buffers;
  std::vector<Sequence> sequences;
  for (int64_t n = 0; n < 4; ++n) {
    const Sequence s = sequences.emplace_back(MakeSequence(kIn));
    statistics.AddSequence(n, s.x, s.g, at::matmul(s.g, weight), buffers);
  }
  const std::vector<LinearCost> costs = statistics.Costs();
  ASSERT_EQ(costs.size(), 2U);
  EXPECT_EQ(costs[0].rounding, Rounding::kGptq);
  EXPECT_EQ(costs[1].rounding, Rounding::kGptqInSample);
  for (size_t n = 0; n < 4; ++n) {
    const at::Tensor zero = at::zeros_like(sequences[n].x);
    const double fitted = NaiveDirectional(weight, errors[n % 2], zero, sequences[n]);
    const double in_sample = NaiveDirectional(weight, errors[1 - n % 2], zero, sequences[n]);
    EXPECT_NEAR(costs[0].directional[n], fitted, 1e-4 * (1 + std::abs(fitted)));
    EXPECT_NEAR(costs[1].directional[n], in_sample, 1e-4 * (1 + std::abs(in_sample)));
  }
}

TEST(LinearStatistics, AllSequencesAtOnceAreTheSameAsOneByOne) {
  torch::manual_seed(5);
  const at::Tensor weight = torch::randn({kOut, kIn});
  const SharedScales scales{.weight_amax = 3, .input_amax = 3};
  const LinearInfo linear = MakeLinear(kIn);
  const auto errors = NearestErrors(linear, weight, scales, AllFormats(), at::kFloat);
  LinearStatistics one_by_one(linear, weight, scales, errors, 4);
  LinearStatistics at_once(linear, weight, scales, ErrorsToCome(linear, AllFormats()), 4);
  StatisticsBuffers buffers;
  std::vector<SequenceRows> rows;
  std::vector<at::Tensor> inputs;
  for (const int64_t n : {0, 2, 3}) {  // one sequence does not reach the Linear
    const Sequence s = MakeSequence(kIn);
    rows.push_back({n, s.x, s.g});
    inputs.push_back(s.x);
    one_by_one.AddSequence(n, s.x, s.g, at::matmul(s.g, weight), buffers);
  }
  at_once.AddSequences(rows, at::cat(inputs), weight, errors, buffers);
  const std::vector<LinearCost> expected = one_by_one.Costs(), costs = at_once.Costs();
  ASSERT_EQ(costs.size(), expected.size());
  for (size_t f = 0; f < costs.size(); ++f) {
    EXPECT_EQ(costs[f].format, expected[f].format);
    EXPECT_EQ(costs[f].rounding, expected[f].rounding);
    EXPECT_EQ(costs[f].weight_mse, expected[f].weight_mse);
    for (size_t n = 0; n < 4; ++n) {
      const double scale = std::sqrt(expected[f].squares[n]);
      EXPECT_NEAR(costs[f].directional[n], expected[f].directional[n], 1e-5 * scale);
      EXPECT_NEAR(costs[f].squares[n], expected[f].squares[n], 1e-5 * expected[f].squares[n]);
    }
  }
  EXPECT_EQ(at_once.Stats().tokens, 3 * kTokens);
  EXPECT_NEAR(at_once.Stats().fisher_trace / one_by_one.Stats().fisher_trace, 1, 1e-5);
}

TEST(LinearStatistics, WithoutTokensTheWeightsErrorIsKnown) {
  const at::Tensor weight = torch::randn({kOut, kIn});
  const SharedScales scales{.weight_amax = 3, .input_amax = 3};
  const LinearInfo linear = MakeLinear(kIn);
  const std::vector<const Format*> formats = {FindFormat("nvfp4")};
  const auto errors = NearestErrors(linear, weight, scales, formats, at::kFloat);
  LinearStatistics statistics(linear, weight, scales, ErrorsToCome(linear, formats), 2);
  StatisticsBuffers buffers;
  statistics.AddSequences({}, {}, weight, errors, buffers);
  ASSERT_EQ(statistics.Costs().size(), 1U);
  EXPECT_EQ(statistics.Costs()[0].weight_mse, errors[0].mean_square);
  EXPECT_EQ(statistics.Costs()[0].directional, (std::vector<double>{0, 0}));
}

TEST(ActivationErrors, AreThoseOfTheLastInput) {
  const at::Tensor first = torch::randn({3, 32}), second = torch::randn({3, 32});
  const Format& fp8 = *FindFormat("fp8");
  ActivationErrors activations;
  for (const at::Tensor& x : {first, second, first}) {
    EXPECT_TRUE(activations.SetInput(x).equal(x));
    EXPECT_TRUE(activations.SetInput(x.view({3, 32})).equal(x));
    const at::Tensor expected = fp8.QuantizeActivation(x, SharedScales()) - x;
    EXPECT_TRUE(activations.Error(fp8, {}).equal(expected));
    EXPECT_TRUE(activations.Error(fp8, {}).equal(expected));
  }
}

TEST(LinearStatistics, OfABfloat16ModelAreWithinItsRounding) {
  torch::manual_seed(4);
  const int64_t out = 256, in = 512, tokens = 64;
  const at::Tensor weight = torch::randn({out, in}).to(at::kBFloat16);
  const SharedScales scales{.weight_amax = 5, .input_amax = 5};
  const LinearInfo linear = MakeLinear(in);
  const std::vector<const Format*> formats = {FindFormat("nvfp4"), FindFormat("fp8")};
  const at::Tensor x = torch::randn({tokens, in}).to(at::kBFloat16);
  const at::Tensor g = torch::randn({tokens, out}).to(at::kBFloat16);
  std::vector<LinearCost> costs[2];
  for (const bool narrow : {false, true}) {
    const at::ScalarType type = narrow ? at::kBFloat16 : at::kFloat;
    LinearStatistics statistics(linear, weight, scales,
                                NearestErrors(linear, weight, scales, formats, ProductType(type)),
                                1);
    StatisticsBuffers buffers;
    statistics.AddSequence(0, x.to(type), g.to(type),
                           at::matmul(g.to(at::kFloat), weight.to(at::kFloat)), buffers);
    costs[narrow ? 1 : 0] = statistics.Costs();
  }
  ASSERT_EQ(costs[0].size(), formats.size());
  for (size_t f = 0; f < formats.size(); ++f) {
    const LinearCost &wide = costs[0][f], &narrow = costs[1][f];
    EXPECT_EQ(narrow.weight_mse, wide.weight_mse);
    // Of a sum of independent parts, the roundings average out.
    EXPECT_NEAR(narrow.squares[0] / wide.squares[0], 1, 0x1.0p-9);
    EXPECT_NEAR(narrow.directional[0], wide.directional[0], 0x1.0p-9 * std::sqrt(wide.squares[0]));
  }
}

TEST(LinearStatistics, AnUnquantizedLinearHasStatisticsButNoCosts) {
  LinearInfo linear = MakeLinear(kIn);
  linear.allocatable = false;
  const at::Tensor weight = torch::randn({kOut, kIn});
  const SharedScales scales{.weight_amax = 3, .input_amax = 3};
  LinearStatistics statistics(linear, weight, scales,
                              NearestErrors(linear, weight, scales, AllFormats(), at::kFloat), 1);
  StatisticsBuffers buffers;
  const Sequence s = MakeSequence(kIn);
  statistics.AddSequence(0, s.x, s.g, at::matmul(s.g, weight), buffers);
  EXPECT_TRUE(statistics.Costs().empty());
  EXPECT_GT(statistics.Stats().fisher_trace, 0);
}

}  // namespace
}  // namespace prismaquant

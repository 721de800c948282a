#include "round/gptq.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace prismaquant {
namespace {

const std::vector<std::string> kGridFormats = {"nvfp4", "fp8", "mxfp8"};

double Amax(const at::Tensor& x) { return x.abs().max().to(at::kDouble).item<double>(); }
SharedScales ScalesOf(const at::Tensor& weight) {
  return {.weight_amax = Amax(weight), .input_amax = 4};
}

at::Tensor Weight(int64_t out, int64_t in) {
  torch::manual_seed(in);
  return torch::randn({out, in}) * 0.02;
}

// Inputs whose columns have common factors and different sizes.
at::Tensor CorrelatedInputs(int64_t tokens, int64_t in, int64_t seed) {
  torch::manual_seed(7);
  const at::Tensor mixing = torch::randn({8, in});
  const at::Tensor size = torch::rand({in}) + 0.2;
  torch::manual_seed(seed);
  return (torch::randn({tokens, 8}).matmul(mixing) + 0.5 * torch::randn({tokens, in})) * size;
}

InputMoments MomentsOf(const at::Tensor& x) {
  InputMoments moments(x.size(1));
  moments.Add(x, {});
  return moments;
}
InputRows RowsOf(const at::Tensor& x, const at::Tensor& lack = {}) {
  InputRows rows;
  rows.Add(x, {}, lack);
  return rows;
}
at::Tensor Gram(const at::Tensor& x) { return x.t().matmul(x); }
at::Tensor CorrelatedHessian(int64_t in) { return Gram(CorrelatedInputs(1024, in, 1)); }

double ExactError(const at::Tensor& decoded, const at::Tensor& weight, const at::Tensor& hessian) {
  const at::Tensor d = decoded.to(at::kDouble) - weight.to(at::kDouble);
  return d.matmul(hessian.to(at::kDouble)).mul(d).sum().item<double>();
}

bool SameStored(const StoredTensors& a, const StoredTensors& b) {
  if (a.size() != b.size()) return false;
  for (const auto& [suffix, tensor] : a) {
    const auto other = b.find(suffix);
    if (other == b.end() || tensor.sizes() != other->second.sizes()) return false;
    const at::Tensor x = tensor.contiguous().view(at::kByte);
    if (!x.equal(other->second.contiguous().view(at::kByte))) return false;
  }
  return true;
}

int64_t DifferentBytes(const StoredTensors& a, const StoredTensors& b) {
  int64_t count = 0;
  for (const auto& [suffix, tensor] : a) {
    count += tensor.contiguous()
                 .view(at::kByte)
                 .ne(b.at(suffix).contiguous().view(at::kByte))
                 .sum()
                 .item<int64_t>();
  }
  return count;
}

// GPTQ as the paper has it, one column after the other over the whole row, in float64.
class Reference {
 public:
  Reference(const Format& format, bool choose_scales, const SharedScales& shared)
      : grid_(format.grid()), choose_scales_(choose_scales) {
    for (int code = 0; code < 127; ++code) {
      const int exponent = code / 8, mantissa = code % 8;
      e4m3_.push_back(exponent == 0 ? std::ldexp(mantissa, -9)
                                    : std::ldexp(8 + mantissa, exponent - 10));
    }
    values_ = grid_ == Grid::kE2M1Group16 ? std::vector<double>{0, 0.5, 1, 1.5, 2, 3, 4, 6} : e4m3_;
    global_ = 2688 / shared.weight_amax;
  }

  at::Tensor Round(const at::Tensor& weight, const at::Tensor& hessian, double damping) {
    const at::Tensor order = Order(hessian);
    at::Tensor h = hessian.to(at::kDouble).index_select(0, order).index_select(1, order);
    h.diagonal().add_(damping * h.diagonal().mean().item<double>());
    const at::Tensor u = at::linalg_cholesky(at::linalg_inv(h), /*upper=*/true).contiguous();
    at::Tensor w = weight.to(at::kDouble).index_select(1, order).contiguous();
    for (int64_t r = 0; r < w.size(0); ++r) {
      RoundRow(w.mutable_data_ptr<double>() + r * w.size(1), u.const_data_ptr<double>(), w.size(1));
    }
    at::Tensor rounded = at::empty_like(w);
    rounded.index_copy_(1, order, w);
    return rounded;
  }

 private:
  // Whole groups, that with the largest diagonal first.
  at::Tensor Order(const at::Tensor& hessian) const {
    const int64_t group = grid_ == Grid::kE2M1Group16 ? 16 : grid_ == Grid::kE4M3Group32 ? 32 : 1;
    std::vector<std::pair<float, int64_t>> groups;
    for (int64_t first = 0; first < hessian.size(0); first += group) {
      const at::Tensor diagonal = hessian.diagonal().narrow(0, first, group);
      groups.emplace_back(-diagonal.sum().item<float>(), first);
    }
    std::stable_sort(groups.begin(), groups.end());
    std::vector<int64_t> columns;
    for (const auto& [importance, first] : groups) {
      for (int64_t i = 0; i < group; ++i) columns.push_back(first + i);
    }
    return at::tensor(columns);
  }

  static double Nearest(const std::vector<double>& values, double x) {
    double best = values.front();
    for (const double value : values) {
      if (std::abs(value - std::abs(x)) < std::abs(best - std::abs(x))) best = value;
    }
    return std::copysign(best, x);
  }

  static double Largest(const double* w, int64_t n) {
    double largest = 0;
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::abs(w[i]));
    return largest;
  }

  double GroupScale(const double* w, const double* u, int64_t first, int64_t in) const {
    if (grid_ == Grid::kE4M3Row) return Largest(w, in) / 448;
    const int64_t group = grid_ == Grid::kE2M1Group16 ? 16 : 32;
    const double largest = Largest(w, group);
    std::vector<double> candidates;
    if (grid_ == Grid::kE4M3Group32) {
      int exponent = 0;
      const double fraction = std::frexp(largest, &exponent);
      const double rule = std::ldexp(1, exponent - 1 + (fraction >= 0.875 ? 1 : 0) - 8);
      candidates = {rule};
      if (choose_scales_) candidates = {rule, rule / 2, rule * 2};
    } else {
      const double ideal = global_ * largest / 6;
      candidates = {Nearest(e4m3_, ideal) / global_};
      const auto lowest = std::find(e4m3_.begin(), e4m3_.end(), Nearest(e4m3_, ideal / 2));
      for (auto scale = lowest; choose_scales_ && scale != e4m3_.end(); ++scale) {
        if (scale - lowest < 16 && *scale > 0) candidates.push_back(*scale / global_);
      }
    }
    double best = candidates.front(), least = std::numeric_limits<double>::infinity();
    for (const double scale : candidates) {
      const double error =
          RolledError(std::vector<double>(w, w + group), u + first * (in + 1), in, scale);
      if (error < least) std::tie(best, least) = std::make_pair(scale, error);
    }
    return best;
  }

  // What rounding the group column by column under the scale would leave.
  double RolledError(std::vector<double> w, const double* u, int64_t in, double scale) const {
    const auto group = static_cast<int64_t>(w.size());
    double error = 0;
    for (int64_t j = 0; j < group; ++j) {
      const double spread = (w[j] - Nearest(values_, w[j] / scale) * scale) / u[j * in + j];
      error += spread * spread;
      for (int64_t k = j + 1; k < group; ++k) w[k] -= spread * u[j * in + k];
    }
    return error;
  }

  void RoundRow(double* w, const double* u, int64_t in) const {
    const int64_t group = grid_ == Grid::kE2M1Group16 ? 16 : grid_ == Grid::kE4M3Group32 ? 32 : in;
    double scale = 1;
    for (int64_t j = 0; j < in; ++j) {
      if (j % group == 0) scale = GroupScale(w + j, u, j, in);
      const double rounded = Nearest(values_, w[j] / scale) * scale;
      const double error = (w[j] - rounded) / u[j * in + j];
      w[j] = rounded;
      for (int64_t k = j + 1; k < in; ++k) w[k] -= error * u[j * in + k];
    }
  }

  Grid grid_;
  bool choose_scales_;
  double global_ = 1;
  std::vector<double> e4m3_, values_;
};

TEST(InputMoments, SumsOverBlocksOfTokensAndCalls) {
  torch::manual_seed(3);
  const at::Tensor x = torch::randn({9001, 24});
  InputMoments hessian(24);
  hessian.Add(x.narrow(0, 0, 1), {});
  hessian.Add(x.narrow(0, 1, 9000), {});
  EXPECT_EQ(hessian.tokens(), 9001);
  EXPECT_EQ(hessian.hessian().scalar_type(), at::kFloat);
  const at::Tensor expected = Gram(x.to(at::kDouble));
  EXPECT_LT(Amax(hessian.hessian() - expected), 1e-5 * Amax(expected));
  EXPECT_LT(Amax(hessian.hessian() - hessian.hessian().t()), 1e-6 * Amax(expected));
}

TEST(InputMoments, OfMoreInputsThanABlockHasRowsAreSymmetric) {
  const at::Tensor x = at::randn({40, kUpperProductRows + 70});
  InputMoments moments(x.size(1));
  moments.Add(x, {});
  const at::Tensor exact = at::matmul(x.t().to(at::kDouble), x.to(at::kDouble));
  EXPECT_TRUE(at::allclose(moments.hessian().to(at::kDouble), exact, 1e-5, 1e-4));
  EXPECT_TRUE(at::equal(moments.hessian(), moments.hessian().t()));
}

TEST(InputMoments, WeightsTokens) {
  torch::manual_seed(4);
  const at::Tensor x = torch::randn({5000, 12});
  const at::Tensor weights = torch::rand({5000}) * (torch::rand({5000}) > 0.5).to(at::kFloat);
  InputMoments weighted(12), plain(12), ones(12);
  weighted.Add(x, weights);
  plain.Add(x, {});
  ones.Add(x, torch::ones({5000}));
  const at::Tensor d = x.to(at::kDouble);
  const at::Tensor expected = (d * weights.to(at::kDouble).unsqueeze(1)).t().matmul(d);
  EXPECT_LT(Amax(weighted.hessian() - expected), 1e-5 * Amax(expected));
  EXPECT_TRUE(ones.hessian().equal(plain.hessian()));
}

TEST(InputMoments, OfBfloat16InputsAreWithinItsRoundingAndStartAtZero) {
  torch::manual_seed(5);
  const at::Tensor x = torch::randn({9000, 24}).to(at::kBFloat16);
  InputMoments narrow(24), wide(24);
  EXPECT_EQ(Amax(narrow.hessian()), 0);
  EXPECT_EQ(narrow.tokens(), 0);
  narrow.Add(x, {});
  wide.Add(x.to(at::kFloat), {});
  EXPECT_EQ(narrow.hessian().scalar_type(), at::kFloat);
  const at::Tensor diagonal = wide.hessian().diagonal().sqrt();
  const at::Tensor error =
      (narrow.hessian() - wide.hessian()) / (diagonal.unsqueeze(0) * diagonal.unsqueeze(1));
  EXPECT_LT(Amax(error), 0x1.0p-8);
  EXPECT_TRUE(narrow.hessian().equal(narrow.hessian().t()));
}

class RenderGptqTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { at::set_num_threads(1); }
  const Format& format() const { return *FindFormat(GetParam()); }
  GptqResult Render(const at::Tensor& weight, const at::Tensor& hessian, GptqOptions options = {},
                    DType source = DType::kBF16, const RowFeedback& rows = {}) {
    Result<GptqResult> result =
        RenderGptq(format(), weight, FactorHessian(format(), hessian, options), ScalesOf(weight),
                   source, options, rows);
    EXPECT_TRUE(result.ok()) << result.status().message();
    const Status checked =
        CheckStored(format(), result->stored, weight.size(0), weight.size(1), source);
    EXPECT_TRUE(checked.ok()) << checked.message();
    EXPECT_TRUE(format().Decode(result->stored).equal(result->decoded));
    EXPECT_TRUE(result->decoded.isfinite().all().item<bool>());
    return std::move(result).value();
  }
  StoredTensors Nearest(const at::Tensor& weight) const {
    return format().Encode(weight, ScalesOf(weight), DType::kBF16);
  }
  double NearestError(const at::Tensor& weight, const at::Tensor& hessian) const {
    return ExactError(format().Decode(Nearest(weight)), weight, hessian);
  }
};
INSTANTIATE_TEST_SUITE_P(Formats, RenderGptqTest, ::testing::ValuesIn(kGridFormats));

TEST_P(RenderGptqTest, ErrorIsThatOfTheUnblockedRecursion) {
  for (const int64_t in : {32, 128, 160, 288}) {
    const at::Tensor weight = Weight(16, in);
    const at::Tensor hessian = CorrelatedHessian(in);
    for (const bool choose_scales : {false, true}) {
      const GptqOptions options{.damping = 0.1, .choose_scales = choose_scales};
      const GptqResult result = Render(weight, hessian, options, DType::kF32);
      Reference reference(format(), choose_scales, ScalesOf(weight));
      const double expected =
          ExactError(reference.Round(weight, hessian, options.damping), weight, hessian);
      EXPECT_NEAR(ExactError(result.decoded, weight, hessian) / expected, 1, 0.03)
          << in << " columns, scale choice " << choose_scales;
    }
  }
}

// tr(K D H D^T) for K = 3 I + F F^T, rows rounded one after the other for what those before them
// left, as the dense factor of K has it.
TEST_P(RenderGptqTest, RowsMakeUpForEachOther) {
  const int64_t out = 200, in = 160;
  const at::Tensor weight = Weight(out, in), hessian = CorrelatedHessian(in);
  torch::manual_seed(4);
  const at::Tensor factor = 1.5 * torch::randn({out, 6});
  const at::Tensor wide = factor.to(at::kDouble);
  const at::Tensor k = 3 * at::eye(out, at::kDouble) + wide.matmul(wide.t());
  const auto error = [&](const at::Tensor& decoded) {
    const at::Tensor d = decoded.to(at::kDouble) - weight.to(at::kDouble);
    return k.matmul(d).matmul(hessian.to(at::kDouble)).mul(d).sum().item<double>();
  };
  const GptqOptions options{.damping = 0.1};
  const double alone = error(Render(weight, hessian, options, DType::kF32).decoded);
  const GptqResult result = Render(weight, hessian, options, DType::kF32, RowFeedback(factor));
  EXPECT_FALSE(result.fell_back);

  const at::Tensor r = at::linalg_cholesky(k.flip({0, 1})).flip({0, 1});
  Reference reference(format(), true, ScalesOf(weight));
  at::Tensor rounded = at::empty_like(weight, at::kDouble);
  const at::Tensor exact = weight.to(at::kDouble);
  for (int64_t row = 0; row < out; ++row) {
    const at::Tensor before = r.select(1, row).narrow(0, 0, row) / r[row][row];
    const at::Tensor lacks = (exact - rounded).narrow(0, 0, row);
    const at::Tensor aim = exact[row] + before.matmul(lacks);
    rounded[row] = reference.Round(aim.unsqueeze(0), hessian, options.damping)[0];
  }
  const double expected = error(rounded);
  EXPECT_LT(expected, 0.75 * alone);
  EXPECT_LT(error(result.decoded), alone - 0.75 * (alone - expected));
}

TEST_P(RenderGptqTest, BeatsRoundToNearestOnCorrelatedInputs) {
  const at::Tensor weight = Weight(48, 288);
  const at::Tensor unseen = Gram(CorrelatedInputs(1024, 288, 2));
  for (const bool choose_scales : {false, true}) {
    const GptqResult result =
        Render(weight, CorrelatedHessian(288), {.damping = 0.1, .choose_scales = choose_scales});
    EXPECT_FALSE(result.fell_back);
    EXPECT_LT(ExactError(result.decoded, weight, unseen), 0.7 * NearestError(weight, unseen));
  }
}

TEST_P(RenderGptqTest, WidthsThatAreNoMultipleOfTheBlock) {
  for (const int64_t in : {16, 144, 160, 272, 5}) {
    if (!format().Supports(8, in)) continue;
    const at::Tensor weight = Weight(8, in);
    const at::Tensor hessian = CorrelatedHessian(in);
    const GptqResult result = Render(weight, hessian);
    EXPECT_FALSE(result.fell_back);
    EXPECT_LT(ExactError(result.decoded, weight, hessian), NearestError(weight, hessian)) << in;
  }
}

TEST_P(RenderGptqTest, DiagonalHessianWithoutScaleChoiceRoundsToNearest) {
  at::Tensor weight = Weight(24, 160);
  weight[3] = 0;
  weight[4] *= 1e-12;
  weight.narrow(0, 5, 1).narrow(1, 32, 32).zero_();
  torch::manual_seed(9);
  const at::Tensor hessian = torch::diag(torch::rand({160}) + 0.1);
  const GptqResult result = Render(weight, hessian, {.choose_scales = false});
  EXPECT_FALSE(result.fell_back);
  EXPECT_TRUE(result.decoded.equal(format().Decode(Nearest(weight))));
  for (const char* scale : {"weight_scale", "weight_global_scale", "input_global_scale"}) {
    const auto nearest = Nearest(weight);
    if (nearest.count(scale) == 0) continue;
    EXPECT_TRUE(result.stored.at(scale).view(at::kByte).equal(nearest.at(scale).view(at::kByte)));
  }
}

TEST_P(RenderGptqTest, TheScaleOfTheHessianDoesNotMatter) {
  const at::Tensor weight = Weight(16, 160);
  at::Tensor hessian = CorrelatedHessian(160);
  for (const int64_t dead : {0, 3, 64, 65, 159}) {
    hessian.select(0, dead).zero_();
    hessian.select(1, dead).zero_();
  }
  const GptqResult expected = Render(weight, hessian);
  for (const int power : {-100, -40, -2, 40, 90}) {
    const GptqResult scaled = Render(weight, hessian * std::ldexp(1.0, power));
    EXPECT_TRUE(SameStored(scaled.stored, expected.stored)) << "2^" << power;
  }
}

TEST_P(RenderGptqTest, DeadColumnsAreRoundedToNearestAndCostTheOthersNothing) {
  const at::Tensor weight = Weight(16, 160);
  at::Tensor x = CorrelatedInputs(1024, 160, 1);
  x.narrow(1, 32, 64).zero_();
  const at::Tensor hessian = Gram(x);
  const GptqResult result = Render(weight, hessian, {.damping = 0.1, .choose_scales = false});
  EXPECT_FALSE(result.fell_back);
  const at::Tensor nearest = format().Decode(Nearest(weight));
  EXPECT_TRUE(result.decoded.narrow(1, 32, 64).equal(nearest.narrow(1, 32, 64)));
  EXPECT_LT(ExactError(result.decoded, weight, hessian), 0.8 * NearestError(weight, hessian));
}

TEST_P(RenderGptqTest, SingularHessians) {
  const at::Tensor weight = Weight(16, 160);
  for (const int64_t rank : {1, 3}) {
    const at::Tensor hessian = Gram(CorrelatedInputs(rank, 160, 1));
    for (const double damping : {0.0, 1e-12, 0.01, 0.3}) {
      const GptqResult result = Render(weight, hessian, {.damping = damping});
      EXPECT_FALSE(result.fell_back);
      EXPECT_LT(ExactError(result.decoded, weight, hessian), NearestError(weight, hessian))
          << rank << " tokens, damping " << damping;
    }
  }
}

TEST_P(RenderGptqTest, HessiansWithoutAFactorGiveRoundToNearest) {
  const at::Tensor weight = Weight(16, 160);
  const at::Tensor good = CorrelatedHessian(160);
  std::vector<at::Tensor> bad = {at::zeros_like(good), -good};
  for (const float poison :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    for (const std::pair<int64_t, int64_t> at : {std::pair{0, 0}, {159, 159}, {3, 90}, {90, 3}}) {
      bad.push_back(good.clone());
      bad.back()[at.first][at.second] = poison;
    }
  }
  for (const at::Tensor& hessian : bad) {
    const GptqResult result = Render(weight, hessian);
    EXPECT_TRUE(result.fell_back);
    EXPECT_EQ(result.error_ratio, 1);
    EXPECT_TRUE(SameStored(result.stored, Nearest(weight)));
  }
}

TEST_P(RenderGptqTest, IndefiniteHessianIsDampedUntilItHasAFactor) {
  const at::Tensor weight = Weight(16, 160);
  at::Tensor hessian = CorrelatedHessian(160);
  hessian.diagonal().mul_(0.05);
  ASSERT_LT(torch::linalg_eigvalsh(hessian).min().item<float>(), 0);
  const GptqResult result = Render(weight, hessian);
  EXPECT_LT(ExactError(result.decoded, weight, at::eye(160)),
            1.5 * NearestError(weight, at::eye(160)));
}

TEST_P(RenderGptqTest, ExtremeWeights) {
  const at::Tensor hessian = CorrelatedHessian(160);
  for (const double size : {1e-37, 1e-20, 1e20, 1e36}) {
    const at::Tensor weight = Weight(16, 160) * size;
    const GptqResult result = Render(weight, hessian);
    EXPECT_LE((result.decoded.to(at::kDouble) - weight.to(at::kDouble)).abs().max().item<double>(),
              Amax(weight))
        << size;
  }
  EXPECT_EQ(Amax(Render(at::zeros({16, 160}), hessian).decoded), 0);
  at::Tensor outlier = Weight(16, 160);
  outlier[2][77] = 1e5;
  const GptqResult result = Render(outlier, hessian);
  EXPECT_NEAR(result.decoded[2][77].item<double>(), 1e5, 6000);
}

TEST_P(RenderGptqTest, RepeatedRunsAndOtherThreadCounts) {
  const at::Tensor weight = Weight(64, 416);
  const at::Tensor hessian = CorrelatedHessian(416);
  const GptqResult one = Render(weight, hessian);
  EXPECT_TRUE(SameStored(one.stored, Render(weight, hessian).stored));
  at::set_num_threads(2);
  const GptqResult two = Render(weight, hessian);
  EXPECT_TRUE(SameStored(two.stored, Render(weight, hessian).stored));
  EXPECT_LT(DifferentBytes(one.stored, two.stored), weight.numel() / 50);
  EXPECT_NEAR(ExactError(one.decoded, weight, hessian) / ExactError(two.decoded, weight, hessian),
              1, 0.01);
}

TEST_P(RenderGptqTest, GuardKeepsWhatIsBetterOnTheHeldOutInputs) {
  const at::Tensor weight = Weight(32, 160), inputs = CorrelatedInputs(1024, 160, 1);
  const at::Tensor train = Gram(inputs);
  const auto judged = [&](const RoundingJudge& judge) {
    const GptqOptions options{.damping = 0.01};
    return *RenderGuarded(format(), weight, weight,
                          FactorHessian(format(), MomentsOf(inputs).hessian(), options), judge,
                          ScalesOf(weight), DType::kBF16, options);
  };
  const auto guarded = [&](const at::Tensor& held_out) { return judged(RowsOf(held_out)); };
  const GptqResult plain = Render(weight, train, {.damping = 0.01});

  const at::Tensor alike = CorrelatedInputs(128, 160, 2);
  const GptqResult kept = guarded(alike);
  EXPECT_FALSE(kept.fell_back);
  EXPECT_TRUE(SameStored(kept.stored, plain.stored));
  EXPECT_NEAR(kept.error_ratio,
              ExactError(plain.decoded, weight, Gram(alike)) / NearestError(weight, Gram(alike)),
              1e-3);
  EXPECT_LT(kept.error_ratio, 0.7);
  EXPECT_EQ(kept.weight_ratio, kept.error_ratio);

  const GptqResult in_sample = judged(MomentsOf(inputs));
  EXPECT_TRUE(SameStored(in_sample.stored, plain.stored));
  EXPECT_NEAR(in_sample.error_ratio,
              ExactError(plain.decoded, weight, train) / NearestError(weight, train), 1e-3);

  const at::Tensor gap = (plain.decoded - weight).select(0, 0).unsqueeze(0) * 100;
  const at::Tensor nan = at::full_like(gap, std::numeric_limits<float>::quiet_NaN());
  const at::Tensor infinite = at::full_like(gap, std::numeric_limits<float>::infinity());
  for (const at::Tensor& held_out : {gap, nan, infinite}) {
    const GptqResult refused = guarded(held_out);
    EXPECT_TRUE(refused.fell_back);
    EXPECT_EQ(refused.error_ratio, 1);
    EXPECT_TRUE(SameStored(refused.stored, Nearest(weight)));
    EXPECT_TRUE(refused.decoded.equal(format().Decode(refused.stored)));
  }
}

// Inputs that are noisy beside the source's, and what their outputs lack of the source's.
struct Noisy {
  at::Tensor x, lack, wanted;
  Noisy(const at::Tensor& weight, int64_t tokens, int64_t seed, double noise) {
    const at::Tensor source = CorrelatedInputs(tokens, weight.size(1), seed);
    x = source + noise * torch::randn_like(source);
    wanted = source.matmul(weight.t());
    lack = wanted - x.matmul(weight.t());
  }
  InputRows Rows() const { return RowsOf(x, lack); }
  CorrectedWeight Corrected(const at::Tensor& weight, const Noisy& held_out) const {
    return Correct(weight, Gram(x), Rows(), held_out.Rows());
  }
};

TEST(Correct, BringsTheOutputsNearerToTheSources) {
  const at::Tensor weight = Weight(24, 96);
  const Noisy train(weight, 2048, 1, 1.0), held_out(weight, 256, 2, 1.0),
      other(weight, 256, 3, 1.0);
  const CorrectedWeight corrected = train.Corrected(weight, held_out);
  EXPECT_EQ(corrected.share, 0.5);
  const auto distance = [&](const at::Tensor& w) {
    return (other.x.matmul(w.t()) - other.wanted).square().sum().item<double>();
  };
  EXPECT_LT(distance(corrected.weight), 0.9 * distance(weight));
  EXPECT_NEAR(other.Rows().ErrorOf(corrected.weight, weight).output / distance(corrected.weight), 1,
              1e-3);
}

TEST(Correct, TakesTheShareThatIsBestOnTheHeldOutInputs) {
  const at::Tensor weight = Weight(24, 96);
  const Noisy train(weight, 128, 1, 1.5), held_out(weight, 4096, 2, 0.3);
  const CorrectedWeight corrected = train.Corrected(weight, held_out);
  ASSERT_GT(corrected.share, 0.01);
  ASSERT_LT(corrected.share, 0.49);
  const at::Tensor step = (corrected.weight - weight) / corrected.share;
  const InputRows rows = held_out.Rows();
  const double best = rows.ErrorOf(corrected.weight, weight).output;
  for (const double share : {corrected.share - 0.01, corrected.share + 0.01})
    EXPECT_LT(best, rows.ErrorOf(weight + share * step, weight).output);
}

TEST(Correct, StepsAlongTheDampedLeastSquaresSolution) {
  const at::Tensor weight = Weight(24, 96);
  for (const int64_t tokens : {64, 95, 96, 300}) {
    const Noisy train(weight, tokens, 1, 1.0), held_out(weight, 256, 2, 1.0);
    const CorrectedWeight corrected = train.Corrected(weight, held_out);
    ASSERT_GT(corrected.share, 0);
    const at::Tensor x = train.x.to(at::kDouble), hessian = Gram(x);
    const at::Tensor damped = hessian + hessian.diagonal().mean() * at::eye(96, at::kDouble);
    const at::Tensor step = at::linalg_solve(damped, x.t().matmul(train.lack.to(at::kDouble))).t();
    const at::Tensor found = (corrected.weight - weight) / corrected.share;
    EXPECT_LT(Amax(found - step), 1e-4 * Amax(step)) << tokens;
  }
}

TEST(Correct, LeavesAWeightWithoutASourceAlone) {
  const at::Tensor weight = Weight(8, 32), x = CorrelatedInputs(64, 32, 1);
  const CorrectedWeight corrected = Correct(weight, Gram(x), RowsOf(x), RowsOf(x));
  EXPECT_TRUE(corrected.weight.equal(weight));
  EXPECT_EQ(corrected.share, 0);
}

TEST(RenderGptq, ScaleChoiceHelpsNvfp4) {
  const Format& format = *FindFormat("nvfp4");
  const at::Tensor weight = Weight(32, 160);
  const at::Tensor hessian = CorrelatedHessian(160);
  const auto error = [&](bool choose_scales) {
    const GptqOptions options{.choose_scales = choose_scales};
    const auto result = RenderGptq(format, weight, FactorHessian(format, hessian, options),
                                   ScalesOf(weight), DType::kBF16, options);
    return ExactError(result->decoded, weight, hessian);
  };
  EXPECT_LT(error(true), 0.95 * error(false));
}

TEST(RenderGptq, GlobalScalesAreTheFusedSets) {
  const at::Tensor weight = Weight(8, 64);
  const SharedScales shared{.weight_amax = 3 * Amax(weight), .input_amax = 7};
  const Format& format = *FindFormat("nvfp4");
  const auto result = RenderGptq(format, weight, FactorHessian(format, CorrelatedHessian(64), {}),
                                 shared, DType::kBF16, {});
  EXPECT_EQ(result->stored.at("weight_global_scale").item<float>(),
            2688 / static_cast<float>(shared.weight_amax));
  EXPECT_EQ(result->stored.at("input_global_scale").item<float>(), 384.0F);
}

TEST(RenderGptq, FormatWithoutAGridIsRefused) {
  const auto result =
      RenderGptq(SourceFormat(), Weight(4, 16), FactorHessian(SourceFormat(), at::eye(16), {}), {},
                 DType::kBF16, {});
  EXPECT_EQ(result.status().code(), StatusCode::kInvalidInput);
  EXPECT_EQ(result.status().message(), "format bf16 has no grid to round to");
}

TEST(InputMoments, WeightErrorIsTheSummedSquaredErrorOfTheOutputs) {
  const at::Tensor x = CorrelatedInputs(50, 32, 1);
  const at::Tensor weight = Weight(6, 32), other = Weight(6, 32) + 0.01 * torch::randn({6, 32});
  const double expected = x.matmul((other - weight).t()).square().sum().item<double>();
  EXPECT_NEAR(MomentsOf(x).ErrorOf(other, weight).weight / expected, 1, 1e-4);
  EXPECT_EQ(MomentsOf(x).ErrorOf(other, weight).output, MomentsOf(x).ErrorOf(other, weight).weight);
}

TEST(InputRows, JudgeByTheWeightedSquaresOfTheOutputs) {
  const at::Tensor weight = Weight(24, 96);
  const at::Tensor rounded = (weight * 8).round() / 8;
  const at::Tensor token_weights = at::rand({512}) * 3;
  const Noisy inputs(weight, 512, 1, 0.5);
  InputRows with_lack, without;
  EXPECT_EQ(without.ErrorOf(rounded, weight).output, 0);
  for (const auto& [begin, count] : {std::pair(0, 100), std::pair(100, 412)}) {
    const at::Tensor x = inputs.x.narrow(0, begin, count);
    const at::Tensor weights = token_weights.narrow(0, begin, count);
    with_lack.Add(x, weights, inputs.lack.narrow(0, begin, count));
    without.Add(x, weights);
  }
  EXPECT_EQ(with_lack.tokens(), 512);
  const at::Tensor y = inputs.x.matmul((rounded - weight).t());
  const auto weighted = [&](const at::Tensor& outputs) {
    return (outputs.square().sum(-1) * token_weights).sum().item<double>();
  };
  EXPECT_NEAR(with_lack.ErrorOf(rounded, weight).weight / weighted(y), 1, 1e-5);
  EXPECT_NEAR(with_lack.ErrorOf(rounded, weight).output / weighted(y - inputs.lack), 1, 1e-5);
  EXPECT_NEAR(without.ErrorOf(rounded, weight).output / weighted(y), 1, 1e-5);
  InputMoments moments(96);
  moments.Add(with_lack.x(), {});
  EXPECT_NEAR(moments.ErrorOf(rounded, weight).weight / weighted(y), 1, 1e-4);
}

TEST(InputMoments, NoiseAddsToTheDiagonalAlone) {
  const InputMoments plain = MomentsOf(CorrelatedInputs(50, 32, 1));
  const at::Tensor noise = torch::rand({32});
  EXPECT_TRUE(plain.WithNoise(noise).hessian().equal(plain.hessian() + at::diag(noise)));
  EXPECT_EQ(plain.WithNoise(noise).tokens(), 50);
}

}  // namespace
}  // namespace prismaquant

#include "probe/loss.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <set>
#include <utility>
#include <vector>

namespace prismaquant {
namespace {

// logits = 3 tanh(x) W^T, in x's dtype.
class TanhHead : public OutputHead {
 public:
  explicit TanhHead(at::Tensor weight) : weight_(std::move(weight)) {}
  at::Tensor Norm(const at::Tensor& hidden) const override { return at::tanh(hidden); }
  at::Tensor Project(const at::Tensor& normed) const override {
    return 3 * at::matmul(normed, weight_.t());
  }
  int64_t vocab_size() const override { return weight_.size(0); }

 private:
  at::Tensor weight_;
};

// The hidden state is the logits, so that a gradient row is softmax(x) - onehot(label).
class IdentityHead : public OutputHead {
 public:
  explicit IdentityHead(int64_t vocab_size) : vocab_size_(vocab_size) {}
  at::Tensor Norm(const at::Tensor& hidden) const override { return hidden * 1; }
  at::Tensor Project(const at::Tensor& normed) const override { return normed; }
  int64_t vocab_size() const override { return vocab_size_; }

 private:
  int64_t vocab_size_;
};

std::vector<int32_t> Ids(int64_t tokens, int64_t vocab_size) {
  std::vector<int32_t> ids;
  for (int64_t t = 0; t < tokens; ++t) ids.push_back(static_cast<int32_t>(t * t % vocab_size));
  return ids;
}

// All positions of `tokens` but, for the text's own labels, the last.
LossSpan Data(int64_t tokens) { return {.end = tokens - 1}; }
LossSpan Sampled(int64_t tokens, uint64_t sequence) { return {.end = tokens, .stream = sequence}; }

// Summed cross-entropy of the first positions' labels, in float64 from the definition.
double CrossEntropy(const OutputHead& head, const at::Tensor& hidden,
                    const std::vector<int64_t>& labels) {
  const at::Tensor logits = head.Logits(hidden);
  double loss = 0;
  for (size_t t = 0; t < labels.size(); ++t) {
    const double* row = logits[static_cast<int64_t>(t)].const_data_ptr<double>();
    double sum = 0;
    for (int64_t v = 0; v < head.vocab_size(); ++v) sum += std::exp(row[v]);
    loss += std::log(sum) - row[labels[t]];
  }
  return loss;
}

double NextTokenLoss(const OutputHead& head, const at::Tensor& hidden,
                     const std::vector<int32_t>& ids) {
  return CrossEntropy(head, hidden, {ids.begin() + 1, ids.end()});
}

void ExpectSlopes(const OutputHead& head, const at::Tensor& hidden,
                  const std::vector<int64_t>& labels, const at::Tensor& gradient) {
  constexpr double kStep = 1e-5;
  ASSERT_EQ(gradient.sizes(), hidden.sizes());
  EXPECT_EQ(gradient.scalar_type(), at::kDouble);
  for (int64_t t = 0; t < hidden.size(0); ++t) {
    for (int64_t i = 0; i < hidden.size(1); ++i) {
      at::Tensor up = hidden.clone(), down = hidden.clone();
      up[t][i] += kStep;
      down[t][i] -= kStep;
      const double rise = CrossEntropy(head, up, labels) - CrossEntropy(head, down, labels);
      EXPECT_NEAR(gradient[t][i].item<double>(), rise / (2 * kStep), 1e-5) << t << " " << i;
    }
  }
}

std::vector<int64_t> SampledLabels(const at::Tensor& logits, int64_t sequence, uint64_t seed) {
  const int64_t tokens = logits.size(0), vocab = logits.size(1);
  const SequenceLoss result =
      LossAndGradient(IdentityHead(vocab), logits, Ids(tokens, vocab),
                      Sampled(tokens, static_cast<uint64_t>(sequence)), {.seed = seed});
  EXPECT_TRUE(at::allclose(result.log_sums, at::logsumexp(logits.to(at::kFloat), {-1})));
  const at::Tensor onehot = at::softmax(logits, -1) - result.gradient;
  const at::Tensor labels = onehot.argmax(-1);
  EXPECT_TRUE(result.labels.equal(labels));
  EXPECT_TRUE(at::allclose(onehot, at::one_hot(labels, vocab).to(onehot.scalar_type()), 0, 1e-5));
  const double loss =
      -at::log_softmax(logits, -1).gather(1, labels.unsqueeze(1)).sum().item<double>();
  EXPECT_NEAR(result.loss, loss, 1e-5 * loss);
  return {labels.const_data_ptr<int64_t>(), labels.const_data_ptr<int64_t>() + tokens};
}

TEST(UniformAt, LiesInTheHalfOpenUnitIntervalAndIsUniform) {
  constexpr int kCount = 20000, kBins = 20;
  double sum = 0, square = 0, lag = 0, previous = 0.5;
  std::vector<int> bins(kBins, 0);
  for (int i = 0; i < kCount; ++i) {
    const double u = UniformAt(7, i / 100, i % 100);
    ASSERT_GE(u, 0);
    ASSERT_LT(u, 1);
    ++bins[static_cast<int>(u * kBins)];
    sum += u;
    square += u * u;
    lag += (u - 0.5) * (previous - 0.5);
    previous = u;
  }
  EXPECT_NEAR(sum / kCount, 0.5, 0.01);
  EXPECT_NEAR(square / kCount, 1.0 / 3, 0.01);
  EXPECT_NEAR(lag / kCount, 0, 0.005);
  for (const int bin : bins) EXPECT_NEAR(bin * kBins, kCount, 160 * kBins);
}

TEST(UniformAt, EveryArgumentMatters) {
  std::set<double> values;
  for (uint64_t seed = 0; seed < 10; ++seed) {
    for (uint64_t sequence = 0; sequence < 10; ++sequence) {
      for (uint64_t position = 0; position < 10; ++position)
        values.insert(UniformAt(seed, sequence, position));
    }
  }
  EXPECT_EQ(values.size(), 1000U);
  EXPECT_EQ(UniformAt(1, 2, 3), UniformAt(1, 2, 3));
}

TEST(LossAndGradient, DataLabelsAgreeWithFiniteDifferences) {
  torch::manual_seed(3);
  const TanhHead head(torch::randn({11, 6}, at::kDouble));
  const at::Tensor hidden = torch::randn({9, 6}, at::kDouble);
  const std::vector<int32_t> ids = Ids(9, 11);
  const SequenceLoss result =
      LossAndGradient(head, hidden, ids, Data(hidden.size(0)), {.labels = LabelRule::kData});
  EXPECT_NEAR(result.loss, NextTokenLoss(head, hidden, ids), 1e-5 * result.loss);
  ExpectSlopes(head, hidden, {ids.begin() + 1, ids.end()}, result.gradient);
  EXPECT_EQ(result.gradient[8].abs().max().item<double>(), 0) << "the last token has no label";
}

TEST(LossAndGradient, SampledLabelsAgreeWithFiniteDifferences) {
  torch::manual_seed(7);
  const TanhHead head(torch::randn({11, 6}, at::kDouble));
  const at::Tensor hidden = torch::randn({9, 6}, at::kDouble);
  const std::vector<int64_t> labels = SampledLabels(head.Logits(hidden), 2, 5);
  EXPECT_GT(std::set<int64_t>(labels.begin(), labels.end()).size(), 2U);
  const SequenceLoss result = LossAndGradient(head, hidden, Ids(9, 11), Sampled(9, 2), {.seed = 5});
  EXPECT_NEAR(result.loss, CrossEntropy(head, hidden, labels), 1e-5 * result.loss);
  ExpectSlopes(head, hidden, labels, result.gradient);
}

TEST(LossAndGradient, BlocksMakeNoDifference) {
  torch::manual_seed(4);
  const TanhHead head(torch::randn({5, 4}, at::kDouble));
  const at::Tensor hidden = torch::randn({1300, 4}, at::kDouble);
  const std::vector<int32_t> ids = Ids(1300, 5);
  const SequenceLoss result =
      LossAndGradient(head, hidden, ids, Data(hidden.size(0)), {.labels = LabelRule::kData});
  EXPECT_NEAR(result.loss, NextTokenLoss(head, hidden, ids), 1e-5 * result.loss);
  const at::Tensor x = hidden.clone().requires_grad_(true);
  const at::Tensor targets =
      at::tensor(std::vector<int64_t>(ids.begin() + 1, ids.end())).unsqueeze(1);
  const at::Tensor loss =
      -at::log_softmax(head.Logits(x), -1).narrow(0, 0, 1299).gather(1, targets).sum();
  const at::Tensor expected = torch::autograd::grad({loss}, {x})[0];
  EXPECT_TRUE(at::allclose(result.gradient, expected, 1e-4, 1e-5));
}

TEST(LossAndGradient, OnlyTheSpanHasALossAndLabelsStandShiftTokensAhead) {
  torch::manual_seed(8);
  const TanhHead head(torch::randn({11, 6}, at::kDouble));
  const at::Tensor hidden = torch::randn({9, 6}, at::kDouble);
  const std::vector<int32_t> ids = Ids(9, 11);
  const LossSpan span{.begin = 3, .end = 6, .shift = 2};
  const SequenceLoss result =
      LossAndGradient(head, hidden, ids, span, {.labels = LabelRule::kData});
  const at::Tensor inside = hidden.narrow(0, 3, 3);
  const std::vector<int64_t> labels = {ids[5], ids[6], ids[7]};
  EXPECT_NEAR(result.loss, CrossEntropy(head, inside, labels), 1e-5 * result.loss);
  ExpectSlopes(head, inside, labels, result.gradient.narrow(0, 3, 3));
  EXPECT_EQ(result.gradient.narrow(0, 0, 3).abs().max().item<double>(), 0);
  EXPECT_EQ(result.gradient.narrow(0, 6, 3).abs().max().item<double>(), 0);
}

TEST(SpanOf, TextsHaveALossEverywhereAndCaptionsOnTheirOwnTokens) {
  Calibration calibration;
  calibration.text.windows = {{1, 2, 3, 4, 5}};
  calibration.captions = {{.ids = {1, 2, 3, 4, 5, 6, 7}, .first_label = 4}};
  const auto span = [&](Part part, int64_t sequence, LabelRule labels) {
    const LossSpan found = SpanOf(part, calibration, sequence, labels);
    return std::vector<int64_t>{found.begin, found.end, found.shift};
  };
  using Numbers = std::vector<int64_t>;
  EXPECT_EQ(span(Part::kText, 0, LabelRule::kSampled), (Numbers{0, 5, 1}));
  EXPECT_EQ(span(Part::kText, 0, LabelRule::kData), (Numbers{0, 4, 1}));
  EXPECT_EQ(span(Part::kText, 1, LabelRule::kSampled), (Numbers{3, 6, 1}));
  EXPECT_EQ(span(Part::kText, 1, LabelRule::kData), (Numbers{3, 6, 1}));
  EXPECT_EQ(span(Part::kMtp, 0, LabelRule::kSampled), (Numbers{0, 4, 2}));
  EXPECT_EQ(span(Part::kMtp, 0, LabelRule::kData), (Numbers{0, 3, 2}));
  EXPECT_NE(SpanOf(Part::kMtp, calibration, 0, LabelRule::kSampled).stream,
            SpanOf(Part::kText, calibration, 0, LabelRule::kSampled).stream);
}

TEST(LossAndGradient, OneTokenHasNoDataLabel) {
  const SequenceLoss result = LossAndGradient(IdentityHead(4), torch::randn({1, 4}), {2}, Data(1),
                                              {.labels = LabelRule::kData});
  EXPECT_EQ(result.loss, 0);
  EXPECT_EQ(result.gradient.abs().max().item<double>(), 0);
}

TEST(LossAndGradient, Bfloat16StaysBfloat16) {
  torch::manual_seed(5);
  const at::Tensor hidden = torch::randn({6, 8}).to(at::kBFloat16);
  const ProbeOptions options{.labels = LabelRule::kData};
  const SequenceLoss low = LossAndGradient(IdentityHead(8), hidden, Ids(6, 8), Data(6), options);
  const SequenceLoss high =
      LossAndGradient(IdentityHead(8), hidden.to(at::kFloat), Ids(6, 8), Data(6), options);
  EXPECT_EQ(low.gradient.scalar_type(), at::kBFloat16);
  EXPECT_TRUE(at::allclose(low.gradient.to(at::kFloat), high.gradient, 0.01, 0.01));
  EXPECT_NEAR(low.loss, high.loss, 1e-5 * high.loss);
}

TEST(SampledLabels, DependOnSeedSequenceAndPositionAlone) {
  torch::manual_seed(6);
  const at::Tensor logits = torch::randn({1100, 7});
  const std::vector<int64_t> labels = SampledLabels(logits, 3, 9);
  EXPECT_EQ(SampledLabels(logits, 3, 9), labels);
  EXPECT_NE(SampledLabels(logits, 4, 9), labels);
  EXPECT_NE(SampledLabels(logits, 3, 10), labels);
  for (const int64_t length : {1, 100, 600}) {
    const std::vector<int64_t> shorter = SampledLabels(logits.narrow(0, 0, length), 3, 9);
    EXPECT_EQ(shorter, std::vector<int64_t>(labels.begin(), labels.begin() + length));
  }
  at::Tensor other = torch::randn({1100, 7});
  other[700] = logits[700];
  EXPECT_EQ(SampledLabels(other, 3, 9)[700], labels[700]);
}

TEST(SampledLabels, TheTextHasNoSay) {
  const at::Tensor logits = torch::randn({20, 7});
  const IdentityHead head(7);
  const SequenceLoss a =
      LossAndGradient(head, logits, std::vector<int32_t>(20, 0), Sampled(20, 1), {.seed = 2});
  const SequenceLoss b = LossAndGradient(head, logits, Ids(20, 7), Sampled(20, 1), {.seed = 2});
  EXPECT_EQ(a.loss, b.loss);
  EXPECT_TRUE(a.gradient.equal(b.gradient));
}

TEST(SampledLabels, FrequenciesAreTheSoftmax) {
  constexpr int64_t kPositions = 6000;
  const at::Tensor row = at::tensor({1.0F, -2.0F, 0.5F, 2.0F, -1e4F, 0.0F});
  const at::Tensor logits = row.expand({kPositions, 6}).contiguous();
  const at::Tensor probabilities = at::softmax(row.to(at::kDouble), -1);
  std::vector<int64_t> counts(6, 0);
  for (const int64_t label : SampledLabels(logits, 0, 1)) ++counts[label];
  for (int64_t v = 0; v < 6; ++v) {
    const double p = probabilities[v].item<double>();
    const double deviation = std::sqrt(p * (1 - p) / kPositions);
    EXPECT_NEAR(static_cast<double>(counts[v]) / kPositions, p, 4.5 * deviation + 1e-12) << v;
  }
}

}  // namespace
}  // namespace prismaquant

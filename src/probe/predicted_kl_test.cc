#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "io/temporary_folder.h"
#include "probe/linear_probe.h"
#include "probe/loss.h"
#include "probe/probe.h"
#include "probe/tiny_checkpoint.h"
#include "probe/unit_costs.h"

namespace prismaquant {
namespace {

using Multiply = std::function<at::Tensor(const LinearInfo&, const at::Tensor&)>;

const ComputeOptions kFloat64{.dtype = at::kDouble};

class FunctionRunner : public LinearRunner {
 public:
  explicit FunctionRunner(Multiply multiply) : multiply_(std::move(multiply)) {}
  at::Tensor Apply(const LinearInfo& linear, const at::Tensor& x) override {
    return multiply_(linear, x);
  }

 private:
  Multiply multiply_;
};

// Sums s = <sum_t g_t x_t^T, error> over the Linears, and over all of them together.
class ErrorObserver : public LinearObserver {
 public:
  explicit ErrorObserver(const std::vector<at::Tensor>& errors)
      : errors_(errors), s_(errors.size()) {}
  void Observe(int id, const at::Tensor& x, const at::Tensor& g, const at::Tensor&) override {
    s_[id] = (at::matmul(g.t(), x) * errors_[id]).sum().item<double>();
  }
  const std::vector<double>& s() const { return s_; }

 private:
  const std::vector<at::Tensor>& errors_;
  std::vector<double> s_;
};

class PredictedKlTest : public ::testing::Test {
 protected:
  void SetUp() override {
    for (const LinearInfo& linear : tiny_.model().linears()) {
      index_[linear.name] = static_cast<int>(weights_.size());
      weights_.push_back(tiny_.model().LoadWeight(linear)->to(at::kDouble));
    }
  }
  int Index(const LinearInfo& linear) const { return index_.at(linear.name); }
  at::Tensor Embed(const std::vector<int32_t>& window) const {
    const at::Tensor ids = at::tensor(std::vector<int64_t>(window.begin(), window.end()));
    return tiny_.model().Embed(ids.unsqueeze(0), kFloat64).value();
  }
  // The last layer's output [1, tokens, hidden_size].
  at::Tensor Body(const at::Tensor& embedded, const Multiply& multiply) const {
    const Model& model = tiny_.model();
    const SequenceContext context = model.Context(embedded.size(1), kFloat64);
    FunctionRunner runner(multiply);
    at::Tensor hidden = embedded;
    for (int layer = 0; layer < TinyCheckpoint::kLayers; ++layer)
      hidden = RunLayer(*model.LoadLayer(layer, kFloat64).value(), context, hidden, runner);
    return hidden;
  }
  // KL(as stored || multiplied by `changed`), summed over the window's positions.
  double Divergence(const std::vector<int32_t>& window, const Multiply& changed) const {
    const at::NoGradGuard no_grad;
    const auto head = tiny_.model().LoadHead(Part::kText, kFloat64).value();
    const auto log_probs = [&](const Multiply& multiply) {
      return at::log_softmax(head->Logits(Body(Embed(window), multiply)[0]), -1);
    };
    const at::Tensor p = log_probs([&](const LinearInfo& linear, const at::Tensor& x) {
      return at::linear(x, weights_[Index(linear)]);
    });
    return (p.exp() * (p - log_probs(changed))).sum().item<double>();
  }

  TinyCheckpoint tiny_;
  std::map<std::string, int> index_;
  std::vector<at::Tensor> weights_;
};

TEST_F(PredictedKlTest, ExpectedSquaresOfSampledScoresAreTheDivergence) {
  constexpr uint64_t kDraws = 500;
  torch::manual_seed(5);
  std::vector<at::Tensor> errors;
  for (const at::Tensor& weight : weights_)
    errors.push_back(at::randn_like(weight) * (0.01 * weight.std()));
  const size_t linears = errors.size();
  std::vector<double> predicted(linears + 1), measured(linears + 1);
  const auto head = tiny_.model().LoadHead(Part::kText, kFloat64).value();
  for (int64_t n = 0; n < tiny_.calibration().count(); ++n) {
    const std::vector<int32_t>& window = tiny_.calibration().ids(n);
    const LossSpan span = SpanOf(Part::kText, tiny_.calibration(), n, LabelRule::kSampled);
    for (size_t changed = 0; changed <= linears; ++changed) {
      measured[changed] += Divergence(window, [&](const LinearInfo& linear, const at::Tensor& x) {
        const size_t i = Index(linear);
        const bool wrong = i == changed || changed == linears;
        return at::linear(x, wrong ? weights_[i] + errors[i] : weights_[i]);
      });
    }
    ErrorObserver observer(errors);
    const at::Tensor x = Embed(window).requires_grad_(true);
    const at::Tensor y = Body(x, [&](const LinearInfo& linear, const at::Tensor& input) {
      return ApplyProbed(input, weights_[Index(linear)], {}, Index(linear), observer);
    });
    for (uint64_t seed = 0; seed < kDraws; ++seed) {
      const at::Tensor g =
          LossAndGradient(*head, y.detach()[0], window, span, {.seed = seed}).gradient;
      torch::autograd::grad({y}, {x}, {g.unsqueeze(0)}, /*retain_graph=*/true);
      double together = 0;
      for (size_t i = 0; i < linears; ++i) {
        together += observer.s()[i];
        predicted[i] += observer.s()[i] * observer.s()[i] / 2 / kDraws;
      }
      predicted[linears] += together * together / 2 / kDraws;
    }
  }
  for (size_t i = 0; i < linears; ++i)
    EXPECT_NEAR(predicted[i] / measured[i], 1, 0.2) << tiny_.model().linears()[i].name;
  EXPECT_NEAR(predicted[linears] / measured[linears], 1, 0.15) << "all together";
}

TEST_F(PredictedKlTest, JointLossIsTheDivergenceOfTheRoundedModel) {
  constexpr int kDraws = 1000;
  Calibration calibration;
  calibration.text.windows.assign(kDraws, tiny_.calibration().ids(0));
  const TemporaryFolder folder;
  RunStore store = RunStore::Open(FileSystem::Default(), folder / "work").value();
  ASSERT_TRUE(RunProbe(tiny_.model(), calibration, {.seed = 1}, store).ok());
  for (const std::string name : {"fp8", "mxfp8"}) {
    const Format& format = *FindFormat(name);
    std::map<std::string, std::string> choices;
    for (const LinearInfo& linear : tiny_.model().linears()) choices[linear.name] = name;
    const double measured =
        Divergence(calibration.ids(0), [&](const LinearInfo& linear, const at::Tensor& x) {
          const StoredTensors stored =
              format.Encode(weights_[Index(linear)].to(at::kFloat), {}, linear.dtype);
          const at::Tensor rounded =
              format.QuantizeActivation(x.to(at::kFloat).flatten(0, 1), stored);
          return at::linear(rounded, format.Decode(stored)).to(at::kDouble).unsqueeze(0);
        });
    const LossTokens counts = CountLossTokens(tiny_.model(), calibration, LabelRule::kSampled);
    const double predicted = JointLoss(tiny_.model(), store, counts, choices).value().text;
    const double tokens = TinyCheckpoint::kTokens;
    EXPECT_NEAR(predicted / (measured / tokens), 1, 0.15) << name;
  }
}

}  // namespace
}  // namespace prismaquant

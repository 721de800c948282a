#include "model/feed_forward.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace prismaquant {
namespace {

constexpr int64_t kHidden = 6, kExperts = 5, kPerToken = 2, kSize = 4, kShared = 3;

at::Tensor Random(const std::vector<int64_t>& shape) {
  return torch::randn(shape, torch::dtype(at::kDouble));
}

// Weights of a mixture in the order of its stages.
struct Weights {
  at::Tensor router = Random({kExperts, kHidden});
  std::vector<at::Tensor> gate, up, down;
  at::Tensor shared_gate = Random({kShared, kHidden}), shared_up = Random({kShared, kHidden});
  at::Tensor shared_down = Random({kHidden, kShared}), shared_weight = Random({1, kHidden});

  Weights() {
    for (int64_t e = 0; e < kExperts; ++e) {
      gate.push_back(Random({kSize, kHidden}));
      up.push_back(Random({kSize, kHidden}));
      down.push_back(Random({kHidden, kSize}));
    }
  }
  std::vector<std::vector<at::Tensor>> Stages(bool shared) const {
    std::vector<std::vector<at::Tensor>> stages(3);
    stages[0] = {router};
    if (shared) stages[0].insert(stages[0].end(), {shared_gate, shared_up, shared_weight});
    for (size_t e = 0; e < gate.size(); ++e) {
      stages[1].insert(stages[1].end(), {gate[e], up[e]});
      stages[2].push_back(down[e]);
    }
    if (shared) stages[1].push_back(shared_down);
    return stages;
  }
};

at::Tensor Swiglu(const at::Tensor& gate, const at::Tensor& up, const at::Tensor& down,
                  const at::Tensor& x) {
  return at::mv(down, at::silu(at::mv(gate, x)) * at::mv(up, x));
}

// One token at a time, by the definition. `experts`: of each token, most likely first.
at::Tensor PerToken(const Weights& w, const at::Tensor& x, bool shared, bool normalize,
                    std::vector<std::vector<int64_t>>& experts) {
  std::vector<at::Tensor> rows;
  const at::Tensor tokens = x.flatten(0, 1);
  for (int64_t t = 0; t < tokens.size(0); ++t) {
    const at::Tensor p = at::softmax(at::mv(w.router, tokens[t]), 0);
    std::vector<int64_t>& chosen = experts.emplace_back();
    for (int64_t e = 0; e < kExperts; ++e) chosen.push_back(e);
    std::sort(chosen.begin(), chosen.end(),
              [&](int64_t a, int64_t b) { return p[a].item<double>() > p[b].item<double>(); });
    chosen.resize(kPerToken);
    at::Tensor sum = at::zeros({}, p.options());
    for (const int64_t e : chosen) sum = sum + p[e];
    at::Tensor y = at::zeros({kHidden}, p.options());
    for (const int64_t e : chosen) {
      const at::Tensor weight = normalize ? p[e] / sum : p[e];
      y = y + weight * Swiglu(w.gate[e], w.up[e], w.down[e], tokens[t]);
    }
    if (shared) {
      y = y + at::sigmoid(at::mv(w.shared_weight, tokens[t])) *
                  Swiglu(w.shared_gate, w.shared_up, w.shared_down, tokens[t]);
    }
    rows.push_back(y);
  }
  return at::stack(rows).view(x.sizes());
}

at::Tensor InStages(const FeedForward& mixture, const std::vector<std::vector<at::Tensor>>& weights,
                    const at::Tensor& x, LayerState& state) {
  state.held = {x};
  for (int s = 0; s < static_cast<int>(weights.size()); ++s) {
    const std::vector<at::Tensor> inputs = mixture.Inputs(s, state);
    EXPECT_EQ(inputs.size(), weights[static_cast<size_t>(s)].size());
    std::vector<at::Tensor> outputs;
    for (size_t i = 0; i < inputs.size(); ++i) {
      outputs.push_back(at::linear(inputs[i], weights[static_cast<size_t>(s)][i]));
    }
    mixture.Outputs(s, std::move(outputs), state);
  }
  EXPECT_EQ(state.held.size(), 1U);
  return state.held.front();
}

class MixtureTest : public ::testing::TestWithParam<std::tuple<bool, bool>> {};

TEST_P(MixtureTest, IsThatOfAPerTokenLoopWithItsGradient) {
  const auto [shared, normalize] = GetParam();
  torch::manual_seed(1);
  const Weights weights;
  const MixtureConfig config{.experts = kExperts,
                             .experts_per_token = kPerToken,
                             .expert_size = kSize,
                             .shared_size = shared ? kShared : 0,
                             .normalize = normalize};
  const auto mixture = MakeMixture(config, MlpActivation::kSilu);
  const at::Tensor x = Random({2, 7, kHidden}), direction = Random({2, 7, kHidden});
  const at::Tensor a = x.clone().requires_grad_(true), b = x.clone().requires_grad_(true);
  LayerState state;
  const at::Tensor y = InStages(*mixture, weights.Stages(shared), a, state);
  std::vector<std::vector<int64_t>> experts;
  const at::Tensor expected = PerToken(weights, b, shared, normalize, experts);
  EXPECT_TRUE(at::allclose(y, expected, 1e-12, 1e-12));
  EXPECT_TRUE(at::allclose(torch::autograd::grad({y}, {a}, {direction})[0],
                           torch::autograd::grad({expected}, {b}, {direction})[0], 1e-11, 1e-11));
  ASSERT_EQ(state.routing.sizes(), (std::vector<int64_t>{14, kPerToken}));
  for (int64_t t = 0; t < 14; ++t) {
    for (int64_t k = 0; k < kPerToken; ++k) {
      EXPECT_EQ(state.routing[t][k].item<int64_t>(),
                experts[static_cast<size_t>(t)][static_cast<size_t>(k)]);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, MixtureTest,
                         ::testing::Combine(::testing::Bool(), ::testing::Bool()));

TEST(Mixture, AnExpertSeesItsTokensInOrderAndMaySeeNone) {
  torch::manual_seed(2);
  Weights weights;
  weights.router.zero_();
  weights.router[3].fill_(1);
  weights.router[1].fill_(0.5);
  const auto mixture =
      MakeMixture({.experts = kExperts, .experts_per_token = kPerToken, .expert_size = kSize},
                  MlpActivation::kSilu);
  const at::Tensor x = Random({1, 4, kHidden}).abs();
  LayerState state{.held = {x}};
  mixture->Outputs(0, {at::linear(mixture->Inputs(0, state)[0], weights.router)}, state);
  const std::vector<at::Tensor> inputs = mixture->Inputs(1, state);
  ASSERT_EQ(inputs.size(), 2U * kExperts);
  for (size_t e = 0; e < kExperts; ++e) {
    const bool chosen = e == 1 || e == 3;
    EXPECT_EQ(inputs[2 * e].size(0), chosen ? 4 : 0);
    EXPECT_TRUE(inputs[2 * e].is_same(inputs[2 * e + 1]));
    if (chosen) {
      EXPECT_TRUE(inputs[2 * e].equal(x[0]));
    }
  }
}

TEST(GatedMlp, Activations) {
  const at::Tensor gate = at::tensor({-1.0, 2.0}, at::kDouble),
                   up = at::tensor({3.0, 4.0}, at::kDouble);
  for (const MlpActivation activation : {MlpActivation::kSilu, MlpActivation::kGeluTanh}) {
    const auto mlp = MakeGatedMlp(activation);
    LayerState state{.held = {gate}};
    EXPECT_EQ(mlp->Inputs(0, state).size(), 2U);
    mlp->Outputs(0, {gate, up}, state);
    for (int64_t i = 0; i < 2; ++i) {
      const double z = gate[i].item<double>();
      const double inner = std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z);
      const double expected = activation == MlpActivation::kSilu ? z / (1 + std::exp(-z))
                                                                 : z / 2 * (1 + std::tanh(inner));
      EXPECT_NEAR(mlp->Inputs(1, state)[0][i].item<double>(), expected * up[i].item<double>(),
                  1e-12);
    }
  }
}

}  // namespace
}  // namespace prismaquant

#include "round/output_hessian.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <limits>
#include <vector>

namespace prismaquant {
namespace {

// Of tokens of very different sizes, `directions` of them common to all.
std::vector<at::Tensor> Gradients(int64_t out, int64_t directions, int64_t sequences) {
  torch::manual_seed(out);
  const at::Tensor common = torch::randn({directions, out}) * torch::rand({out});
  std::vector<at::Tensor> gradients;
  for (int64_t n = 0; n < sequences; ++n) {
    const at::Tensor size = torch::exp(2 * torch::randn({200, 1})) * 1e-4;
    const at::Tensor fall = torch::arange(1, directions + 1).to(at::kFloat).pow(-0.75);
    gradients.push_back(torch::matmul(torch::randn({200, directions}) * fall, common) * size);
  }
  return gradients;
}

// K over the mean of its diagonal, token by token.
at::Tensor Exact(const std::vector<at::Tensor>& gradients) {
  const int64_t out = gradients[0].size(1);
  at::Tensor k = at::zeros({out, out}, at::kDouble);
  for (const at::Tensor& g : gradients) {
    const at::Tensor wide = g.to(at::kDouble);
    double mean = 0;
    for (int64_t t = 0; t < g.size(0); ++t) mean += wide[t].square().sum().item<double>();
    mean /= static_cast<double>(g.size(0));
    for (int64_t t = 0; t < g.size(0); ++t) {
      const double square = wide[t].square().sum().item<double>();
      k += std::min(1.0, mean / square) * at::outer(wide[t], wide[t]);
    }
  }
  return k / k.diagonal().mean();
}

at::Tensor FactorOf(const std::vector<at::Tensor>& gradients) {
  OutputSketch sketch;
  for (const at::Tensor& g : gradients) {
    const at::Tensor wide = g.to(at::kFloat);
    sketch.Add(wide, wide.square().sum(1));
  }
  return sketch.Factor();
}

double Distance(const at::Tensor& factor, const at::Tensor& exact) {
  const at::Tensor wide = factor.to(at::kDouble);
  return (at::matmul(wide, wide.t()) - exact).norm().item<double>();
}

// [out, out]: how much of row j's error row k takes, by a dense factor.
at::Tensor DenseFeedback(const at::Tensor& factor, double damping) {
  const at::Tensor wide = factor.to(at::kDouble);
  const at::Tensor k = damping * at::eye(wide.size(0), at::kDouble) + at::matmul(wide, wide.t());
  const at::Tensor r = at::linalg_cholesky(k.flip({0, 1})).flip({0, 1});
  return r / r.diagonal().unsqueeze(0);
}

TEST(OutputSketchTest, FewDirectionsAreFoundExactly) {
  for (const int64_t out : {5, 64, 96, 300}) {
    const auto gradients = Gradients(out, std::min<int64_t>(out, 20), 3);
    const at::Tensor factor = FactorOf(gradients), exact = Exact(gradients);
    EXPECT_EQ(factor.size(0), out);
    EXPECT_EQ(factor.size(1), std::min(OutputSketch::kRank, out));
    EXPECT_LT(Distance(factor, exact), 1e-4 * exact.norm().item<double>()) << out;
  }
}

TEST(OutputSketchTest, OfManyDirectionsTheLargestAreKept) {
  const auto gradients = Gradients(256, 256, 4);
  const at::Tensor exact = Exact(gradients);
  const at::Tensor smaller = at::linalg_eigvalsh(exact).narrow(0, 0, 256 - OutputSketch::kRank);
  const double least = smaller.norm().item<double>();
  EXPECT_LT(Distance(FactorOf(gradients), exact), 1.5 * least);
}

TEST(OutputSketchTest, NarrowGradientsLeaveNearlyTheSame) {
  auto gradients = Gradients(96, 20, 3);
  const at::Tensor exact = Exact(gradients);
  for (at::Tensor& g : gradients) g = g.to(at::kBFloat16);
  EXPECT_LT(Distance(FactorOf(gradients), exact), 0.02 * exact.norm().item<double>());
}

TEST(OutputSketchTest, WithoutAFiniteGradientThereIsNoFactor) {
  EXPECT_FALSE(OutputSketch().Factor().defined());
  EXPECT_FALSE(FactorOf({at::zeros({10, 40})}).defined());
  EXPECT_TRUE(FactorOf({at::zeros({10, 40}), at::ones({10, 40})}).isfinite().all().item<bool>());
  at::Tensor g = at::ones({10, 40});
  g[3][7] = std::numeric_limits<float>::infinity();
  EXPECT_FALSE(FactorOf({g}).defined());
}

TEST(RowFeedbackTest, IsThatOfTheDenseFactor) {
  const at::Tensor factor = FactorOf(Gradients(150, 150, 2));
  const at::Tensor dense = DenseFeedback(factor, 3);
  const RowFeedback rows(factor);
  torch::manual_seed(5);
  const at::Tensor errors = torch::randn({150, 7});
  at::Tensor z = rows.Start(7);
  for (int64_t k = 0; k < 150; ++k) {
    const at::Tensor expected =
        at::matmul(dense.select(1, k).narrow(0, 0, k), errors.narrow(0, 0, k).to(at::kDouble));
    const at::Tensor moved = rows.Moved(k, 1, z)[0].to(at::kDouble);
    EXPECT_LT((moved - expected).abs().max().item<double>(), 1e-5) << k;
    rows.Add(k, errors.narrow(0, k, 1), z);
  }
}

TEST(RowFeedbackTest, WideMatricesTakeMoreRowsAtATime) {
  EXPECT_TRUE(RowFeedback().empty());
  const RowFeedback rows(at::ones({8, 2}));
  EXPECT_FALSE(rows.empty());
  EXPECT_EQ(rows.RowsAtATime(8), 16);
  EXPECT_EQ(rows.RowsAtATime(1536), 16);
  EXPECT_EQ(rows.RowsAtATime(17408), 272);
}

}  // namespace
}  // namespace prismaquant

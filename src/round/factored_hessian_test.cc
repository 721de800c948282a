#include "round/factored_hessian.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <limits>
#include <vector>

namespace prismaquant {
namespace {

constexpr int64_t kIn = 288, kGroup = 16;  // three blocks, the last one narrower

at::Tensor Hessian(int64_t in) {
  torch::manual_seed(5);
  const at::Tensor x = torch::randn({600, in}) * (torch::rand({in}) + 0.2);
  return x.t().matmul(x);
}

// R, from what is stored of it.
at::Tensor UpperFactor(const FactoredHessian& hessian) {
  return hessian.factor().tril().flip({0, 1}).to(at::kDouble);
}

TEST(FactoredHessian, FactorsTheDampedHessianInItsOrder) {
  const at::Tensor h = Hessian(kIn), wide = h.to(at::kDouble);
  const FactoredHessian hessian(h, kGroup, /*damping=*/0.2, at::kFloat);
  ASSERT_TRUE(hessian.ok());
  const at::Tensor damped = (wide + 0.2 * wide.diagonal().mean() * at::eye(kIn, at::kDouble))
                                .index_select(0, hessian.columns())
                                .index_select(1, hessian.columns());
  const at::Tensor r = UpperFactor(hessian), product = r.matmul(r.t());
  const double multiple = (damped[0][0] / product[0][0]).item<double>();
  EXPECT_TRUE(at::allclose(product * multiple, damped, 1e-5, 1e-3));
  EXPECT_TRUE(hessian.diagonal().equal(h.diagonal()));
}

TEST(FactoredHessian, InvertsTheBlocksOfItsDiagonal) {
  const FactoredHessian hessian(Hessian(kIn), kGroup, 0.2, at::kFloat);
  const at::Tensor r = UpperFactor(hessian);
  int64_t begin = 0;
  for (int64_t block = 0; begin < kIn; ++block) {
    const at::Tensor inverse = hessian.inverse(block).to(at::kDouble);
    const int64_t columns = inverse.size(0);
    EXPECT_EQ(columns, begin < 256 ? FactoredHessian::kBlockColumns : 32);
    const at::Tensor own = r.narrow(0, begin, columns).narrow(1, begin, columns);
    EXPECT_TRUE(at::allclose(own.matmul(inverse), at::eye(columns, at::kDouble), 0, 1e-5));
    EXPECT_EQ(inverse.tril(-1).abs().max().item<double>(), 0);
    begin += columns;
  }
}

TEST(FactoredHessian, TakesWholeGroupsByTheirDiagonal) {
  at::Tensor h = at::eye(64);
  h.diagonal().narrow(0, 16, 16).fill_(3);
  h.diagonal().narrow(0, 48, 16).fill_(2);
  const FactoredHessian hessian(h, kGroup, 0.2, at::kFloat);
  EXPECT_TRUE(hessian.groups().equal(at::tensor(std::vector<int64_t>{1, 3, 0, 2})));
  const at::Tensor expected =
      at::cat({at::arange(16, 32), at::arange(48, 64), at::arange(0, 16), at::arange(32, 48)});
  EXPECT_TRUE(hessian.columns().equal(expected));
}

TEST(FactoredHessian, BesideBfloat16ProductsIsTheSameWithinItsRounding) {
  const at::Tensor h = Hessian(kIn);
  const FactoredHessian wide(h, kGroup, 0.2, at::kFloat), narrow(h, kGroup, 0.2, at::kBFloat16);
  ASSERT_EQ(narrow.factor().scalar_type(), at::kBFloat16);
  EXPECT_TRUE(narrow.columns().equal(wide.columns()));
  EXPECT_TRUE(at::allclose(UpperFactor(narrow), UpperFactor(wide), 0x1.0p-8, 1e-3));
  EXPECT_TRUE(at::allclose(narrow.inverse(1), wide.inverse(1), 1e-3, 1e-4));
}

TEST(FactoredHessian, WithoutAFactorSaysSo) {
  at::Tensor poisoned = Hessian(64);
  poisoned[3][40] = std::numeric_limits<float>::quiet_NaN();
  for (const at::Tensor& h : {at::zeros({64, 64}), poisoned, -Hessian(64)}) {
    EXPECT_FALSE(FactoredHessian(h, kGroup, 0.2, at::kFloat).ok());
  }
  EXPECT_FALSE(FactoredHessian().ok());
}

}  // namespace
}  // namespace prismaquant

#include "kernels/symmetric.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

namespace prismaquant {
namespace {

TEST(MirrorUpper, MakesTheUpperHalfsMatrix) {
  for (const int64_t n : {1, 31, 32, 33, 64, 65, 200}) {
    const at::Tensor matrix = at::randn({n, n});
    const at::Tensor expected = matrix.triu() + matrix.triu(1).t();
    ops::MirrorUpper(matrix);
    EXPECT_TRUE(at::equal(matrix, expected)) << n;
  }
}

TEST(MirrorUpper, RefusesWhatIsNoSquareOfFloats) {
  EXPECT_THROW(ops::MirrorUpper(at::zeros({2, 3})), c10::Error);
  EXPECT_THROW(ops::MirrorUpper(at::zeros({4, 4}).narrow(0, 0, 2)), c10::Error);
  EXPECT_THROW(ops::MirrorUpper(at::zeros({2, 2}).t().narrow(1, 0, 1)), c10::Error);
  EXPECT_THROW(ops::MirrorUpper(at::zeros({2, 2}, at::kDouble)), c10::Error);
}

TEST(CholeskyInPlace, FactorsTheUpperHalfAndKeepsTheLower) {
  for (const at::ScalarType type : {at::kFloat, at::kDouble}) {
    const at::Tensor rows = at::randn({90, 70}, type);
    const at::Tensor matrix = at::matmul(rows.t(), rows) + at::eye(70, type);
    at::Tensor factored = matrix.clone();
    ASSERT_TRUE(ops::CholeskyInPlace(factored));
    EXPECT_TRUE(at::equal(factored.tril(-1), matrix.tril(-1)));
    EXPECT_TRUE(at::allclose(factored.triu(), at::linalg_cholesky(matrix).t()));
  }
}

TEST(CholeskyInPlace, SaysWhatHasNoFactor) {
  EXPECT_FALSE(ops::CholeskyInPlace(-at::eye(3)));
  EXPECT_TRUE(ops::CholeskyInPlace(at::zeros({0, 0})));
  EXPECT_THROW(ops::CholeskyInPlace(at::zeros({2, 3})), c10::Error);
  EXPECT_THROW(ops::CholeskyInPlace(at::zeros({2, 2}, at::kBFloat16)), c10::Error);
}

}  // namespace
}  // namespace prismaquant

#include "kernels/row_products.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

namespace prismaquant::ops {
namespace {

class RowProductsTest : public ::testing::TestWithParam<at::ScalarType> {
 protected:
  static at::Tensor Random(int64_t rows, int64_t columns) {
    return torch::randn({rows, columns}).to(GetParam());
  }
  static at::Tensor Expected(const at::Tensor& a, const at::Tensor& b) {
    return (a.to(at::kDouble) * b.to(at::kDouble)).sum(-1);
  }
};

TEST_P(RowProductsTest, AreTheInnerProductsOfEachRow) {
  torch::manual_seed(1);
  for (const int64_t columns : {1, 31, 32, 33, 200, 4100}) {
    const at::Tensor a = Random(7, columns), b = Random(7, columns), c = Random(7, columns);
    const at::Tensor found = RowProducts(a, {b, c});
    ASSERT_EQ(found.sizes(), at::IntArrayRef({2, 7}));
    EXPECT_EQ(found.scalar_type(), at::kFloat);
    const at::Tensor scale = (a.to(at::kDouble).abs() * b.to(at::kDouble).abs()).sum(-1);
    EXPECT_LT(((found[0] - Expected(a, b)) / scale).abs().max().item<double>(), 1e-6);
    EXPECT_LT((found[1] - Expected(a, c)).abs().max().item<double>(), 1e-3);
  }
}

TEST_P(RowProductsTest, DoNotDependOnTheNumberOfThreads) {
  torch::manual_seed(2);
  const at::Tensor a = Random(65, 1000), b = Random(65, 1000);
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const at::Tensor one = RowProducts(a, {b});
  at::set_num_threads(3);
  const at::Tensor three = RowProducts(a, {b});
  at::set_num_threads(threads);
  EXPECT_TRUE(one.equal(three));
}

TEST_P(RowProductsTest, OfNoMatricesAndOfNoRows) {
  EXPECT_EQ(RowProducts(Random(3, 5), {}).sizes(), at::IntArrayRef({0, 3}));
  EXPECT_EQ(RowProducts(Random(0, 5), {Random(0, 5)}).sizes(), at::IntArrayRef({1, 0}));
}

TEST_P(RowProductsTest, RefuseOtherShapesAndTypes) {
  const at::Tensor a = Random(4, 8);
  EXPECT_THROW(RowProducts(a, {Random(4, 7)}), c10::Error);
  EXPECT_THROW(RowProducts(a, {a.to(at::kDouble)}), c10::Error);
  EXPECT_THROW(RowProducts(a, {Random(8, 4).t()}), c10::Error);
  EXPECT_THROW(RowProducts(a.to(at::kHalf), {}), c10::Error);
}

INSTANTIATE_TEST_SUITE_P(Types, RowProductsTest, ::testing::Values(at::kFloat, at::kBFloat16),
                         [](const auto& type) { return c10::toString(type.param); });

}  // namespace
}  // namespace prismaquant::ops

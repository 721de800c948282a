#include "kernels/gather.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <array>
#include <thread>

namespace prismaquant {
namespace {

class GatherTest : public ::testing::TestWithParam<at::ScalarType> {};

TEST_P(GatherTest, IsIndexSelect) {
  const at::Tensor matrix = at::randint(0, 100, {37, 53}).to(GetParam());
  const at::Tensor columns = at::randperm(53), rows = at::randint(0, 37, {20}, at::kLong);
  EXPECT_TRUE(at::equal(ops::Gather(matrix, columns), matrix.index_select(1, columns)));
  EXPECT_TRUE(at::equal(ops::Gather(matrix, columns, rows),
                        matrix.index_select(0, rows).index_select(1, columns)));
}

INSTANTIATE_TEST_SUITE_P(Types, GatherTest,
                         ::testing::Values(at::kByte, at::kBFloat16, at::kFloat));

TEST(Gather, RefusesWhatItCannotHold) {
  const at::Tensor matrix = at::zeros({2, 3});
  EXPECT_THROW(ops::Gather(matrix, at::tensor({0, 3}, at::kLong)), c10::Error);
  EXPECT_THROW(ops::Gather(matrix, at::tensor({0}, at::kLong), at::tensor({-1}, at::kLong)),
               c10::Error);
  EXPECT_THROW(ops::Gather(matrix.t(), at::tensor({0}, at::kLong)), c10::Error);
  EXPECT_THROW(ops::Gather(matrix.to(at::kDouble), at::tensor({0}, at::kLong)), c10::Error);
}

// A header that was compiled without OpenMP would run every kernel on one thread.
TEST(ParallelFor, TakesAllThreads) {
  const int before = at::get_num_threads();
  at::set_num_threads(2);
  std::array<std::thread::id, 2> threads;
  at::parallel_for(0, 2, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      threads[static_cast<size_t>(i)] = std::this_thread::get_id();
  });
  at::set_num_threads(before);
  EXPECT_NE(threads[0], threads[1]);
}

}  // namespace
}  // namespace prismaquant

#include "model/mrope.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <vector>

namespace prismaquant {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr int64_t kImage = 9;

std::string Error(const std::vector<int64_t>& ids, int64_t rows, int64_t columns) {
  const Result<at::Tensor> positions = MropePositions(at::tensor(ids), kImage, rows, columns, 2);
  EXPECT_EQ(positions.status().code(), StatusCode::kInvalidInput);
  return positions.status().message();
}

// The positions are what transformers 5.23's Qwen3_5Model.get_rope_index gives.
TEST(Mrope, AnImageTakesRowsAndColumnsOfItsMergedGrid) {
  const at::Tensor ids = at::tensor(std::vector<int64_t>{1, 2, 9, 9, 9, 9, 9, 9, 3, 4});
  const Result<at::Tensor> positions = MropePositions(ids, kImage, 4, 6, 2);
  ASSERT_TRUE(positions.ok()) << positions.status().message();
  const at::Tensor expected = at::tensor(std::vector<int64_t>{0, 1, 2, 2, 2, 2, 2, 2, 5, 6,  //
                                                              0, 1, 2, 2, 2, 3, 3, 3, 5, 6,  //
                                                              0, 1, 2, 3, 4, 2, 3, 4, 5, 6})
                                  .reshape({3, 10});
  EXPECT_TRUE(at::equal(*positions, expected)) << *positions;
}

TEST(Mrope, TextCountsOnInAllThree) {
  const at::Tensor ids = at::tensor(std::vector<int64_t>{1, 2, 3});
  const Result<at::Tensor> positions = MropePositions(ids, kImage, 0, 0, 2);
  ASSERT_TRUE(positions.ok());
  EXPECT_TRUE(at::equal(*positions, at::arange(3, at::kLong).repeat({3, 1})));
}

TEST(Mrope, TheImagesTokensMustBeOneRunOfItsSize) {
  EXPECT_THAT(Error({1, 9, 9, 9}, 4, 4), AllOf(HasSubstr("3 image"), HasSubstr("expected 4")));
  EXPECT_THAT(Error({1, 9}, 0, 0), HasSubstr("expected 0"));
  EXPECT_THAT(Error({9, 9, 1, 9, 9}, 4, 4), HasSubstr("stand apart"));
}

}  // namespace
}  // namespace prismaquant

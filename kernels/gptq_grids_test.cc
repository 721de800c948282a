#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <limits>
#include <vector>

#include "kernels/gptq.h"
#include "kernels/minifloat.h"
#include "kernels/ops.h"

namespace prismaquant {
namespace {

using ops::GptqGrid;

// More rows than are rounded side by side, and some left over.
constexpr int64_t kOut = 37, kColumns = 256;

at::Tensor Random(int64_t rows, int64_t columns, uint64_t seed) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  return at::randn({rows, columns}, generator, at::kFloat);
}

// Upper triangular with a positive diagonal, as a Cholesky factor.
at::Tensor Factor(int64_t columns) {
  at::Tensor u = at::triu(Random(columns, columns, 5) * 0.05, 1);
  u.diagonal().copy_(Random(1, columns, 6).squeeze(0).abs() + 0.5);
  return u;
}

struct Block {
  at::Tensor weight, scale, codes, error;
};

Block RunBlock(GptqGrid grid, const at::Tensor& weight, const at::Tensor& u,
               const at::Tensor& scale, bool choose_scales) {
  Block block{weight.clone(), scale.clone(), at::empty(weight.sizes(), at::kByte),
              at::empty_like(weight)};
  ops::GptqBlock(grid, block.weight, u, block.scale, block.codes, block.error, 1, choose_scales);
  return block;
}

// A grid in float32 by its definition: values of a column, and the scales that a group may have,
// the codec's first.
struct Definition {
  int64_t group;
  float smallest, largest;
  bool floats;  // E2M1 values and powers of two, else integers
  at::ScalarType scale_type;

  float Round(float x) const {
    if (!floats) return std::nearbyint(std::fmin(std::fmax(x, smallest), largest));
    float best = 0;
    for (const float value : {0.0F, 0.5F, 1.0F, 1.5F, 2.0F, 3.0F, 4.0F, 6.0F}) {
      const float now = std::fabs(value - std::fabs(x)), before = std::fabs(best - std::fabs(x));
      const bool even = value == 0 || value == 1 || value == 2 || value == 4;
      if (now < before || (now == before && even)) best = value;
    }
    return std::copysign(best, x);
  }
  float Stored(float scale) const {
    return at::tensor({scale}).to(scale_type).to(at::kFloat).item<float>();
  }
  std::vector<float> Scales(float amax, bool all) const {
    if (floats) {
      int exponent = 0;
      const float fraction = std::frexp(amax, &exponent);
      const float rule = std::ldexp(1.0F, exponent - 1 + (fraction >= 0.875F ? 1 : 0) - 2);
      return all ? std::vector<float>{rule, rule / 2, rule * 2} : std::vector<float>{rule};
    }
    const float ideal = amax / ((largest - smallest) / 2);
    std::vector<float> scales = {Stored(ideal)};
    for (int step = 10; all && step <= 22; ++step)
      scales.push_back(Stored(ideal * (static_cast<float>(step) / 20)));
    return scales;
  }
};

// What rounding the group column by column under the scale would leave.
float RolledError(const Definition& grid, std::vector<float> w, const float* u, int64_t first,
                  float scale) {
  float sum = 0;
  for (size_t j = 0; j < w.size(); ++j) {
    const float* row = u + (first + static_cast<int64_t>(j)) * kColumns + first;
    const float spread = (w[j] - grid.Round(w[j] / scale) * scale) / row[j];
    sum += spread * spread;
    for (size_t k = j + 1; k < w.size(); ++k) w[k] -= spread * row[k];
  }
  return sum;
}

float BestScale(const Definition& grid, const float* w, const float* u, int64_t first,
                bool choose) {
  float amax = 0;
  for (int64_t i = 0; i < grid.group; ++i) amax = std::fmax(amax, std::fabs(w[i]));
  float best = 0, least = std::numeric_limits<float>::infinity();
  for (const float scale : grid.Scales(amax, choose)) {
    const float sum = RolledError(grid, {w, w + grid.group}, u, first, scale);
    if (sum < least) {
      least = sum;
      best = scale;
    }
  }
  return best;
}

// One row after the other, column after column.
void ExpectDefinition(GptqGrid number, const Definition& grid, bool choose) {
  const at::Tensor weight = Random(kOut, kColumns, 7), u = Factor(kColumns);
  const at::ScalarType type = grid.floats ? at::kByte : grid.scale_type;
  const Block found =
      RunBlock(number, weight, u, at::empty({kOut, kColumns / grid.group}, type), choose);
  const auto* factor = u.const_data_ptr<float>();
  for (int64_t r = 0; r < kOut; ++r) {
    at::Tensor row = weight[r].clone();
    auto* w = row.mutable_data_ptr<float>();
    float scale = 0;
    for (int64_t j = 0; j < kColumns; ++j) {
      if (j % grid.group == 0) {
        scale = BestScale(grid, w + j, factor, j, choose);
        const at::Tensor stored = found.scale[r][j / grid.group];
        ASSERT_EQ(grid.floats ? DecodeE8M0(stored.item<uint8_t>()) : stored.item<float>(), scale)
            << r << " " << j;
      }
      const float value = grid.Round(w[j] / scale);
      const float error = (w[j] - value * scale) / factor[j * kColumns + j];
      w[j] = value * scale;
      for (int64_t k = j + 1; k < kColumns; ++k) w[k] -= error * factor[j * kColumns + k];
      const auto code = found.codes[r][j].item<uint8_t>();
      ASSERT_EQ(grid.floats ? DecodeE2M1(code) : static_cast<float>(code) + grid.smallest, value);
      ASSERT_EQ(found.error[r][j].item<float>(), error);
    }
    EXPECT_TRUE(at::equal(found.weight[r], row)) << r;
  }
}

TEST(GptqGrids, ChooseAndRoundByDefinition) {
  const Definition mxfp4{32, -6, 6, true, at::kByte};
  for (const bool choose : {false, true}) {
    ExpectDefinition(GptqGrid::kE2M1Group32, mxfp4, choose);
    for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kHalf}) {
      ExpectDefinition(GptqGrid::kInt4Group128, {128, -8, 7, false, type}, choose);
    }
    ExpectDefinition(GptqGrid::kInt8Group128, {128, -128, 127, false, at::kBFloat16}, choose);
  }
}

TEST(GptqGrids, WithoutPropagationAndSearchAreTheCodecs) {
  const at::Tensor weight = Random(kOut, kColumns, 8), identity = at::eye(kColumns);
  const Block int4 = RunBlock(GptqGrid::kInt4Group128, weight, identity,
                              at::empty({kOut, kColumns / 128}, at::kBFloat16), false);
  const auto [packed, scale] = ops::IntEncode(weight, 4, at::kBFloat16);
  EXPECT_TRUE(at::equal(int4.scale, scale));
  EXPECT_TRUE(at::equal(int4.weight, ops::IntDecode(packed, scale, 4)));
  const Block int8 = RunBlock(GptqGrid::kInt8Group128, weight, identity,
                              at::empty({kOut, kColumns / 128}, at::kHalf), false);
  const auto [words, scale8] = ops::IntEncode(weight, 8, at::kHalf);
  EXPECT_TRUE(at::equal(int8.scale, scale8));
  EXPECT_TRUE(at::equal(int8.codes.view(at::kInt), words));
  const Block mxfp4 = RunBlock(GptqGrid::kE2M1Group32, weight, identity,
                               at::empty({kOut, kColumns / 32}, at::kByte), false);
  const auto [pairs, power] = ops::Mxfp4Encode(weight);
  EXPECT_TRUE(at::equal(mxfp4.scale, power));
  EXPECT_TRUE(at::equal(mxfp4.weight, ops::Mxfp4Decode(pairs, power)));
}

TEST(GptqGrids, ZerosAndExtremesKeepScalesThatReadersCanUse) {
  at::Tensor weight = at::zeros({5, 128});
  weight[1][0] = std::numeric_limits<float>::infinity();
  weight[2][0] = std::numeric_limits<float>::quiet_NaN();
  weight[3][0] = 1e8;
  weight[4][0] = 1e-9;
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kHalf}) {
    const Block block =
        RunBlock(GptqGrid::kInt4Group128, weight, at::eye(128), at::empty({5, 1}, type), true);
    EXPECT_TRUE(block.scale.isfinite().all().item<bool>()) << type;
    EXPECT_TRUE((block.scale > 0).all().item<bool>()) << type;
  }
  const Block zero = RunBlock(GptqGrid::kInt8Group128, at::zeros({1, 128}), at::eye(128),
                              at::empty({1, 1}, at::kBFloat16), true);
  EXPECT_EQ(zero.scale.item<float>(), 0x1p-7F);
  EXPECT_TRUE((zero.codes == 128).all().item<bool>());
}

TEST(GptqGrids, ArgumentsThatDoNotFit) {
  const at::Tensor weight = at::zeros({2, 128}), u = at::eye(128);
  EXPECT_THROW(RunBlock(GptqGrid::kInt4Group128, weight, u, at::empty({2, 1}, at::kByte), true),
               c10::Error);
  EXPECT_THROW(RunBlock(GptqGrid::kInt4Group128, weight, u, at::empty({2, 4}), true), c10::Error);
  EXPECT_THROW(RunBlock(GptqGrid::kE2M1Group32, weight, u, at::empty({2, 4}), true), c10::Error);
  EXPECT_THROW(
      RunBlock(GptqGrid::kInt8Group128, at::zeros({2, 64}), at::eye(64), at::empty({2, 1}), true),
      c10::Error);
  EXPECT_THROW(RunBlock(static_cast<GptqGrid>(6), weight, u, at::empty({2, 1}), true), c10::Error);
}

}  // namespace
}  // namespace prismaquant

#include "kernels/minifloat.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

namespace prismaquant {
namespace {

constexpr std::array<float, 8> kE2M1 = {0, 0.5F, 1, 1.5F, 2, 3, 4, 6};

// The finite magnitudes of E4M3 from the definition: code 8e + m is (8 + m) 2^(e-10), or m 2^-9 for
// e = 0.
std::vector<float> E4M3Magnitudes() {
  std::vector<float> values;
  for (int code = 0; code < 0x7f; ++code) {
    const int e = code >> 3, m = code & 7;
    values.push_back(e == 0 ? std::ldexp(static_cast<float>(m), -9)
                            : std::ldexp(static_cast<float>(8 + m), e - 10));
  }
  return values;
}

// The nearest of ascending `grid`, ties to the even index, by exhaustive search in double.
float Nearest(std::span<const float> grid, float x) {
  const double a = std::fmin(std::fabs(x), grid.back());
  size_t best = 0;
  for (size_t i = 1; i < grid.size(); ++i) {
    const double now = std::fabs(grid[i] - a), before = std::fabs(grid[best] - a);
    if (now < before || (now == before && i % 2 == 0)) best = i;
  }
  return std::copysign(grid[best], x);
}

bool SameBits(float a, float b) { return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b); }

// All magnitudes of float32 at a stride, and the grid's midpoints with their neighbours.
std::vector<float> Probes(std::span<const float> grid) {
  std::vector<float> values;
  for (uint64_t bits = 0; bits < 0x7f800000U; bits += 104729) {
    values.push_back(std::bit_cast<float>(static_cast<uint32_t>(bits)));
  }
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (size_t i = 0; i + 1 < grid.size(); ++i) {
    const float middle = (grid[i] + grid[i + 1]) / 2;
    values.insert(values.end(), {grid[i], middle, std::nextafter(middle, 0.0F),
                                 std::nextafter(middle, kInfinity)});
  }
  values.insert(values.end(), {grid.back(), std::numeric_limits<float>::max(), kInfinity});
  const size_t positive = values.size();
  for (size_t i = 0; i < positive; ++i) values.push_back(-values[i]);
  return values;
}

TEST(E2M1, CodesDecodeToTheTableAndBack) {
  for (uint8_t code = 0; code < 16; ++code) {
    const float value = DecodeE2M1(code);
    EXPECT_TRUE(SameBits(value, code < 8 ? kE2M1[code] : -kE2M1[code - 8])) << int{code};
    EXPECT_EQ(EncodeE2M1(value), code);
  }
}

TEST(E2M1, TiesGoToTheEvenCode) {
  const std::array<std::array<float, 2>, 7> ties = {
      {{0.25F, 0}, {0.75F, 1}, {1.25F, 1}, {1.75F, 2}, {2.5F, 2}, {3.5F, 4}, {5, 4}}};
  for (const auto& [x, expected] : ties) {
    EXPECT_EQ(RoundToE2M1(x), expected) << x;
    EXPECT_EQ(RoundToE2M1(-x), -expected) << x;
  }
}

TEST(E2M1, RoundsToTheNearest) {
  for (const float x : Probes(kE2M1)) {
    ASSERT_TRUE(SameBits(RoundToE2M1(x), Nearest(kE2M1, x))) << x << " gave " << RoundToE2M1(x);
  }
}

TEST(E4M3, CodesDecodeToTheDefinitionAndBack) {
  const std::vector<float> magnitudes = E4M3Magnitudes();
  ASSERT_EQ(magnitudes.back(), 448.0F);
  for (int code = 0; code < 256; ++code) {
    const float value = DecodeE4M3(static_cast<uint8_t>(code));
    if ((code & 0x7f) == 0x7f) {
      EXPECT_TRUE(std::isnan(value)) << code;
      continue;
    }
    const float magnitude = magnitudes[static_cast<size_t>(code & 0x7f)];
    EXPECT_TRUE(SameBits(value, code < 128 ? magnitude : -magnitude)) << code;
    EXPECT_EQ(EncodeE4M3(value), code);
  }
}

TEST(E4M3, RoundsToTheNearest) {
  const std::vector<float> magnitudes = E4M3Magnitudes();
  for (const float x : Probes(magnitudes)) {
    ASSERT_TRUE(SameBits(RoundToE4M3(x), Nearest(magnitudes, x)))
        << x << " gave " << RoundToE4M3(x);
  }
}

TEST(E8M0, DecodesToPowersOfTwo) {
  for (int code = 0; code < 255; ++code) {
    EXPECT_EQ(DecodeE8M0(static_cast<uint8_t>(code)), std::ldexp(1.0F, code - 127)) << code;
  }
  EXPECT_TRUE(std::isnan(DecodeE8M0(255)));
}

TEST(E8M0, ScaleIsPromotedFromAMantissaOfSevenQuarters) {
  EXPECT_EQ(Mxfp8ScaleCode(1.0F), 119);
  EXPECT_EQ(Mxfp8ScaleCode(1.74F), 119);
  EXPECT_EQ(Mxfp8ScaleCode(std::nextafter(1.75F, 0.0F)), 119);
  EXPECT_EQ(Mxfp8ScaleCode(1.75F), 120);
  EXPECT_EQ(Mxfp8ScaleCode(448.0F), 128);
  EXPECT_EQ(Mxfp8ScaleCode(0.0F), 0);
  EXPECT_EQ(Mxfp8ScaleCode(1e-40F), 0);
  EXPECT_LT(Mxfp8ScaleCode(std::numeric_limits<float>::max()), 255);
}

TEST(Nibbles, TheEvenColumnIsTheLowOne) {
  std::array<uint8_t, 16> codes = {1, 15, 5, 9};
  for (size_t i = 4; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>((7 * i) % 16);
  std::array<uint8_t, 8> packed = {};
  PackNibbles(codes.data(), packed.data());
  EXPECT_EQ(packed[0], 0xf1);
  EXPECT_EQ(packed[1], 0x95);
  for (size_t i = 0; i < packed.size(); ++i) {
    EXPECT_EQ(packed[i], codes[2 * i] | codes[2 * i + 1] << 4) << i;
  }
  std::array<uint8_t, 16> unpacked = {};
  UnpackNibbles(packed.data(), unpacked.data());
  EXPECT_EQ(unpacked, codes);
}

TEST(Magnitude, TheLargestOfEitherSign) {
  const std::array<float, 5> values = {0.5F, -3, 2, -0.0F, 1e-40F};
  EXPECT_EQ(LargestMagnitude(values.data(), 5), 3.0F);
  EXPECT_EQ(LargestMagnitude(values.data(), 0), 0.0F);
  EXPECT_EQ(LargestMagnitude(values.data() + 3, 2), 1e-40F);
}

}  // namespace
}  // namespace prismaquant

#ifndef PRISMAQUANT_KERNELS_MINIFLOAT_H_
#define PRISMAQUANT_KERNELS_MINIFLOAT_H_

// The small floating-point types of the formats: E2M1 (FP4), E4M3 (FP8, finite, largest 448) and E8M0 (a power of two).
// Rounding is to nearest, ties to even, saturating; every function is branch-free so that loops over it vectorise, and
// exact, so that all instruction sets give the same bits. Layouts: docs/formats.md.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

// Compiles a function once per instruction set; the loader picks the widest that the processor has.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PQ_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define PQ_MULTIVERSION
#endif
// Helpers of such a function must be inlined into it to be compiled for its instruction set.
#define PQ_INLINE inline __attribute__((always_inline))

namespace prismaquant {

inline constexpr int64_t kNvfp4GroupSize = 16;
inline constexpr int64_t kMxGroupSize = 32;
inline constexpr float kE2M1Max = 6.0F;
inline constexpr float kE4M3Max = 448.0F;
inline constexpr float kSmallestE4M3Normal = 0x1p-6F;

// Adding and subtracting 1.5 * 2^23 * step rounds |x| < 2^22 * step to a multiple of step, ties to even.
PQ_INLINE float RoundToMultiple(float x, float step) {
  const float magic = 12582912.0F * step;
  return (x + magic) - magic;
}

// Nearest value of {0, 0.5, 1, 1.5, 2, 3, 4, 6} with x's sign.
PQ_INLINE float RoundToE2M1(float x) {
  const float a = std::min(std::fabs(x), kE2M1Max);
  const float step = a < 2.0F ? 0.5F : (a < 4.0F ? 1.0F : 2.0F);
  return std::copysign(RoundToMultiple(a, step), x);
}

// 4-bit code of a value on the E2M1 grid; bit 3 is the sign, also that of zero.
PQ_INLINE uint8_t EncodeE2M1(float value) {
  const float a = std::fabs(value);
  const float code = a < 2.0F ? 2.0F * a : (a < 4.0F ? a + 2.0F : 0.5F * a + 4.0F);
  const uint32_t sign = std::bit_cast<uint32_t>(value) >> 31;
  return static_cast<uint8_t>(static_cast<int32_t>(code) | static_cast<int32_t>(sign << 3));
}

PQ_INLINE float DecodeE2M1(uint8_t code) {
  const auto index = static_cast<float>(code & 7);
  const float a = index < 4.0F ? 0.5F * index : (index < 6.0F ? index - 2.0F : 2.0F * index - 8.0F);
  return (code & 8) != 0 ? -a : a;
}

// Nearest finite E4M3 value.
PQ_INLINE float RoundToE4M3(float x) {
  const float a = std::min(std::fabs(x), kE4M3Max);
  const float subnormal = RoundToMultiple(a, 0x1p-9F);
  const auto bits = std::bit_cast<uint32_t>(a);
  const uint32_t rounded = (bits + 0x7ffffU + (bits >> 20 & 1U)) & 0xfff00000U;
  return std::copysign(a < kSmallestE4M3Normal ? subnormal : std::bit_cast<float>(rounded), x);
}

// 8-bit code of a value on the E4M3 grid.
PQ_INLINE uint8_t EncodeE4M3(float value) {
  const float a = std::fabs(value);
  const auto bits = std::bit_cast<uint32_t>(a);
  const uint32_t normal = (bits >> 20) - (120U << 3);
  const auto subnormal = static_cast<uint32_t>(static_cast<int32_t>(std::min(a, 1.0F) * 512.0F));
  const uint32_t magnitude = a < kSmallestE4M3Normal ? subnormal : normal;
  return static_cast<uint8_t>(magnitude | std::bit_cast<uint32_t>(value) >> 31 << 7);
}

// NaN for the codes 0x7f and 0xff.
PQ_INLINE float DecodeE4M3(uint8_t code) {
  const uint32_t magnitude = code & 0x7fU;
  const float subnormal = static_cast<float>(magnitude) * 0x1p-9F;
  const float normal = std::bit_cast<float>((magnitude << 20) + (120U << 23));
  const float a = magnitude < 8 ? subnormal : (magnitude == 0x7f ? std::nanf("") : normal);
  return (code & 0x80) != 0 ? -a : a;
}

// 2^(code - 127); NaN for 255.
PQ_INLINE float DecodeE8M0(uint8_t code) {
  if (code == 255) return std::nanf("");
  return std::bit_cast<float>(code == 0 ? 0x00400000U : static_cast<uint32_t>(code) << 23);
}

// The E8M0 code of an MXFP8 group by its largest magnitude: floor(log2 amax) - 8, one higher if the mantissa of amax is at
// least 1.75, so that no value saturates by more than rounding.
PQ_INLINE uint8_t Mxfp8ScaleCode(float amax) {
  const uint32_t power = (std::bit_cast<uint32_t>(amax) + 0x00200000U) >> 23;
  return static_cast<uint8_t>(power > 8 ? std::min(power - 8, 254U) : 0U);
}

// Largest magnitude of n values.
PQ_INLINE float LargestMagnitude(const float* values, int64_t n) {
  float largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(values[i]));
  return largest;
}

}  // namespace prismaquant

#endif  // PRISMAQUANT_KERNELS_MINIFLOAT_H_

#ifndef PRISMAQUANT_KERNELS_MINIFLOAT_H_
#define PRISMAQUANT_KERNELS_MINIFLOAT_H_

// The small floating-point types of the formats: E2M1 (FP4), E4M3 (FP8, finite, largest 448) and
// E8M0 (a power of two). Rounding is to nearest, ties to even, saturating; every function is
// branch-free so that loops over it vectorise, and exact, so that all instruction sets give the
// same bits. Layouts: docs/formats.md.

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/multiversion.h"

static_assert(std::endian::native == std::endian::little);

namespace prismaquant {

inline constexpr int64_t kNvfp4GroupSize = 16;
inline constexpr int64_t kMxGroupSize = 32;
// What compressed-tensors puts in place of a group scale that rounds to zero.
inline constexpr float kNvfp4ZeroScale = 0.125F;
inline constexpr float kE2M1Max = 6.0F;
inline constexpr float kE4M3Max = 448.0F;
inline constexpr int kE4M3LargestCode = 0x7E;                   // of 448
inline constexpr int32_t kSmallestE4M3NormalBits = 0x3c800000;  // of 2^-6
inline constexpr int32_t kHalfBits = 0x3f000000;                // of 0.5
inline constexpr int32_t kQuietNanBits = 0x7fc00000;

// By value, unlike std::min and std::max, whose references keep GCC from vectorising.
PQ_INLINE int32_t Least(int32_t a, int32_t b) { return a < b ? a : b; }
PQ_INLINE int32_t Greatest(int32_t a, int32_t b) { return a > b ? a : b; }

// Adding zero turns -0 into +0, as compressed-tensors' E2M1 rounding and the zero point of its
// activation quantizers do. A negative number that rounds to zero keeps its sign.
PQ_INLINE float WithoutNegativeZero(float x) { return x + 0.0F; }

// Magnitude a rounded to kMantissaBits, the exponents below kSmallestExponent (biased by 127)
// sharing one spacing. Adding and subtracting 1.5 * 2^23 spacings rounds to a multiple of the
// spacing, ties to even.
template <int32_t kMantissaBits, int32_t kSmallestExponent>
PQ_INLINE float RoundMagnitude(float a) {
  const int32_t exponent =
      Greatest(std::bit_cast<int32_t>(a) & 0x7f800000, kSmallestExponent << 23);
  const auto magic = std::bit_cast<float>((exponent + ((23 - kMantissaBits) << 23)) | 0x00400000);
  return (a + magic) - magic;
}

// The bits of |x|, which are ordered as the magnitudes are, NaN above all.
PQ_INLINE int32_t MagnitudeBits(float x) { return std::bit_cast<int32_t>(x) & 0x7fffffff; }

// |x|, at most `largest`; NaN becomes `largest`.
PQ_INLINE float ClampedMagnitude(float x, float largest) {
  return std::bit_cast<float>(Least(MagnitudeBits(x), std::bit_cast<int32_t>(largest)));
}

// Nearest value of {0, 0.5, 1, 1.5, 2, 3, 4, 6} with x's sign.
PQ_INLINE float RoundToE2M1(float x) {
  return std::copysign(RoundMagnitude<1, 127>(ClampedMagnitude(x, kE2M1Max)), x);
}

// 4-bit code of a value on the E2M1 grid; bit 3 is the sign, also that of zero.
PQ_INLINE uint8_t EncodeE2M1(float value) {
  const int32_t bits = MagnitudeBits(value);
  const int32_t code = Greatest((bits >> 22) - (126 << 1), Least(bits, 1));
  return static_cast<uint8_t>(static_cast<uint32_t>(code) |
                              std::bit_cast<uint32_t>(value) >> 31 << 3);
}

PQ_INLINE float DecodeE2M1(uint8_t code) {
  const int32_t index = code & 7;
  const int32_t normal = (index << 22) + (126 << 23);
  const int32_t bits = index < 2 ? index * kHalfBits : normal;
  return std::bit_cast<float>(static_cast<uint32_t>(bits) | (code & 8U) << 28);
}

// Nearest finite E4M3 value.
PQ_INLINE float RoundToE4M3(float x) {
  return std::copysign(RoundMagnitude<3, 121>(ClampedMagnitude(x, kE4M3Max)), x);
}

// 8-bit code of a value on the E4M3 grid.
PQ_INLINE uint8_t EncodeE4M3(float value) {
  const int32_t bits = MagnitudeBits(value);
  const int32_t normal = (bits >> 20) - (120 << 3);
  const auto subnormal = static_cast<int32_t>(ClampedMagnitude(value, 1.0F) * 512.0F);
  const int32_t is_subnormal = (bits - kSmallestE4M3NormalBits) >> 31;
  const int32_t magnitude = normal + ((subnormal - normal) & is_subnormal);
  return static_cast<uint8_t>(static_cast<uint32_t>(magnitude) |
                              std::bit_cast<uint32_t>(value) >> 31 << 7);
}

// NaN for the codes 0x7f and 0xff.
PQ_INLINE float DecodeE4M3(uint8_t code) {
  const int32_t magnitude = code & 0x7f;
  const auto subnormal = std::bit_cast<int32_t>(static_cast<float>(magnitude) * 0x1p-9F);
  const int32_t finite = magnitude < 8 ? subnormal : (magnitude << 20) + (120 << 23);
  const int32_t bits = magnitude == 0x7f ? kQuietNanBits : finite;
  return std::bit_cast<float>(static_cast<uint32_t>(bits) | (code & 0x80U) << 24);
}

// 2^(code - 127); NaN for 255.
PQ_INLINE float DecodeE8M0(uint8_t code) {
  const int32_t power = code == 0 ? 0x00400000 : code << 23;
  return std::bit_cast<float>(code == 255 ? kQuietNanBits : power);
}

// The E8M0 code of a group by its largest magnitude: floor(log2 amax) - kElementExponent, that of
// the largest element, and one higher if the mantissa of amax is at least 1.75.
template <int32_t kElementExponent>
PQ_INLINE uint8_t MxScaleCode(float amax) {
  const uint32_t power = (std::bit_cast<uint32_t>(amax) + 0x00200000U) >> 23;
  return static_cast<uint8_t>(Greatest(static_cast<int32_t>(power) - kElementExponent, 0));
}

// No value saturates by more than rounding.
PQ_INLINE uint8_t Mxfp8ScaleCode(float amax) { return MxScaleCode<8>(amax); }
// A group whose largest magnitude has a mantissa in (1.5, 1.75) saturates at 6.
PQ_INLINE uint8_t Mxfp4ScaleCode(float amax) { return MxScaleCode<2>(amax); }

// Largest magnitude of n values; NaN if one is NaN.
PQ_INLINE float LargestMagnitude(const float* values, int64_t n) {
  int32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = Greatest(largest, MagnitudeBits(values[i]));
  return std::bit_cast<float>(largest);
}

// 16 E2M1 codes, one per byte, to 8 bytes: the code of an even column in the low nibble.
PQ_INLINE void PackNibbles(const uint8_t* codes, uint8_t* packed) {
  for (int half = 0; half < 2; ++half) {
    uint64_t v = 0;
    std::memcpy(&v, codes + 8 * half, 8);
    v = (v | v >> 4) & 0x00ff00ff00ff00ffU;
    v = (v | v >> 8) & 0x0000ffff0000ffffU;
    const auto bytes = static_cast<uint32_t>(v | v >> 16);
    std::memcpy(packed + 4 * half, &bytes, 4);
  }
}

// The inverse of PackNibbles.
PQ_INLINE void UnpackNibbles(const uint8_t* packed, uint8_t* codes) {
  for (int half = 0; half < 2; ++half) {
    uint32_t bytes = 0;
    std::memcpy(&bytes, packed + 4 * half, 4);
    uint64_t v = bytes;
    v = (v | v << 16) & 0x0000ffff0000ffffU;
    v = (v | v << 8) & 0x00ff00ff00ff00ffU;
    v = (v | v << 4) & 0x0f0f0f0f0f0f0f0fU;
    std::memcpy(codes + 8 * half, &v, 8);
  }
}

}  // namespace prismaquant

#endif  // PRISMAQUANT_KERNELS_MINIFLOAT_H_

#ifndef PRISMAQUANT_KERNELS_INTEGER_CODES_H_
#define PRISMAQUANT_KERNELS_INTEGER_CODES_H_

// The signed integers of the weight-only formats, of 4 or 8 bits: q in [-2^(bits-1), 2^(bits-1) -
// 1], stored as the code q + 2^(bits-1). Rounding is to nearest, ties to even, saturating; all
// branch-free, as in minifloat.h.

#include <bit>
#include <cmath>
#include <cstdint>

#include "kernels/minifloat.h"

namespace prismaquant {

inline constexpr int64_t kIntGroupSize = 128;

// A group's scale is its largest magnitude over this: half the width of the range of codes.
constexpr float IntHalfRange(int bits) { return bits == 4 ? 7.5F : 127.5F; }

// Nearest integer in range. Adding 1.5 * 2^23 rounds to a multiple of one, ties to even, and leaves
// the integer in the low bits.
template <int kBits>
PQ_INLINE float RoundToInt(float x) {
  constexpr int32_t kBound = 1 << (kBits - 1);
  constexpr float kMagic = 0x1.8p23F;
  const float bounded = std::copysign(ClampedMagnitude(x, static_cast<float>(kBound)), x);
  const int32_t rounded = std::bit_cast<int32_t>(bounded + kMagic) - std::bit_cast<int32_t>(kMagic);
  return static_cast<float>(Least(rounded, kBound - 1));
}

// The code of an integer in range.
template <int kBits>
PQ_INLINE uint8_t EncodeInt(float value) {
  return static_cast<uint8_t>(static_cast<int32_t>(value) + (1 << (kBits - 1)));
}

template <int kBits>
PQ_INLINE float DecodeInt(uint8_t code) {
  return static_cast<float>(static_cast<int32_t>(code) - (1 << (kBits - 1)));
}

}  // namespace prismaquant

#endif  // PRISMAQUANT_KERNELS_INTEGER_CODES_H_

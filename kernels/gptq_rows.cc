#include "kernels/gptq_rows.h"

#include <algorithm>

#include "kernels/integer_codes.h"
#include "kernels/minifloat.h"

namespace prismaquant::rows {
namespace {

// Group scales of E2M1 are searched among this many E4M3 codes, two octaves, from half of the one
// that maps the largest magnitude to 6.
constexpr int kE2M1Candidates = 16;
constexpr float kSmallestMultiple = 0.5F;
// Of MX formats: the codec's scale, half of it and twice it.
constexpr int kE8M0Candidates = 3;
// Scales of integers are searched in twentieths of the codec's, from 0.5 to 1.1.
constexpr int kFirstIntStep = 10;
constexpr int kLastIntStep = 22;
constexpr float kIntStepsOfOne = 20;
constexpr int kIntStepsOfOneCandidate = 10;  // the codec's own among them
// The codec's scale for a group whose own rounds to zero.
constexpr float kNvfp4ZeroScale = 0.125F;

// As the codec, which gives a quotient of -0 the code 0.
PQ_INLINE float WithoutNegativeZero(float x) { return x + 0.0F; }

// Spreads the error of column j over the columns right of it.
PQ_INLINE void Propagate(const GptqBlockView& block, int64_t j, float spread, float* w) {
  const float* u = block.u + j * block.columns;
  for (int64_t k = j + 1; k < block.columns; ++k) w[k] -= spread * u[k];
}

// What a column's code can mean.
struct E2M1 {
  static PQ_INLINE float Round(float x) { return RoundToE2M1(WithoutNegativeZero(x)); }
  static PQ_INLINE uint8_t Encode(float value) { return EncodeE2M1(value); }
  static PQ_INLINE uint8_t MxScale(float amax) { return Mxfp4ScaleCode(amax); }
};
struct E4M3 {
  static PQ_INLINE float Round(float x) { return RoundToE4M3(x); }
  static PQ_INLINE uint8_t Encode(float value) { return EncodeE4M3(value); }
  static PQ_INLINE uint8_t MxScale(float amax) { return Mxfp8ScaleCode(amax); }
};
template <int kBits>
struct Int {
  static PQ_INLINE float Round(float x) { return RoundToInt<kBits>(x); }
  static PQ_INLINE uint8_t Encode(float value) { return EncodeInt<kBits>(value); }
};

// For each scale, the error that rounding the group column by column under it would leave,
// sum_j ((q_j - w_j) / u_jj)^2 with w_j as compensated by then. Candidates lie side by side, so
// that they are computed at once.
template <typename Element, int64_t kGroup, int kCandidates>
PQ_INLINE void GroupErrors(const GptqBlockView& block, int64_t begin, const float* w,
                           const float* scales, float* errors) {
  float remaining[kGroup][kCandidates];
  float spread[kCandidates];
  for (int64_t j = 0; j < kGroup; ++j) {
    for (int c = 0; c < kCandidates; ++c) remaining[j][c] = w[j];
  }
  for (int c = 0; c < kCandidates; ++c) errors[c] = 0;
    // Unrolled, a group of 16 stays in registers.
#pragma GCC unroll 16
  for (int64_t j = 0; j < kGroup; ++j) {
    const float* u = block.u + (begin + j) * block.columns + begin;
    for (int c = 0; c < kCandidates; ++c) {
      const float quantized = Element::Round(remaining[j][c] / scales[c]) * scales[c];
      spread[c] = (remaining[j][c] - quantized) / u[j];
      errors[c] += spread[c] * spread[c];
    }
#pragma GCC unroll 16
    for (int64_t k = j + 1; k < kGroup; ++k) {
      for (int c = 0; c < kCandidates; ++c) remaining[k][c] -= spread[c] * u[k];
    }
  }
}

// The candidate with the least error; of equals `preferred`, else the first.
PQ_INLINE int Best(const float* errors, int count, int preferred) {
  int best = preferred;
  for (int c = 0; c < count; ++c) {
    if (errors[c] < errors[best]) best = c;
  }
  return best;
}

// The E4M3 code of the group's scale: the codec's rule, or the code in the searched range with the
// least error.
PQ_INLINE uint8_t ChooseE2M1Scale(const GptqBlockView& block, int64_t begin, const float* w) {
  const float largest = LargestMagnitude(w, kNvfp4GroupSize);
  const float ideal = block.global_scale * (largest / kE2M1Max);
  int rule = EncodeE4M3(RoundToE4M3(ideal));
  if (rule == 0) rule = EncodeE4M3(kNvfp4ZeroScale);
  if (!block.choose_scales || largest == 0) return static_cast<uint8_t>(rule);
  const int first = std::max<int>(1, EncodeE4M3(RoundToE4M3(ideal * kSmallestMultiple)));
  uint8_t codes[kE2M1Candidates];
  float scales[kE2M1Candidates], errors[kE2M1Candidates];
  for (int c = 0; c < kE2M1Candidates; ++c) {
    codes[c] = static_cast<uint8_t>(std::min<int>(first + c, kE4M3LargestCode));
    scales[c] = DecodeE4M3(codes[c]) / block.global_scale;
  }
  GroupErrors<E2M1, kNvfp4GroupSize, kE2M1Candidates>(block, begin, w, scales, errors);
  const int preferred = std::clamp(rule - first, 0, kE2M1Candidates - 1);
  return codes[Best(errors, kE2M1Candidates, preferred)];
}

// The E8M0 code of the group's scale: the codec's, or one of its neighbours with less error.
template <typename Element>
PQ_INLINE uint8_t ChooseE8M0Scale(const GptqBlockView& block, int64_t begin, const float* w) {
  const int rule = Element::MxScale(LargestMagnitude(w, kMxGroupSize));
  if (!block.choose_scales || rule <= 1 || rule >= 253) return static_cast<uint8_t>(rule);
  float scales[kE8M0Candidates], errors[kE8M0Candidates];
  for (int c = 0; c < kE8M0Candidates; ++c) {
    scales[c] = DecodeE8M0(static_cast<uint8_t>(rule + c - 1));
  }
  GroupErrors<Element, kMxGroupSize, kE8M0Candidates>(block, begin, w, scales, errors);
  return static_cast<uint8_t>(rule + Best(errors, kE8M0Candidates, 1) - 1);
}

// The group's scale as stored: the codec's, or the multiple of it in the searched range with the
// least error.
template <int kBits>
PQ_INLINE float ChooseIntScale(const GptqBlockView& block, int64_t begin, const float* w) {
  constexpr int kCandidates = kLastIntStep - kFirstIntStep + 1;
  const float largest = LargestMagnitude(w, kIntGroupSize);
  const float ideal = largest / IntHalfRange(kBits);
  if (!block.choose_scales || largest == 0) return block.stored_scale(ideal);
  float scales[kCandidates], errors[kCandidates];
  for (int c = 0; c < kCandidates; ++c) {
    scales[c] =
        block.stored_scale(ideal * (static_cast<float>(kFirstIntStep + c) / kIntStepsOfOne));
  }
  GroupErrors<Int<kBits>, kIntGroupSize, kCandidates>(block, begin, w, scales, errors);
  return scales[Best(errors, kCandidates, kIntStepsOfOneCandidate)];
}

template <typename Element>
PQ_INLINE void RoundColumn(const GptqBlockView& block, int64_t j, float scale, float* w,
                           uint8_t* codes, float* error) {
  const float value = Element::Round(w[j] / scale);
  const float quantized = value * scale;
  codes[j] = Element::Encode(value);
  error[j] = (w[j] - quantized) / block.u[j * block.columns + j];
  w[j] = quantized;
  Propagate(block, j, error[j], w);
}

template <typename Element>
PQ_INLINE void MxGroup32(const GptqBlockView& block, float* w, uint8_t* scale, uint8_t* codes,
                         float* error) {
  float effective = 1;
  for (int64_t j = 0; j < block.columns; ++j) {
    if (j % kMxGroupSize == 0) {
      scale[j / kMxGroupSize] = ChooseE8M0Scale<Element>(block, j, w + j);
      effective = DecodeE8M0(scale[j / kMxGroupSize]);
    }
    RoundColumn<Element>(block, j, effective, w, codes, error);
  }
}

template <int kBits>
PQ_INLINE void IntGroup128(const GptqBlockView& block, float* w, float* scale, uint8_t* codes,
                           float* error) {
  for (int64_t j = 0; j < block.columns; ++j) {
    if (j % kIntGroupSize == 0) scale[j / kIntGroupSize] = ChooseIntScale<kBits>(block, j, w + j);
    RoundColumn<Int<kBits>>(block, j, scale[j / kIntGroupSize], w, codes, error);
  }
}

}  // namespace

PQ_MULTIVERSION
void GptqE2M1Group16(const GptqBlockView& block, float* w, uint8_t* scale, uint8_t* codes,
                     float* error) {
  float effective = 1;
  for (int64_t j = 0; j < block.columns; ++j) {
    if (j % kNvfp4GroupSize == 0) {
      const uint8_t code = ChooseE2M1Scale(block, j, w + j);
      scale[j / kNvfp4GroupSize] = code;
      effective = DecodeE4M3(code) / block.global_scale;
    }
    RoundColumn<E2M1>(block, j, effective, w, codes, error);
  }
}

PQ_MULTIVERSION
void GptqE4M3Group32(const GptqBlockView& block, float* w, uint8_t* scale, uint8_t* codes,
                     float* error) {
  MxGroup32<E4M3>(block, w, scale, codes, error);
}

PQ_MULTIVERSION
void GptqE2M1Group32(const GptqBlockView& block, float* w, uint8_t* scale, uint8_t* codes,
                     float* error) {
  MxGroup32<E2M1>(block, w, scale, codes, error);
}

PQ_MULTIVERSION
void GptqInt4Group128(const GptqBlockView& block, float* w, float* scale, uint8_t* codes,
                      float* error) {
  IntGroup128<4>(block, w, scale, codes, error);
}

PQ_MULTIVERSION
void GptqInt8Group128(const GptqBlockView& block, float* w, float* scale, uint8_t* codes,
                      float* error) {
  IntGroup128<8>(block, w, scale, codes, error);
}

PQ_MULTIVERSION
void GptqE4M3Row(const GptqBlockView& block, float* w, float scale, uint8_t* codes, float* error) {
  for (int64_t j = 0; j < block.columns; ++j) RoundColumn<E4M3>(block, j, scale, w, codes, error);
}

}  // namespace prismaquant::rows

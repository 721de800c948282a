#include "kernels/gptq_rows.h"

#include <algorithm>

#include "kernels/integer_codes.h"
#include "kernels/minifloat.h"

namespace prismaquant::rows {
namespace {

// Group scales are searched among the E4M3 codes between these multiples of the one that maps the
// largest magnitude to 6.
constexpr float kSmallestMultiple = 0.5F;
constexpr float kLargestMultiple = 2.0F;
// Scales of integers are searched in twentieths of the codec's, from 0.5 to 1.1.
constexpr int kFirstIntStep = 10;
constexpr int kLastIntStep = 22;
constexpr float kIntStepsOfOne = 20;
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

template <typename Element, int64_t kGroup>
PQ_INLINE float GroupError(const float* w, const float* importance, float scale) {
  float sum = 0;
  float errors[kGroup];
  for (int64_t i = 0; i < kGroup; ++i) {
    const float difference = Element::Round(w[i] / scale) * scale - w[i];
    errors[i] = difference * difference * importance[i];
  }
  for (int64_t i = 0; i < kGroup; ++i) sum += errors[i];
  return sum;
}

// The E4M3 code of the group's scale: the codec's rule, or the code in the searched range with the
// least weighted error.
PQ_INLINE uint8_t ChooseE2M1Scale(const GptqBlockView& block, int64_t begin, const float* w) {
  const float largest = LargestMagnitude(w, kNvfp4GroupSize);
  const float ideal = block.global_scale * (largest / kE2M1Max);
  uint8_t best = EncodeE4M3(RoundToE4M3(ideal));
  if (best == 0) best = EncodeE4M3(kNvfp4ZeroScale);
  if (!block.choose_scales || largest == 0) return best;
  const uint8_t first = std::max<uint8_t>(1, EncodeE4M3(RoundToE4M3(ideal * kSmallestMultiple)));
  const uint8_t last = std::max<uint8_t>(first, EncodeE4M3(RoundToE4M3(ideal * kLargestMultiple)));
  float least = GroupError<E2M1, kNvfp4GroupSize>(w, block.importance + begin,
                                                  DecodeE4M3(best) / block.global_scale);
  for (int code = first; code <= last; ++code) {
    const float error = GroupError<E2M1, kNvfp4GroupSize>(
        w, block.importance + begin, DecodeE4M3(static_cast<uint8_t>(code)) / block.global_scale);
    if (error < least) {
      least = error;
      best = static_cast<uint8_t>(code);
    }
  }
  return best;
}

// The E8M0 code of the group's scale: the codec's, or one of its neighbours with less weighted
// error.
template <typename Element>
PQ_INLINE uint8_t ChooseE8M0Scale(const GptqBlockView& block, int64_t begin, const float* w) {
  const int rule = Element::MxScale(LargestMagnitude(w, kMxGroupSize));
  if (!block.choose_scales || rule <= 1 || rule >= 253) return static_cast<uint8_t>(rule);
  int best = rule;
  float least = GroupError<Element, kMxGroupSize>(w, block.importance + begin,
                                                  DecodeE8M0(static_cast<uint8_t>(rule)));
  for (const int code : {rule - 1, rule + 1}) {
    const float error = GroupError<Element, kMxGroupSize>(w, block.importance + begin,
                                                          DecodeE8M0(static_cast<uint8_t>(code)));
    if (error < least) {
      least = error;
      best = code;
    }
  }
  return static_cast<uint8_t>(best);
}

// The group's scale as stored: the codec's, or the multiple of it in the searched range with the
// least weighted error.
template <int kBits>
PQ_INLINE float ChooseIntScale(const GptqBlockView& block, int64_t begin, const float* w) {
  const float largest = LargestMagnitude(w, kIntGroupSize);
  const float ideal = largest / IntHalfRange(kBits);
  float best = block.stored_scale(ideal);
  if (!block.choose_scales || largest == 0) return best;
  float least = GroupError<Int<kBits>, kIntGroupSize>(w, block.importance + begin, best);
  for (int step = kFirstIntStep; step <= kLastIntStep; ++step) {
    const float scale = block.stored_scale(ideal * (static_cast<float>(step) / kIntStepsOfOne));
    const float error = GroupError<Int<kBits>, kIntGroupSize>(w, block.importance + begin, scale);
    if (error < least) {
      least = error;
      best = scale;
    }
  }
  return best;
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

#include "kernels/gptq_rows.h"

#include <algorithm>

#include "kernels/minifloat.h"

namespace prismaquant::rows {
namespace {

// Group scales are searched among the E4M3 codes between these multiples of the one that maps the
// largest magnitude to 6.
constexpr float kSmallestMultiple = 0.5F;
constexpr float kLargestMultiple = 2.0F;
// The codec's scale for a group whose own rounds to zero.
constexpr float kNvfp4ZeroScale = 0.125F;

// As the codec, which gives a quotient of -0 the code 0.
PQ_INLINE float WithoutNegativeZero(float x) { return x + 0.0F; }

// Spreads the error of column j over the columns right of it.
PQ_INLINE void Propagate(const GptqBlockView& block, int64_t j, float spread, float* w) {
  const float* u = block.u + j * block.columns;
  for (int64_t k = j + 1; k < block.columns; ++k) w[k] -= spread * u[k];
}

PQ_INLINE float E2M1GroupError(const float* w, const float* importance, float scale) {
  float sum = 0;
  float errors[kNvfp4GroupSize];
  for (int64_t i = 0; i < kNvfp4GroupSize; ++i) {
    const float difference = RoundToE2M1(w[i] / scale) * scale - w[i];
    errors[i] = difference * difference * importance[i];
  }
  for (int64_t i = 0; i < kNvfp4GroupSize; ++i) sum += errors[i];
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
  float least = E2M1GroupError(w, block.importance + begin, DecodeE4M3(best) / block.global_scale);
  for (int code = first; code <= last; ++code) {
    const float error = E2M1GroupError(w, block.importance + begin,
                                       DecodeE4M3(static_cast<uint8_t>(code)) / block.global_scale);
    if (error < least) {
      least = error;
      best = static_cast<uint8_t>(code);
    }
  }
  return best;
}

PQ_INLINE float E4M3GroupError(const float* w, const float* importance, float scale) {
  float errors[kMxGroupSize];
  float sum = 0;
  for (int64_t i = 0; i < kMxGroupSize; ++i) {
    const float difference = RoundToE4M3(w[i] / scale) * scale - w[i];
    errors[i] = difference * difference * importance[i];
  }
  for (int64_t i = 0; i < kMxGroupSize; ++i) sum += errors[i];
  return sum;
}

// The E8M0 code of the group's scale: the codec's, or one of its neighbours with less weighted
// error.
PQ_INLINE uint8_t ChooseE8M0Scale(const GptqBlockView& block, int64_t begin, const float* w) {
  const int rule = Mxfp8ScaleCode(LargestMagnitude(w, kMxGroupSize));
  if (!block.choose_scales || rule <= 1 || rule >= 253) return static_cast<uint8_t>(rule);
  int best = rule;
  float least = E4M3GroupError(w, block.importance + begin, DecodeE8M0(static_cast<uint8_t>(rule)));
  for (const int code : {rule - 1, rule + 1}) {
    const float error =
        E4M3GroupError(w, block.importance + begin, DecodeE8M0(static_cast<uint8_t>(code)));
    if (error < least) {
      least = error;
      best = code;
    }
  }
  return static_cast<uint8_t>(best);
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
    const float value = RoundToE2M1(WithoutNegativeZero(w[j] / effective));
    const float quantized = value * effective;
    codes[j] = EncodeE2M1(value);
    error[j] = (w[j] - quantized) / block.u[j * block.columns + j];
    w[j] = quantized;
    Propagate(block, j, error[j], w);
  }
}

PQ_MULTIVERSION
void GptqE4M3Group32(const GptqBlockView& block, float* w, uint8_t* scale, uint8_t* codes,
                     float* error) {
  float effective = 1;
  for (int64_t j = 0; j < block.columns; ++j) {
    if (j % kMxGroupSize == 0) {
      scale[j / kMxGroupSize] = ChooseE8M0Scale(block, j, w + j);
      effective = DecodeE8M0(scale[j / kMxGroupSize]);
    }
    const float value = RoundToE4M3(w[j] / effective);
    const float quantized = value * effective;
    codes[j] = EncodeE4M3(value);
    error[j] = (w[j] - quantized) / block.u[j * block.columns + j];
    w[j] = quantized;
    Propagate(block, j, error[j], w);
  }
}

PQ_MULTIVERSION
void GptqE4M3Row(const GptqBlockView& block, float* w, float scale, uint8_t* codes, float* error) {
  for (int64_t j = 0; j < block.columns; ++j) {
    const float value = RoundToE4M3(w[j] / scale);
    const float quantized = value * scale;
    codes[j] = EncodeE4M3(value);
    error[j] = (w[j] - quantized) / block.u[j * block.columns + j];
    w[j] = quantized;
    Propagate(block, j, error[j], w);
  }
}

}  // namespace prismaquant::rows

#include "kernels/codec_rows.h"

#include "kernels/integer_codes.h"
#include "kernels/minifloat.h"

namespace prismaquant::rows {
namespace {

// The group scale as stored, an E4M3 value.
PQ_INLINE float Nvfp4GroupScale(const float* group, float global_scale) {
  const float scale =
      RoundToE4M3(global_scale * (LargestMagnitude(group, kNvfp4GroupSize) / kE2M1Max));
  return scale == 0.0F ? kNvfp4ZeroScale : scale;
}

template <int kBits>
PQ_INLINE void EncodeIntGroup(const float* w, float scale, uint8_t* codes) {
  for (int64_t i = 0; i < kIntGroupSize; ++i)
    codes[i] = EncodeInt<kBits>(RoundToInt<kBits>(w[i] / scale));
}

template <int kBits>
PQ_INLINE void DecodeIntGroup(const uint8_t* codes, float scale, float* w) {
  for (int64_t i = 0; i < kIntGroupSize; ++i) w[i] = DecodeInt<kBits>(codes[i]) * scale;
}

}  // namespace

PQ_MULTIVERSION
void Nvfp4Encode(const float* w, int64_t in, float global_scale, uint8_t* packed, uint8_t* scale) {
  for (int64_t g = 0; g < in / kNvfp4GroupSize; ++g) {
    const float* group = w + g * kNvfp4GroupSize;
    const float stored = Nvfp4GroupScale(group, global_scale);
    const float effective = stored / global_scale;
    scale[g] = EncodeE4M3(stored);
    uint8_t codes[kNvfp4GroupSize];
    PQ_LANES (int64_t i = 0; i < kNvfp4GroupSize; ++i)
      codes[i] = EncodeE2M1(RoundToE2M1(WithoutNegativeZero(group[i] / effective)));
    PackNibbles(codes, packed + g * kNvfp4GroupSize / 2);
  }
}

PQ_MULTIVERSION
void Nvfp4Decode(const uint8_t* packed, const uint8_t* scale, int64_t in, float global_scale,
                 float* w) {
  for (int64_t g = 0; g < in / kNvfp4GroupSize; ++g) {
    const float effective = DecodeE4M3(scale[g]) / global_scale;
    uint8_t codes[kNvfp4GroupSize];
    UnpackNibbles(packed + g * kNvfp4GroupSize / 2, codes);
    float* group = w + g * kNvfp4GroupSize;
    PQ_LANES (int64_t i = 0; i < kNvfp4GroupSize; ++i) group[i] = DecodeE2M1(codes[i]) * effective;
  }
}

PQ_MULTIVERSION
void Nvfp4Quantize(const float* x, int64_t in, float global_scale, float* y) {
  for (int64_t g = 0; g < in / kNvfp4GroupSize; ++g) {
    const float* group = x + g * kNvfp4GroupSize;
    const float effective = Nvfp4GroupScale(group, global_scale) / global_scale;
    PQ_LANES (int64_t i = 0; i < kNvfp4GroupSize; ++i) {
      y[g * kNvfp4GroupSize + i] =
          RoundToE2M1(WithoutNegativeZero(group[i] / effective)) * effective;
    }
  }
}

PQ_MULTIVERSION
void Mxfp8Encode(const float* w, int64_t in, uint8_t* codes, uint8_t* scale) {
  for (int64_t g = 0; g < in / kMxGroupSize; ++g) {
    const float* group = w + g * kMxGroupSize;
    scale[g] = Mxfp8ScaleCode(LargestMagnitude(group, kMxGroupSize));
    const float effective = DecodeE8M0(scale[g]);
    for (int64_t i = 0; i < kMxGroupSize; ++i) {
      codes[g * kMxGroupSize + i] = EncodeE4M3(RoundToE4M3(group[i] / effective));
    }
  }
}

PQ_MULTIVERSION
void Mxfp8Decode(const uint8_t* codes, const uint8_t* scale, int64_t in, float* w) {
  for (int64_t g = 0; g < in / kMxGroupSize; ++g) {
    const float effective = DecodeE8M0(scale[g]);
    for (int64_t i = 0; i < kMxGroupSize; ++i) {
      w[g * kMxGroupSize + i] = DecodeE4M3(codes[g * kMxGroupSize + i]) * effective;
    }
  }
}

PQ_MULTIVERSION
void Mxfp8Quantize(const float* x, int64_t in, float* y) {
  for (int64_t g = 0; g < in / kMxGroupSize; ++g) {
    const float* group = x + g * kMxGroupSize;
    const float effective = DecodeE8M0(Mxfp8ScaleCode(LargestMagnitude(group, kMxGroupSize)));
    for (int64_t i = 0; i < kMxGroupSize; ++i) {
      y[g * kMxGroupSize + i] = RoundToE4M3(WithoutNegativeZero(group[i] / effective)) * effective;
    }
  }
}

PQ_MULTIVERSION
void Mxfp4Encode(const float* w, int64_t in, uint8_t* packed, uint8_t* scale) {
  for (int64_t g = 0; g < in / kMxGroupSize; ++g) {
    const float* group = w + g * kMxGroupSize;
    scale[g] = Mxfp4ScaleCode(LargestMagnitude(group, kMxGroupSize));
    const float effective = DecodeE8M0(scale[g]);
    uint8_t codes[kMxGroupSize];
    for (int64_t i = 0; i < kMxGroupSize; ++i)
      codes[i] = EncodeE2M1(RoundToE2M1(WithoutNegativeZero(group[i] / effective)));
    PackNibbles(codes, packed + g * kMxGroupSize / 2);
    PackNibbles(codes + 16, packed + g * kMxGroupSize / 2 + 8);
  }
}

PQ_MULTIVERSION
void Mxfp4Decode(const uint8_t* packed, const uint8_t* scale, int64_t in, float* w) {
  for (int64_t g = 0; g < in / kMxGroupSize; ++g) {
    const float effective = DecodeE8M0(scale[g]);
    uint8_t codes[kMxGroupSize];
    UnpackNibbles(packed + g * kMxGroupSize / 2, codes);
    UnpackNibbles(packed + g * kMxGroupSize / 2 + 8, codes + 16);
    float* group = w + g * kMxGroupSize;
    for (int64_t i = 0; i < kMxGroupSize; ++i) group[i] = DecodeE2M1(codes[i]) * effective;
  }
}

PQ_MULTIVERSION
void Mxfp4Quantize(const float* x, int64_t in, float* y) {
  for (int64_t g = 0; g < in / kMxGroupSize; ++g) {
    const float* group = x + g * kMxGroupSize;
    const float effective = DecodeE8M0(Mxfp4ScaleCode(LargestMagnitude(group, kMxGroupSize)));
    for (int64_t i = 0; i < kMxGroupSize; ++i) {
      y[g * kMxGroupSize + i] = RoundToE2M1(WithoutNegativeZero(group[i] / effective)) * effective;
    }
  }
}

PQ_MULTIVERSION
void IntScales(const float* w, int64_t in, int bits, float* scale) {
  for (int64_t g = 0; g < in / kIntGroupSize; ++g)
    scale[g] = LargestMagnitude(w + g * kIntGroupSize, kIntGroupSize) / IntHalfRange(bits);
}

PQ_MULTIVERSION
void Int4Encode(const float* w, int64_t in, const float* scale, uint8_t* packed) {
  for (int64_t g = 0; g < in / kIntGroupSize; ++g) {
    uint8_t codes[kIntGroupSize];
    EncodeIntGroup<4>(w + g * kIntGroupSize, scale[g], codes);
    for (int64_t i = 0; i < kIntGroupSize; i += 16)
      PackNibbles(codes + i, packed + (g * kIntGroupSize + i) / 2);
  }
}

PQ_MULTIVERSION
void Int8Encode(const float* w, int64_t in, const float* scale, uint8_t* packed) {
  for (int64_t g = 0; g < in / kIntGroupSize; ++g)
    EncodeIntGroup<8>(w + g * kIntGroupSize, scale[g], packed + g * kIntGroupSize);
}

PQ_MULTIVERSION
void Int4Decode(const uint8_t* packed, int64_t in, const float* scale, float* w) {
  for (int64_t g = 0; g < in / kIntGroupSize; ++g) {
    uint8_t codes[kIntGroupSize];
    for (int64_t i = 0; i < kIntGroupSize; i += 16)
      UnpackNibbles(packed + (g * kIntGroupSize + i) / 2, codes + i);
    DecodeIntGroup<4>(codes, scale[g], w + g * kIntGroupSize);
  }
}

PQ_MULTIVERSION
void Int8Decode(const uint8_t* packed, int64_t in, const float* scale, float* w) {
  for (int64_t g = 0; g < in / kIntGroupSize; ++g)
    DecodeIntGroup<8>(packed + g * kIntGroupSize, scale[g], w + g * kIntGroupSize);
}

PQ_MULTIVERSION
float Fp8Scale(const float* w, int64_t in) {
  const float scale = LargestMagnitude(w, in) / kE4M3Max;
  return scale == 0.0F ? kFp8ZeroScale : scale;
}

PQ_MULTIVERSION
void Fp8Encode(const float* w, int64_t in, float scale, uint8_t* codes) {
  for (int64_t i = 0; i < in; ++i) codes[i] = EncodeE4M3(RoundToE4M3(w[i] / scale));
}

PQ_MULTIVERSION
void Fp8Decode(const uint8_t* codes, int64_t in, float scale, float* w) {
  for (int64_t i = 0; i < in; ++i) w[i] = DecodeE4M3(codes[i]) * scale;
}

PQ_MULTIVERSION
void Fp8Quantize(const float* x, int64_t in, float* y) {
  const float scale = Fp8Scale(x, in);
  for (int64_t i = 0; i < in; ++i) y[i] = RoundToE4M3(WithoutNegativeZero(x[i] / scale)) * scale;
}

}  // namespace prismaquant::rows

#ifndef PRISMAQUANT_KERNELS_CODEC_ROWS_H_
#define PRISMAQUANT_KERNELS_CODEC_ROWS_H_

// The codecs on one contiguous row of float32: the inner loops of the CPU operators. The order of
// every floating-point operation is that of compressed-tensors, since results must agree bit for
// bit.

#include <cstdint>

namespace prismaquant::rows {

// NVFP4. packed [in/2], scale [in/16] E4M3 codes.
void Nvfp4Encode(const float* w, int64_t in, float global_scale, uint8_t* packed, uint8_t* scale);
void Nvfp4Decode(const uint8_t* packed, const uint8_t* scale, int64_t in, float global_scale,
                 float* w);
void Nvfp4Quantize(const float* x, int64_t in, float global_scale, float* y);

// MXFP8. codes [in], scale [in/32] E8M0 codes.
void Mxfp8Encode(const float* w, int64_t in, uint8_t* codes, uint8_t* scale);
void Mxfp8Decode(const uint8_t* codes, const uint8_t* scale, int64_t in, float* w);
void Mxfp8Quantize(const float* x, int64_t in, float* y);

// MXFP4. packed [in/2], scale [in/32] E8M0 codes.
void Mxfp4Encode(const float* w, int64_t in, uint8_t* packed, uint8_t* scale);
void Mxfp4Decode(const uint8_t* packed, const uint8_t* scale, int64_t in, float* w);
void Mxfp4Quantize(const float* x, int64_t in, float* y);

// INT4 and INT8 in groups of 128 columns. scale [in/128], before it is rounded to the dtype in
// which it is stored; packed [in/2] or [in] bytes, under the scale as stored.
void IntScales(const float* w, int64_t in, int bits, float* scale);
void Int4Encode(const float* w, int64_t in, const float* scale, uint8_t* packed);
void Int8Encode(const float* w, int64_t in, const float* scale, uint8_t* packed);
void Int4Decode(const uint8_t* packed, int64_t in, const float* scale, float* w);
void Int8Decode(const uint8_t* packed, int64_t in, const float* scale, float* w);

// FP8 with the scale of the whole row; a row of zeros has compressed-tensors' scale for it,
// float32's epsilon.
inline constexpr float kFp8ZeroScale = 0x1p-23F;
float Fp8Scale(const float* w, int64_t in);
void Fp8Encode(const float* w, int64_t in, float scale, uint8_t* codes);
void Fp8Decode(const uint8_t* codes, int64_t in, float scale, float* w);
void Fp8Quantize(const float* x, int64_t in, float* y);

}  // namespace prismaquant::rows

#endif  // PRISMAQUANT_KERNELS_CODEC_ROWS_H_

#ifndef PRISMAQUANT_KERNELS_OPS_H_
#define PRISMAQUANT_KERNELS_OPS_H_

// The operators torch.ops.prismaquant.*: numeric kernels behind the formats, with one schema each,
// so that a CUDA kernel can stand beside the CPU one. The functions below call them through the
// dispatcher. All weights and activations are float32 and contiguous along the last dimension; amax
// and scales are documented per function. Thread-safe; parallel over rows with at::parallel_for;
// results do not depend on the number of threads. Tensors of another kind throw c10::Error.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <tuple>

namespace prismaquant::ops {

// NVFP4. `global_scale` is the divisor 2688 / amax (docs/formats.md).
float Nvfp4GlobalScale(double amax);
// weight [out, in] -> packed U8 [out, in/2], scale float8_e4m3fn [out, in/16]; round-to-nearest as
// compressed-tensors.
std::tuple<at::Tensor, at::Tensor> Nvfp4Encode(const at::Tensor& weight, double global_scale);
at::Tensor Nvfp4Decode(const at::Tensor& packed, const at::Tensor& scale, double global_scale);
// x [..., in] -> x quantized and decoded, float32.
at::Tensor Nvfp4QuantizeActivation(const at::Tensor& x, double input_global_scale);

// MXFP8. weight [out, in] -> codes float8_e4m3fn [out, in], scale U8 [out, in/32] (E8M0).
std::tuple<at::Tensor, at::Tensor> Mxfp8Encode(const at::Tensor& weight);
at::Tensor Mxfp8Decode(const at::Tensor& codes, const at::Tensor& scale);
at::Tensor Mxfp8QuantizeActivation(const at::Tensor& x);

// MXFP4. weight [out, in] -> packed U8 [out, in/2], scale U8 [out, in/32] (E8M0).
std::tuple<at::Tensor, at::Tensor> Mxfp4Encode(const at::Tensor& weight);
at::Tensor Mxfp4Decode(const at::Tensor& packed, const at::Tensor& scale);
at::Tensor Mxfp4QuantizeActivation(const at::Tensor& x);

// INT4 and INT8 (bits) in groups of 128 columns. weight [out, in] -> packed I32 [out, in * bits /
// 32], scale [out, in/128] in scale_type; codes are chosen under the scale as stored.
std::tuple<at::Tensor, at::Tensor> IntEncode(const at::Tensor& weight, int64_t bits,
                                             at::ScalarType scale_type);
at::Tensor IntDecode(const at::Tensor& packed, const at::Tensor& scale, int64_t bits);
// The scale in place of one that is zero as stored: compressed-tensors', the type's epsilon.
double IntZeroScale(at::ScalarType scale_type);

// FP8 with one scale per row. scale_type: the dtype in which the scale is stored; codes are chosen
// under the scale as stored. weight [out, in] -> codes float8_e4m3fn [out, in], scale [out, 1].
std::tuple<at::Tensor, at::Tensor> Fp8Encode(const at::Tensor& weight, at::ScalarType scale_type);
at::Tensor Fp8Decode(const at::Tensor& codes, const at::Tensor& scale);
at::Tensor Fp8QuantizeActivation(const at::Tensor& x);

}  // namespace prismaquant::ops

#endif  // PRISMAQUANT_KERNELS_OPS_H_

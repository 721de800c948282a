#include "kernels/ops.h"

#include <ATen/Parallel.h>
#include <torch/torch.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "kernels/codec_rows.h"
#include "kernels/integer_codes.h"
#include "kernels/minifloat.h"
#include "kernels/operator.h"

namespace prismaquant::ops {
namespace {

// Rows per task: enough that a task outweighs its start.
int64_t Grain(int64_t in) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(in, 1)); }

const uint8_t* Bytes(const at::Tensor& t) {
  return static_cast<const uint8_t*>(t.const_data_ptr());
}
uint8_t* MutableBytes(const at::Tensor& t) { return static_cast<uint8_t*>(t.mutable_data_ptr()); }

at::Tensor Float32Rows(const at::Tensor& t) {
  TORCH_CHECK(t.scalar_type() == at::kFloat, "expected float32, found ", t.scalar_type());
  return t.contiguous();
}

at::Tensor ByteRows(const at::Tensor& t) {
  TORCH_CHECK(t.dim() == 2 && t.element_size() == 1, "expected rows of codes, found ",
              t.scalar_type(), " ", t.sizes());
  return t.contiguous();
}

// Calls `row(index)` for each row in parallel.
template <typename Row>
void ForRows(int64_t rows, int64_t in, Row row) {
  at::parallel_for(0, rows, Grain(in), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) row(r);
  });
}

int64_t Rows(const at::Tensor& t) { return t.size(-1) == 0 ? 0 : t.numel() / t.size(-1); }

void CheckGroups(int64_t in, int64_t group_size) {
  TORCH_CHECK(in % group_size == 0, in, " columns are no multiple of the group size ", group_size);
}

void CheckScale(const at::Tensor& scale, int64_t out, int64_t groups) {
  TORCH_CHECK(scale.sizes() == at::IntArrayRef({out, groups}), "scale has shape ", scale.sizes(),
              ", expected [", out, ", ", groups, "]");
}

std::tuple<at::Tensor, at::Tensor> Nvfp4EncodeCpu(const at::Tensor& weight, double global_scale) {
  const at::Tensor w = Float32Rows(weight);
  const int64_t out = w.size(0), in = w.size(1);
  CheckGroups(in, kNvfp4GroupSize);
  at::Tensor packed = at::empty({out, in / 2}, at::kByte);
  at::Tensor scale = at::empty({out, in / kNvfp4GroupSize}, at::kFloat8_e4m3fn);
  const auto global = static_cast<float>(global_scale);
  ForRows(out, in, [&](int64_t r) {
    rows::Nvfp4Encode(w.const_data_ptr<float>() + r * in, in, global,
                      MutableBytes(packed) + r * in / 2,
                      MutableBytes(scale) + r * (in / kNvfp4GroupSize));
  });
  return {packed, scale};
}

at::Tensor Nvfp4DecodeCpu(const at::Tensor& packed, const at::Tensor& scale, double global_scale) {
  const at::Tensor p = ByteRows(packed), s = ByteRows(scale);
  const int64_t out = p.size(0), in = 2 * p.size(1);
  CheckGroups(in, kNvfp4GroupSize);
  CheckScale(s, out, in / kNvfp4GroupSize);
  at::Tensor w = at::empty({out, in}, at::kFloat);
  const auto global = static_cast<float>(global_scale);
  ForRows(out, in, [&](int64_t r) {
    rows::Nvfp4Decode(Bytes(p) + r * in / 2, Bytes(s) + r * (in / kNvfp4GroupSize), in, global,
                      w.data_ptr<float>() + r * in);
  });
  return w;
}

at::Tensor Nvfp4QuantizeActivationCpu(const at::Tensor& x, double input_global_scale) {
  const at::Tensor input = Float32Rows(x);
  const int64_t in = input.size(-1);
  CheckGroups(in, kNvfp4GroupSize);
  at::Tensor y = at::empty_like(input);
  const auto global = static_cast<float>(input_global_scale);
  ForRows(Rows(input), in, [&](int64_t r) {
    rows::Nvfp4Quantize(input.const_data_ptr<float>() + r * in, in, global,
                        y.data_ptr<float>() + r * in);
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor> Mxfp8EncodeCpu(const at::Tensor& weight) {
  const at::Tensor w = Float32Rows(weight);
  const int64_t out = w.size(0), in = w.size(1);
  CheckGroups(in, kMxGroupSize);
  at::Tensor codes = at::empty({out, in}, at::kFloat8_e4m3fn);
  at::Tensor scale = at::empty({out, in / kMxGroupSize}, at::kByte);
  ForRows(out, in, [&](int64_t r) {
    rows::Mxfp8Encode(w.const_data_ptr<float>() + r * in, in, MutableBytes(codes) + r * in,
                      MutableBytes(scale) + r * (in / kMxGroupSize));
  });
  return {codes, scale};
}

at::Tensor Mxfp8DecodeCpu(const at::Tensor& codes, const at::Tensor& scale) {
  const at::Tensor c = ByteRows(codes), s = ByteRows(scale);
  const int64_t out = c.size(0), in = c.size(1);
  CheckGroups(in, kMxGroupSize);
  CheckScale(s, out, in / kMxGroupSize);
  at::Tensor w = at::empty({out, in}, at::kFloat);
  ForRows(out, in, [&](int64_t r) {
    rows::Mxfp8Decode(Bytes(c) + r * in, Bytes(s) + r * (in / kMxGroupSize), in,
                      w.data_ptr<float>() + r * in);
  });
  return w;
}

at::Tensor Mxfp8QuantizeActivationCpu(const at::Tensor& x) {
  const at::Tensor input = Float32Rows(x);
  const int64_t in = input.size(-1);
  CheckGroups(in, kMxGroupSize);
  at::Tensor y = at::empty_like(input);
  ForRows(Rows(input), in, [&](int64_t r) {
    rows::Mxfp8Quantize(input.const_data_ptr<float>() + r * in, in, y.data_ptr<float>() + r * in);
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor> Mxfp4EncodeCpu(const at::Tensor& weight) {
  const at::Tensor w = Float32Rows(weight);
  const int64_t out = w.size(0), in = w.size(1);
  CheckGroups(in, kMxGroupSize);
  at::Tensor packed = at::empty({out, in / 2}, at::kByte);
  at::Tensor scale = at::empty({out, in / kMxGroupSize}, at::kByte);
  ForRows(out, in, [&](int64_t r) {
    rows::Mxfp4Encode(w.const_data_ptr<float>() + r * in, in, MutableBytes(packed) + r * in / 2,
                      MutableBytes(scale) + r * (in / kMxGroupSize));
  });
  return {packed, scale};
}

at::Tensor Mxfp4DecodeCpu(const at::Tensor& packed, const at::Tensor& scale) {
  const at::Tensor p = ByteRows(packed), s = ByteRows(scale);
  const int64_t out = p.size(0), in = 2 * p.size(1);
  CheckGroups(in, kMxGroupSize);
  CheckScale(s, out, in / kMxGroupSize);
  at::Tensor w = at::empty({out, in}, at::kFloat);
  ForRows(out, in, [&](int64_t r) {
    rows::Mxfp4Decode(Bytes(p) + r * in / 2, Bytes(s) + r * (in / kMxGroupSize), in,
                      w.data_ptr<float>() + r * in);
  });
  return w;
}

at::Tensor Mxfp4QuantizeActivationCpu(const at::Tensor& x) {
  const at::Tensor input = Float32Rows(x);
  const int64_t in = input.size(-1);
  CheckGroups(in, kMxGroupSize);
  at::Tensor y = at::empty_like(input);
  ForRows(Rows(input), in, [&](int64_t r) {
    rows::Mxfp4Quantize(input.const_data_ptr<float>() + r * in, in, y.data_ptr<float>() + r * in);
  });
  return y;
}

void CheckBits(int64_t bits) {
  TORCH_CHECK(bits == 4 || bits == 8, "bits is ", bits, ", expected 4 or 8");
}

std::tuple<at::Tensor, at::Tensor> IntEncodeCpu(const at::Tensor& weight, int64_t bits,
                                                at::ScalarType scale_type) {
  CheckBits(bits);
  const at::Tensor w = Float32Rows(weight);
  const int64_t out = w.size(0), in = w.size(1), groups = in / kIntGroupSize;
  CheckGroups(in, kIntGroupSize);
  at::Tensor scale = at::empty({out, groups}, at::kFloat);
  ForRows(out, in, [&](int64_t r) {
    rows::IntScales(w.const_data_ptr<float>() + r * in, in, static_cast<int>(bits),
                    scale.data_ptr<float>() + r * groups);
  });
  at::Tensor stored = scale.to(scale_type);
  stored.masked_fill_(stored == 0, IntZeroScale(scale_type));
  const at::Tensor effective = stored.to(at::kFloat);
  at::Tensor packed = at::empty({out, in * bits / 32}, at::kInt);
  const auto encode = bits == 4 ? rows::Int4Encode : rows::Int8Encode;
  ForRows(out, in, [&](int64_t r) {
    encode(w.const_data_ptr<float>() + r * in, in, effective.const_data_ptr<float>() + r * groups,
           MutableBytes(packed) + r * in * bits / 8);
  });
  return {packed, stored};
}

at::Tensor IntDecodeCpu(const at::Tensor& packed, const at::Tensor& scale, int64_t bits) {
  CheckBits(bits);
  TORCH_CHECK(packed.dim() == 2 && packed.scalar_type() == at::kInt,
              "expected rows of int32, found ", packed.scalar_type(), " ", packed.sizes());
  const at::Tensor p = packed.contiguous(), s = scale.to(at::kFloat).contiguous();
  const int64_t out = p.size(0), in = p.size(1) * 32 / bits, groups = in / kIntGroupSize;
  CheckGroups(in, kIntGroupSize);
  CheckScale(s, out, groups);
  at::Tensor w = at::empty({out, in}, at::kFloat);
  const auto decode = bits == 4 ? rows::Int4Decode : rows::Int8Decode;
  ForRows(out, in, [&](int64_t r) {
    decode(Bytes(p) + r * in * bits / 8, in, s.const_data_ptr<float>() + r * groups,
           w.data_ptr<float>() + r * in);
  });
  return w;
}

std::tuple<at::Tensor, at::Tensor> Fp8EncodeCpu(const at::Tensor& weight,
                                                at::ScalarType scale_type) {
  const at::Tensor w = Float32Rows(weight);
  const int64_t out = w.size(0), in = w.size(1);
  at::Tensor codes = at::empty({out, in}, at::kFloat8_e4m3fn);
  at::Tensor scale = at::empty({out, 1}, at::kFloat);
  ForRows(out, in, [&](int64_t r) {
    scale.data_ptr<float>()[r] = rows::Fp8Scale(w.const_data_ptr<float>() + r * in, in);
  });
  at::Tensor stored = scale.to(scale_type);
  // float16 has no room for the smallest scales.
  stored.masked_fill_(stored == 0, rows::kFp8ZeroScale);
  const at::Tensor effective = stored.to(at::kFloat);
  ForRows(out, in, [&](int64_t r) {
    rows::Fp8Encode(w.const_data_ptr<float>() + r * in, in, effective.const_data_ptr<float>()[r],
                    MutableBytes(codes) + r * in);
  });
  return {codes, stored};
}

at::Tensor Fp8DecodeCpu(const at::Tensor& codes, const at::Tensor& scale) {
  const at::Tensor c = ByteRows(codes), s = scale.to(at::kFloat).contiguous();
  const int64_t out = c.size(0), in = c.size(1);
  TORCH_CHECK(s.numel() == out, "scale has shape ", s.sizes(), ", expected [", out, ", 1]");
  at::Tensor w = at::empty({out, in}, at::kFloat);
  ForRows(out, in, [&](int64_t r) {
    rows::Fp8Decode(Bytes(c) + r * in, in, s.const_data_ptr<float>()[r],
                    w.data_ptr<float>() + r * in);
  });
  return w;
}

at::Tensor Fp8QuantizeActivationCpu(const at::Tensor& x) {
  const at::Tensor input = Float32Rows(x);
  const int64_t in = input.size(-1);
  at::Tensor y = at::empty_like(input);
  ForRows(Rows(input), in, [&](int64_t r) {
    rows::Fp8Quantize(input.const_data_ptr<float>() + r * in, in, y.data_ptr<float>() + r * in);
  });
  return y;
}

TORCH_LIBRARY(prismaquant, m) {
  m.def("nvfp4_encode(Tensor weight, float global_scale) -> (Tensor, Tensor)");
  m.def("nvfp4_decode(Tensor packed, Tensor scale, float global_scale) -> Tensor");
  m.def("nvfp4_quantize_activation(Tensor x, float input_global_scale) -> Tensor");
  m.def("mxfp8_encode(Tensor weight) -> (Tensor, Tensor)");
  m.def("mxfp8_decode(Tensor codes, Tensor scale) -> Tensor");
  m.def("mxfp8_quantize_activation(Tensor x) -> Tensor");
  m.def("mxfp4_encode(Tensor weight) -> (Tensor, Tensor)");
  m.def("mxfp4_decode(Tensor packed, Tensor scale) -> Tensor");
  m.def("mxfp4_quantize_activation(Tensor x) -> Tensor");
  m.def("int_encode(Tensor weight, int bits, ScalarType scale_type) -> (Tensor, Tensor)");
  m.def("int_decode(Tensor packed, Tensor scale, int bits) -> Tensor");
  m.def("fp8_encode(Tensor weight, ScalarType scale_type) -> (Tensor, Tensor)");
  m.def("fp8_decode(Tensor codes, Tensor scale) -> Tensor");
  m.def("fp8_quantize_activation(Tensor x) -> Tensor");
}

TORCH_LIBRARY_IMPL(prismaquant, CPU, m) {
  m.impl("nvfp4_encode", &Nvfp4EncodeCpu);
  m.impl("nvfp4_decode", &Nvfp4DecodeCpu);
  m.impl("nvfp4_quantize_activation", &Nvfp4QuantizeActivationCpu);
  m.impl("mxfp8_encode", &Mxfp8EncodeCpu);
  m.impl("mxfp8_decode", &Mxfp8DecodeCpu);
  m.impl("mxfp8_quantize_activation", &Mxfp8QuantizeActivationCpu);
  m.impl("mxfp4_encode", &Mxfp4EncodeCpu);
  m.impl("mxfp4_decode", &Mxfp4DecodeCpu);
  m.impl("mxfp4_quantize_activation", &Mxfp4QuantizeActivationCpu);
  m.impl("int_encode", &IntEncodeCpu);
  m.impl("int_decode", &IntDecodeCpu);
  m.impl("fp8_encode", &Fp8EncodeCpu);
  m.impl("fp8_decode", &Fp8DecodeCpu);
  m.impl("fp8_quantize_activation", &Fp8QuantizeActivationCpu);
}

}  // namespace

float Nvfp4GlobalScale(double amax) {
  const float largest = std::max(static_cast<float>(amax), std::numeric_limits<float>::min());
  const float scale = kE4M3Max * kE2M1Max / largest;
  return std::isfinite(scale) ? scale : 1.0F;
}

std::tuple<at::Tensor, at::Tensor> Nvfp4Encode(const at::Tensor& weight, double global_scale) {
  static const auto op = Operator<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, double)>(
      "prismaquant::nvfp4_encode");
  return op.call(weight, global_scale);
}

at::Tensor Nvfp4Decode(const at::Tensor& packed, const at::Tensor& scale, double global_scale) {
  static const auto op = Operator<at::Tensor(const at::Tensor&, const at::Tensor&, double)>(
      "prismaquant::nvfp4_decode");
  return op.call(packed, scale, global_scale);
}

at::Tensor Nvfp4QuantizeActivation(const at::Tensor& x, double input_global_scale) {
  static const auto op =
      Operator<at::Tensor(const at::Tensor&, double)>("prismaquant::nvfp4_quantize_activation");
  return op.call(x, input_global_scale);
}

std::tuple<at::Tensor, at::Tensor> Mxfp8Encode(const at::Tensor& weight) {
  static const auto op =
      Operator<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&)>("prismaquant::mxfp8_encode");
  return op.call(weight);
}

at::Tensor Mxfp8Decode(const at::Tensor& codes, const at::Tensor& scale) {
  static const auto op =
      Operator<at::Tensor(const at::Tensor&, const at::Tensor&)>("prismaquant::mxfp8_decode");
  return op.call(codes, scale);
}

at::Tensor Mxfp8QuantizeActivation(const at::Tensor& x) {
  static const auto op =
      Operator<at::Tensor(const at::Tensor&)>("prismaquant::mxfp8_quantize_activation");
  return op.call(x);
}

std::tuple<at::Tensor, at::Tensor> Mxfp4Encode(const at::Tensor& weight) {
  static const auto op =
      Operator<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&)>("prismaquant::mxfp4_encode");
  return op.call(weight);
}

at::Tensor Mxfp4Decode(const at::Tensor& packed, const at::Tensor& scale) {
  static const auto op =
      Operator<at::Tensor(const at::Tensor&, const at::Tensor&)>("prismaquant::mxfp4_decode");
  return op.call(packed, scale);
}

at::Tensor Mxfp4QuantizeActivation(const at::Tensor& x) {
  static const auto op =
      Operator<at::Tensor(const at::Tensor&)>("prismaquant::mxfp4_quantize_activation");
  return op.call(x);
}

std::tuple<at::Tensor, at::Tensor> IntEncode(const at::Tensor& weight, int64_t bits,
                                             at::ScalarType scale_type) {
  static const auto op =
      Operator<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, int64_t, at::ScalarType)>(
          "prismaquant::int_encode");
  return op.call(weight, bits, scale_type);
}

at::Tensor IntDecode(const at::Tensor& packed, const at::Tensor& scale, int64_t bits) {
  static const auto op = Operator<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t)>(
      "prismaquant::int_decode");
  return op.call(packed, scale, bits);
}

double IntZeroScale(at::ScalarType scale_type) {
  switch (scale_type) {
    case at::kBFloat16:
      return 0x1p-7;
    case at::kHalf:
      return 0x1p-10;
    default:
      return 0x1p-23;
  }
}

std::tuple<at::Tensor, at::Tensor> Fp8Encode(const at::Tensor& weight, at::ScalarType scale_type) {
  static const auto op =
      Operator<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, at::ScalarType)>(
          "prismaquant::fp8_encode");
  return op.call(weight, scale_type);
}

at::Tensor Fp8Decode(const at::Tensor& codes, const at::Tensor& scale) {
  static const auto op =
      Operator<at::Tensor(const at::Tensor&, const at::Tensor&)>("prismaquant::fp8_decode");
  return op.call(codes, scale);
}

at::Tensor Fp8QuantizeActivation(const at::Tensor& x) {
  static const auto op =
      Operator<at::Tensor(const at::Tensor&)>("prismaquant::fp8_quantize_activation");
  return op.call(x);
}

}  // namespace prismaquant::ops

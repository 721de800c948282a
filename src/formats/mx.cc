#include <torch/torch.h>

#include <tuple>

#include "formats/families.h"
#include "kernels/minifloat.h"
#include "kernels/ops.h"

namespace prismaquant {
namespace {

// What tells the microscaling formats apart.
struct MxKind {
  std::string_view name, compression_format;
  const char* codes;  // name of the tensor that holds them
  DType code_type;
  int bits;
  Grid grid;
  std::tuple<at::Tensor, at::Tensor> (*encode)(const at::Tensor& weight);
  at::Tensor (*decode)(const at::Tensor& codes, const at::Tensor& scale);
  at::Tensor (*quantize)(const at::Tensor& x);
};

constexpr MxKind kMxfp4{.name = "mxfp4",
                        .compression_format = "mxfp4-pack-quantized",
                        .codes = "weight_packed",
                        .code_type = DType::kU8,
                        .bits = 4,
                        .grid = Grid::kE2M1Group32,
                        .encode = ops::Mxfp4Encode,
                        .decode = ops::Mxfp4Decode,
                        .quantize = ops::Mxfp4QuantizeActivation};
constexpr MxKind kMxfp8{.name = "mxfp8",
                        .compression_format = "mxfp8-quantized",
                        .codes = "weight",
                        .code_type = DType::kF8E4M3,
                        .bits = 8,
                        .grid = Grid::kE4M3Group32,
                        .encode = ops::Mxfp8Encode,
                        .decode = ops::Mxfp8Decode,
                        .quantize = ops::Mxfp8QuantizeActivation};

// MXFP4, W4A4, and MXFP8, W8A8: E2M1 or E4M3 codes with one power-of-two scale (E8M0) per 32
// columns; activations the same, dynamically (docs/formats.md, sections MXFP4 and MXFP8).
class Mx : public Format {
 public:
  explicit Mx(const MxKind& kind) : kind_(kind) {}

  std::string_view name() const override { return kind_.name; }
  bool Supports(int64_t out, int64_t in) const override {
    return out > 0 && in > 0 && in % kMxGroupSize == 0;
  }

  // A byte holds one code, or two.
  std::vector<TensorSpec> Layout(int64_t out, int64_t in, DType) const override {
    return {{kind_.codes, kind_.code_type, {out, in * kind_.bits / 8}},
            {"weight_scale", DType::kU8, {out, in / kMxGroupSize}}};
  }
  int64_t PayloadBytes(int64_t out, int64_t in, DType) const override {
    return out * in * kind_.bits / 8 + out * (in / kMxGroupSize);
  }

  StoredTensors Encode(const at::Tensor& weight, const SharedScales&, DType) const override {
    auto [codes, scale] = kind_.encode(weight);
    return {{kind_.codes, codes}, {"weight_scale", scale}};
  }
  at::Tensor Decode(const StoredTensors& stored) const override {
    return kind_.decode(stored.at(kind_.codes), stored.at("weight_scale"));
  }
  at::Tensor QuantizeActivation(const at::Tensor& x, const StoredTensors&) const override {
    return Quantize(x);
  }
  at::Tensor QuantizeActivation(const at::Tensor& x, const SharedScales&) const override {
    return Quantize(x);
  }
  bool quantizes_activations() const override { return true; }
  Grid grid() const override { return kind_.grid; }
  int64_t kernel_out_multiple() const override { return 128; }

  std::string_view compression_format() const override { return kind_.compression_format; }
  Json Scheme() const override {
    SchemeArgs args{.bits = kind_.bits,
                    .strategy = "group",
                    .group_size = kMxGroupSize,
                    .dynamic = false,
                    .scale_dtype = "torch.uint8",
                    .observer = "memoryless_minmax"};
    const Json weights = QuantizationArgs(args);
    args.dynamic = true;
    args.observer = nullptr;
    return {{"weights", weights}, {"input_activations", QuantizationArgs(args)}};
  }

 private:
  at::Tensor Quantize(const at::Tensor& x) const {
    return kind_.quantize(x.to(at::kFloat)).to(x.scalar_type());
  }

  const MxKind& kind_;
};

}  // namespace

const Format& Mxfp4Format() {
  static const Mx format(kMxfp4);
  return format;
}

const Format& Mxfp8Format() {
  static const Mx format(kMxfp8);
  return format;
}

}  // namespace prismaquant

#include <torch/torch.h>

#include "formats/families.h"
#include "kernels/minifloat.h"
#include "kernels/ops.h"

namespace prismaquant {
namespace {

// MXFP8, W8A8: E4M3 codes with one power-of-two scale (E8M0) per 32 columns; activations the same,
// dynamically (docs/formats.md, section MXFP8).
class Mxfp8 : public Format {
 public:
  std::string_view name() const override { return "mxfp8"; }
  bool Supports(int64_t out, int64_t in) const override {
    return out > 0 && in > 0 && in % kMxGroupSize == 0;
  }

  std::vector<TensorSpec> Layout(int64_t out, int64_t in, DType) const override {
    return {{"weight", DType::kF8E4M3, {out, in}},
            {"weight_scale", DType::kU8, {out, in / kMxGroupSize}}};
  }
  int64_t PayloadBytes(int64_t out, int64_t in, DType) const override {
    return out * in + out * (in / kMxGroupSize);
  }

  StoredTensors Encode(const at::Tensor& weight, const SharedScales&, DType) const override {
    auto [codes, scale] = ops::Mxfp8Encode(weight);
    return {{"weight", codes}, {"weight_scale", scale}};
  }
  at::Tensor Decode(const StoredTensors& stored) const override {
    return ops::Mxfp8Decode(stored.at("weight"), stored.at("weight_scale"));
  }
  at::Tensor QuantizeActivation(const at::Tensor& x, const StoredTensors&) const override {
    return Quantize(x);
  }
  at::Tensor QuantizeActivation(const at::Tensor& x, const SharedScales&) const override {
    return Quantize(x);
  }
  bool quantizes_activations() const override { return true; }
  Grid grid() const override { return Grid::kE4M3Group32; }
  int64_t kernel_out_multiple() const override { return 128; }

  std::string_view compression_format() const override { return "mxfp8-quantized"; }
  Json Scheme() const override {
    SchemeArgs args{.bits = 8,
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
  static at::Tensor Quantize(const at::Tensor& x) {
    return ops::Mxfp8QuantizeActivation(x.to(at::kFloat)).to(x.scalar_type());
  }
};

}  // namespace

const Format& Mxfp8Format() {
  static const Mxfp8 format;
  return format;
}

}  // namespace prismaquant

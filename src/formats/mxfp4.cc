#include <torch/torch.h>

#include "formats/families.h"
#include "kernels/minifloat.h"
#include "kernels/ops.h"

namespace prismaquant {
namespace {

// MXFP4, W4A4: E2M1 codes with one power-of-two scale (E8M0) per 32 columns; activations the same,
// dynamically (docs/formats.md, section MXFP4).
class Mxfp4 : public Format {
 public:
  std::string_view name() const override { return "mxfp4"; }
  bool Supports(int64_t out, int64_t in) const override {
    return out > 0 && in > 0 && in % kMxGroupSize == 0;
  }

  std::vector<TensorSpec> Layout(int64_t out, int64_t in, DType) const override {
    return {{"weight_packed", DType::kU8, {out, in / 2}},
            {"weight_scale", DType::kU8, {out, in / kMxGroupSize}}};
  }
  int64_t PayloadBytes(int64_t out, int64_t in, DType) const override {
    return out * in / 2 + out * (in / kMxGroupSize);
  }

  StoredTensors Encode(const at::Tensor& weight, const SharedScales&, DType) const override {
    auto [packed, scale] = ops::Mxfp4Encode(weight);
    return {{"weight_packed", packed}, {"weight_scale", scale}};
  }
  at::Tensor Decode(const StoredTensors& stored) const override {
    return ops::Mxfp4Decode(stored.at("weight_packed"), stored.at("weight_scale"));
  }
  at::Tensor QuantizeActivation(const at::Tensor& x, const StoredTensors&) const override {
    return Quantize(x);
  }
  at::Tensor QuantizeActivation(const at::Tensor& x, const SharedScales&) const override {
    return Quantize(x);
  }
  bool quantizes_activations() const override { return true; }
  Grid grid() const override { return Grid::kE2M1Group32; }
  int64_t kernel_out_multiple() const override { return 128; }

  std::string_view compression_format() const override { return "mxfp4-pack-quantized"; }
  Json Scheme() const override {
    SchemeArgs args{.bits = 4,
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
    return ops::Mxfp4QuantizeActivation(x.to(at::kFloat)).to(x.scalar_type());
  }
};

}  // namespace

const Format& Mxfp4Format() {
  static const Mxfp4 format;
  return format;
}

}  // namespace prismaquant

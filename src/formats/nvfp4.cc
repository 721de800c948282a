#include <torch/torch.h>

#include "formats/families.h"
#include "kernels/minifloat.h"
#include "kernels/ops.h"

namespace prismaquant {
namespace {

// NVFP4, W4A4: E2M1 codes, one E4M3 scale per 16 columns, one float32 scale per tensor (stored as
// its divisor), and a static float32 scale for the activations (docs/formats.md, section NVFP4).
class Nvfp4 : public Format {
 public:
  std::string_view name() const override { return "nvfp4"; }
  bool Supports(int64_t out, int64_t in) const override {
    return out > 0 && in > 0 && in % kNvfp4GroupSize == 0;
  }

  std::vector<TensorSpec> Layout(int64_t out, int64_t in, DType) const override {
    return {{"weight_packed", DType::kU8, {out, in / 2}},
            {"weight_scale", DType::kF8E4M3, {out, in / kNvfp4GroupSize}},
            {"weight_global_scale", DType::kF32, {1}},
            {"input_global_scale", DType::kF32, {1}}};
  }
  int64_t PayloadBytes(int64_t out, int64_t in, DType) const override {
    return out * in / 2 + out * (in / kNvfp4GroupSize);
  }

  StoredTensors Encode(const at::Tensor& weight, const SharedScales& shared, DType) const override {
    const float global = ops::Nvfp4GlobalScale(shared.weight_amax);
    auto [packed, scale] = ops::Nvfp4Encode(weight, global);
    return {{"weight_packed", packed},
            {"weight_scale", scale},
            {"weight_global_scale", at::full({1}, global, at::kFloat)},
            {"input_global_scale", at::full({1}, InputGlobalScale(shared), at::kFloat)}};
  }
  at::Tensor Decode(const StoredTensors& stored) const override {
    return ops::Nvfp4Decode(stored.at("weight_packed"), stored.at("weight_scale"),
                            stored.at("weight_global_scale").item<double>());
  }
  at::Tensor QuantizeActivation(const at::Tensor& x, const StoredTensors& stored) const override {
    return ops::Nvfp4QuantizeActivation(x.to(at::kFloat),
                                        stored.at("input_global_scale").item<double>())
        .to(x.scalar_type());
  }
  at::Tensor QuantizeActivation(const at::Tensor& x, const SharedScales& shared) const override {
    return ops::Nvfp4QuantizeActivation(x.to(at::kFloat), InputGlobalScale(shared))
        .to(x.scalar_type());
  }
  bool quantizes_activations() const override { return true; }
  Grid grid() const override { return Grid::kE2M1Group16; }

  std::string_view compression_format() const override { return "nvfp4-pack-quantized"; }
  Json Scheme() const override {
    SchemeArgs args{.bits = 4,
                    .strategy = "tensor_group",
                    .group_size = kNvfp4GroupSize,
                    .dynamic = false,
                    .scale_dtype = "torch.float8_e4m3fn",
                    .observer = "memoryless_minmax"};
    const Json weights = QuantizationArgs(args);
    args.dynamic = "local";
    args.observer = "static_minmax";
    return {{"weights", weights}, {"input_activations", QuantizationArgs(args)}};
  }

 private:
  // An input never seen gets the neutral scale.
  static float InputGlobalScale(const SharedScales& shared) {
    return shared.input_amax > 0 ? ops::Nvfp4GlobalScale(shared.input_amax) : 1.0F;
  }
};

}  // namespace

const Format& Nvfp4Format() {
  static const Nvfp4 format;
  return format;
}

}  // namespace prismaquant

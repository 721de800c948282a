#include <torch/torch.h>

#include "formats/families.h"
#include "kernels/ops.h"

namespace prismaquant {
namespace {

// FP8, W8A8: E4M3 codes with one scale per output channel, stored in the source's dtype;
// activations dynamically per token (docs/formats.md, section FP8).
class Fp8 : public Format {
 public:
  std::string_view name() const override { return "fp8"; }
  bool Supports(int64_t out, int64_t in) const override { return out > 0 && in > 0; }

  std::vector<TensorSpec> Layout(int64_t out, int64_t in, DType source) const override {
    return {{"weight", DType::kF8E4M3, {out, in}}, {"weight_scale", source, {out, 1}}};
  }
  int64_t PayloadBytes(int64_t out, int64_t in, DType source) const override {
    return out * in + out * DTypeBytes(source);
  }

  StoredTensors Encode(const at::Tensor& weight, const SharedScales&, DType source) const override {
    auto [codes, scale] = ops::Fp8Encode(weight, ToScalarType(source));
    return {{"weight", codes}, {"weight_scale", scale}};
  }
  at::Tensor Decode(const StoredTensors& stored) const override {
    return ops::Fp8Decode(stored.at("weight"), stored.at("weight_scale"));
  }
  at::Tensor QuantizeActivation(const at::Tensor& x, const StoredTensors&) const override {
    return Quantize(x);
  }
  at::Tensor QuantizeActivation(const at::Tensor& x, const SharedScales&) const override {
    return Quantize(x);
  }
  bool quantizes_activations() const override { return true; }
  Grid grid() const override { return Grid::kE4M3Row; }

  std::string_view compression_format() const override { return "float-quantized"; }
  Json Scheme() const override {
    SchemeArgs args{.bits = 8, .strategy = "channel", .observer = "memoryless_minmax"};
    const Json weights = QuantizationArgs(args);
    args.strategy = "token";
    args.dynamic = true;
    args.observer = nullptr;
    return {{"weights", weights}, {"input_activations", QuantizationArgs(args)}};
  }

 private:
  static at::Tensor Quantize(const at::Tensor& x) {
    return ops::Fp8QuantizeActivation(x.to(at::kFloat)).to(x.scalar_type());
  }
};

}  // namespace

const Format& Fp8Format() {
  static const Fp8 format;
  return format;
}

}  // namespace prismaquant

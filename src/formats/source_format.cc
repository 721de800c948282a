#include <torch/torch.h>

#include "formats/families.h"

namespace prismaquant {
namespace {

// "bf16": the weight as the source stores it, in the source's own dtype; activations untouched.
class Source : public Format {
 public:
  std::string_view name() const override { return "bf16"; }
  bool Supports(int64_t out, int64_t in) const override { return out > 0 && in > 0; }
  std::vector<TensorSpec> Layout(int64_t out, int64_t in, DType source) const override {
    return {{"weight", source, {out, in}}};
  }
  int64_t PayloadBytes(int64_t out, int64_t in, DType source) const override {
    return out * in * DTypeBytes(source);
  }
  StoredTensors Encode(const at::Tensor& weight, const SharedScales&, DType source) const override {
    return {{"weight", weight.to(ToScalarType(source))}};
  }
  at::Tensor Decode(const StoredTensors& stored) const override {
    return stored.at("weight").to(at::kFloat);
  }
  at::Tensor QuantizeActivation(const at::Tensor& x, const StoredTensors&) const override {
    return x;
  }
  at::Tensor QuantizeActivation(const at::Tensor& x, const SharedScales&) const override {
    return x;
  }
  bool quantizes_activations() const override { return false; }
  Grid grid() const override { return Grid::kNone; }
  std::string_view compression_format() const override { return ""; }
  Json Scheme() const override { return nullptr; }
};

}  // namespace

const Format& SourceFormat() {
  static const Source format;
  return format;
}

}  // namespace prismaquant

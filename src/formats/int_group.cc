#include <torch/torch.h>

#include "formats/families.h"
#include "kernels/integer_codes.h"
#include "kernels/ops.h"

namespace prismaquant {
namespace {

// INT4 and INT8, weight-only: symmetric integers with one scale per 128 columns, stored in the
// source's dtype; activations untouched (docs/formats.md, section INT4 and INT8).
class IntGroup : public Format {
 public:
  IntGroup(std::string_view name, int bits, Grid grid) : name_(name), bits_(bits), grid_(grid) {}

  std::string_view name() const override { return name_; }
  bool Supports(int64_t out, int64_t in) const override {
    return out > 0 && in > 0 && in % kIntGroupSize == 0;
  }

  std::vector<TensorSpec> Layout(int64_t out, int64_t in, DType source) const override {
    return {{"weight_packed", DType::kI32, {out, in * bits_ / 32}},
            {"weight_scale", source, {out, in / kIntGroupSize}},
            {"weight_shape", DType::kI64, {2}}};
  }
  int64_t PayloadBytes(int64_t out, int64_t in, DType source) const override {
    return out * in * bits_ / 8 + out * (in / kIntGroupSize) * DTypeBytes(source);
  }

  StoredTensors Encode(const at::Tensor& weight, const SharedScales&, DType source) const override {
    auto [packed, scale] = ops::IntEncode(weight, bits_, ToScalarType(source));
    return {{"weight_packed", packed},
            {"weight_scale", scale},
            {"weight_shape", at::tensor({weight.size(0), weight.size(1)}, at::kLong)}};
  }
  at::Tensor Decode(const StoredTensors& stored) const override {
    return ops::IntDecode(stored.at("weight_packed"), stored.at("weight_scale"), bits_);
  }
  at::Tensor QuantizeActivation(const at::Tensor& x, const StoredTensors&) const override {
    return x;
  }
  at::Tensor QuantizeActivation(const at::Tensor& x, const SharedScales&) const override {
    return x;
  }
  bool quantizes_activations() const override { return false; }
  Grid grid() const override { return grid_; }
  int64_t kernel_out_multiple() const override { return kMarlinOutMultiple; }

  std::string_view compression_format() const override { return "pack-quantized"; }
  Json Scheme() const override {
    return {{"weights", QuantizationArgs({.bits = bits_,
                                          .type = "int",
                                          .strategy = "group",
                                          .group_size = kIntGroupSize,
                                          .observer = "memoryless_minmax"})},
            {"input_activations", nullptr}};
  }

 private:
  std::string_view name_;
  int bits_;
  Grid grid_;
};

}  // namespace

const Format& Int4Format() {
  static const IntGroup format("int4", 4, Grid::kInt4Group128);
  return format;
}

const Format& Int8Format() {
  static const IntGroup format("int8", 8, Grid::kInt8Group128);
  return format;
}

}  // namespace prismaquant

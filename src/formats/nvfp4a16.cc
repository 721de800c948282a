#include <torch/torch.h>

#include "formats/families.h"

namespace prismaquant {
namespace {

// NVFP4A16, W4A16: the weights of NVFP4 without a scale for the activations, which stay as they are
// (docs/formats.md, section NVFP4A16).
class Nvfp4A16 : public Format {
 public:
  std::string_view name() const override { return "nvfp4a16"; }
  bool Supports(int64_t out, int64_t in) const override { return Nvfp4Format().Supports(out, in); }

  std::vector<TensorSpec> Layout(int64_t out, int64_t in, DType source) const override {
    std::vector<TensorSpec> layout = Nvfp4Format().Layout(out, in, source);
    std::erase_if(layout, [](const TensorSpec& spec) { return spec.name == kInputScale; });
    return layout;
  }
  int64_t PayloadBytes(int64_t out, int64_t in, DType source) const override {
    return Nvfp4Format().PayloadBytes(out, in, source);
  }

  StoredTensors Encode(const at::Tensor& weight, const SharedScales& shared,
                       DType source) const override {
    StoredTensors stored = Nvfp4Format().Encode(weight, shared, source);
    stored.erase(kInputScale);
    return stored;
  }
  at::Tensor Decode(const StoredTensors& stored) const override {
    return Nvfp4Format().Decode(stored);
  }
  at::Tensor QuantizeActivation(const at::Tensor& x, const StoredTensors&) const override {
    return x;
  }
  at::Tensor QuantizeActivation(const at::Tensor& x, const SharedScales&) const override {
    return x;
  }
  bool quantizes_activations() const override { return false; }
  Grid grid() const override { return Grid::kE2M1Group16; }
  int64_t kernel_out_multiple() const override { return kMarlinOutMultiple; }

  std::string_view compression_format() const override {
    return Nvfp4Format().compression_format();
  }
  Json Scheme() const override {
    return {{"weights", Nvfp4Format().Scheme()["weights"]}, {"input_activations", nullptr}};
  }

 private:
  static constexpr char kInputScale[] = "input_global_scale";
};

}  // namespace

const Format& Nvfp4A16Format() {
  static const Nvfp4A16 format;
  return format;
}

}  // namespace prismaquant

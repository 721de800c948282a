#include "model/transformer.h"

namespace prismaquant {
namespace {

constexpr AttentionVariant kAttention = {
    .norm = NormKind::kPlain, .norm_heads = true, .gated_query = false};

// Qwen3 dense: Llama with an RMSNorm on each query and key head.
class Qwen3 : public TransformerModel {
 protected:
  std::vector<std::vector<LinearShape>> MixerLinears(int) const override {
    return AttentionLinears(kAttention);
  }
  std::vector<ParameterShape> MixerParameters(int) const override {
    return AttentionParameters(kAttention);
  }
  Result<std::unique_ptr<Mixer>> LoadMixer(int layer,
                                           const ComputeOptions& options) const override {
    return LoadAttention(layer, kAttention, options);
  }
};

}  // namespace

std::unique_ptr<TransformerModel> MakeQwen3() { return std::make_unique<Qwen3>(); }

}  // namespace prismaquant

#include "model/transformer.h"

namespace prismaquant {
namespace {

// Llama (and SmolLM): plain RMSNorm, grouped-query attention, SwiGLU.
class Llama : public TransformerModel {
 protected:
  std::vector<std::vector<LinearShape>> MixerLinears(int) const override {
    return AttentionLinears({});
  }
  std::vector<ParameterShape> MixerParameters(int) const override { return {}; }
  Result<std::unique_ptr<Mixer>> LoadMixer(int layer,
                                           const ComputeOptions& options) const override {
    return LoadAttention(layer, {}, options);
  }
};

}  // namespace

std::unique_ptr<TransformerModel> MakeLlama() { return std::make_unique<Llama>(); }

}  // namespace prismaquant

#include <cmath>

#include "model/transformer.h"

namespace prismaquant {
namespace {

// Gemma 3 text body: norms before and after mixer and MLP, GeGLU, scaled
// embeddings, and sliding layers with rotary angles of their own between full
// ones.
class Gemma3 : public TransformerModel {
 protected:
  SkeletonVariant skeleton() const override {
    return {.norm = NormKind::kPlusOne, .activation = MlpActivation::kGeluTanh, .post_norms = true};
  }

  AttentionVariant attention(int layer) const override {
    AttentionVariant variant = TransformerModel::attention(layer);
    variant.norm_heads = true;
    variant.scale = 1 / std::sqrt(config_.query_pre_attn_scalar);
    return variant;
  }

  double embedding_scale() const override {
    return std::sqrt(static_cast<double>(config_.hidden_size));
  }
};

}  // namespace

std::unique_ptr<TransformerModel> MakeGemma3() { return std::make_unique<Gemma3>(); }

}  // namespace prismaquant

#include "model/transformer.h"

namespace prismaquant {
namespace {

// Qwen3, dense and with experts: Llama with an RMSNorm on each query and key head.
class Qwen3 : public TransformerModel {
 protected:
  AttentionVariant attention(int layer) const override {
    AttentionVariant variant = TransformerModel::attention(layer);
    variant.norm_heads = true;
    return variant;
  }
};

}  // namespace

std::unique_ptr<TransformerModel> MakeQwen3() { return std::make_unique<Qwen3>(); }

}  // namespace prismaquant

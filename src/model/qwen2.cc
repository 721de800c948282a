#include "model/transformer.h"

namespace prismaquant {
namespace {

// Qwen2 and Qwen2.5: Llama with biases on the query, key and value projections.
class Qwen2 : public TransformerModel {
 protected:
  AttentionVariant attention(int layer) const override {
    AttentionVariant variant = TransformerModel::attention(layer);
    variant.input_bias = true;
    variant.output_bias = false;
    return variant;
  }
};

}  // namespace

std::unique_ptr<TransformerModel> MakeQwen2() { return std::make_unique<Qwen2>(); }

}  // namespace prismaquant

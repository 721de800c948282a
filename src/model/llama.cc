#include "model/transformer.h"

namespace prismaquant {
namespace {

// Llama (and SmolLM): plain RMSNorm, grouped-query attention, SwiGLU. All of it
// is the default.
class Llama : public TransformerModel {};

}  // namespace

std::unique_ptr<TransformerModel> MakeLlama() { return std::make_unique<Llama>(); }

}  // namespace prismaquant

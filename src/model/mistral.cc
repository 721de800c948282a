#include "model/transformer.h"

namespace prismaquant {
namespace {

// Mistral: Llama without biases whose layers all slide, unless sliding_window
// is null.
class Mistral : public TransformerModel {};

}  // namespace

std::unique_ptr<TransformerModel> MakeMistral() { return std::make_unique<Mistral>(); }

}  // namespace prismaquant

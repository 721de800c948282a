#ifndef PRISMAQUANT_MODEL_ATTENTION_H_
#define PRISMAQUANT_MODEL_ATTENTION_H_

// Mixer: how a decoder layer mixes its tokens, between the input projections (its first stage) and
// the output projection (its second). Here softmax attention with the variants of all families;
// other mixers stand in the file of the family that has them. Mixers are immutable and may be
// shared between threads.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "model/config.h"
#include "model/model.h"

namespace prismaquant {

enum class NormKind {
  kPlain,    // w x / rms(x)
  kPlusOne,  // (1 + w) x / rms(x)
};

at::Tensor ApplyNorm(NormKind kind, const at::Tensor& x, const at::Tensor& weight, double eps);

class Mixer {
 public:
  virtual ~Mixer() = default;
  // `projections`: outputs of the stage-0 Linears -> input of the output projection [sequences,
  // tokens, in].
  virtual at::Tensor Mix(const SequenceContext& context,
                         const std::vector<at::Tensor>& projections) const = 0;
};

struct AttentionVariant {
  NormKind norm = NormKind::kPlain;
  bool norm_heads = false;  // RMSNorm on each query and key head
  // q_proj gives query and gate per head; the output is multiplied by sigmoid(gate).
  bool gated_query = false;
  bool input_bias = false;                     // on q, k and v
  bool output_bias = false;                    // on o
  std::optional<double> scale = std::nullopt;  // of the scores; 1 / sqrt(head_dim) if there is none
  int64_t window = 0;         // tokens that a query sees, itself included; 0: all before it
  bool local_rotary = false;  // turns heads by the context's local angles
};

// Softmax attention over outputs of {q, k, v}. q_norm and k_norm are undefined without norm_heads.
std::unique_ptr<Mixer> MakeAttention(const ModelConfig& config, const AttentionVariant& variant,
                                     at::Tensor q_norm, at::Tensor k_norm);

}  // namespace prismaquant

#endif  // PRISMAQUANT_MODEL_ATTENTION_H_

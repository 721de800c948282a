#ifndef PRISMAQUANT_MODEL_BLOCKS_H_
#define PRISMAQUANT_MODEL_BLOCKS_H_

// The operations between the Linears of a decoder layer, as pure differentiable functions of
// tensors in float32, bfloat16 or float64. In bfloat16 each computes in float32 exactly where the
// reference implementation (transformers) does.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "model/config.h"
#include "model/model.h"

namespace prismaquant {

// Float32, or float64 for float64 input: the dtype in which norms and recurrences are computed.
at::ScalarType WideType(const at::Tensor& x);

// y = w x / rms(x) over the last dimension; the product with w is taken in x's dtype.
at::Tensor RmsNorm(const at::Tensor& x, const at::Tensor& weight, double eps);
// y = (1 + w) x / rms(x), wholly in float32 and then rounded.
at::Tensor RmsNormPlusOne(const at::Tensor& x, const at::Tensor& weight, double eps);
// y = (w x / rms(x)) silu(gate), over the last dimension.
at::Tensor GatedRmsNorm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& gate,
                        double eps);

// cos and sin [tokens, rotary_dim] of positions int64 [3, tokens] in time, row and column, the
// local ones too if the configuration has them. Where the configuration sets no frequencies apart
// for rows and columns, all turn by time.
SequenceContext RotaryContext(const ModelConfig& config, const at::Tensor& positions,
                              const ComputeOptions& options);
// Rotates the first rotary_dim of each head, halves paired: x [sequences, heads, tokens, head_dim].
at::Tensor ApplyRotary(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin);

// Causal softmax attention with shared key-value heads. q [sequences, heads, tokens, dim], k and v
// [sequences, kv_heads, tokens, dim] -> [sequences, tokens, heads * dim]. Scores are multiplied by
// `scale` (1 / sqrt(dim) if there is none); a query sees itself and the window - 1 tokens before it
// (all of them if window is 0).
at::Tensor CausalAttention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           std::optional<double> scale = std::nullopt, int64_t window = 0);

}  // namespace prismaquant

#endif  // PRISMAQUANT_MODEL_BLOCKS_H_

#ifndef PRISMAQUANT_MODEL_GATED_DELTA_H_
#define PRISMAQUANT_MODEL_GATED_DELTA_H_

// The gated delta rule (Yang et al. 2024, "Gated Delta Networks"): per head a state S [key_dim,
// value_dim] that decays by exp(g), forgets what it holds under the key and stores the value,
//   S' = exp(g_t) S_{t-1},  d_t = beta_t (v_t - S'^T k_t),  S_t = S' + k_t d_t^T,  o_t = S_t^T q_t.
// Both forms compute in float32 (float64 for float64 input) and are differentiable.

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace prismaquant {

// Tokens that are solved together, as a triangular system (docs/models.md).
inline constexpr int64_t kDeltaChunk = 64;

// q, k [sequences, heads, tokens, key_dim], v [.., value_dim], g (log decay, <= 0) and beta
// [sequences, heads, tokens], all in the wide type -> o like v.
at::Tensor ChunkedGatedDelta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const at::Tensor& g, const at::Tensor& beta);

// The recurrence itself, token by token: the definition that tests hold the chunked form against.
at::Tensor RecurrentGatedDelta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const at::Tensor& g, const at::Tensor& beta);

// x / sqrt(sum x^2 + 1e-6) over the last dimension.
at::Tensor L2Norm(const at::Tensor& x);

}  // namespace prismaquant

#endif  // PRISMAQUANT_MODEL_GATED_DELTA_H_

#include "model/gated_delta.h"

#include <torch/torch.h>

#include <limits>
#include <vector>

namespace prismaquant {
namespace {

// [sequences, heads, tokens, ..] -> [sequences, heads, chunks, kDeltaChunk, ..], zero-padded: a
// padded token has k = v = 0, beta = 0 and g = 0, and so leaves the state as it is.
at::Tensor Chunked(const at::Tensor& x, int64_t padding) {
  std::vector<int64_t> pad;
  for (int64_t d = 3; d < x.dim(); ++d) pad.insert(pad.end(), {0, 0});
  pad.insert(pad.end(), {0, padding});
  const at::Tensor padded = padding == 0 ? x : at::constant_pad_nd(x, pad);
  std::vector<int64_t> shape = padded.sizes().vec();
  shape[2] /= kDeltaChunk;
  shape.insert(shape.begin() + 3, kDeltaChunk);
  return padded.reshape(shape);
}

at::Tensor SolveUnitLower(const at::Tensor& system, const at::Tensor& right) {
  return at::linalg_solve_triangular(system, right, /*upper=*/false, /*left=*/true,
                                     /*unitriangular=*/true);
}

}  // namespace

at::Tensor L2Norm(const at::Tensor& x) {
  return x * at::rsqrt(x.square().sum(-1, /*keepdim=*/true) + 1e-6);
}

at::Tensor ChunkedGatedDelta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const at::Tensor& g, const at::Tensor& beta) {
  const int64_t tokens = q.size(2);
  const int64_t padding = (kDeltaChunk - tokens % kDeltaChunk) % kDeltaChunk;
  const at::Tensor keys = Chunked(k, padding);
  const at::Tensor scaled_keys = Chunked(k * beta.unsqueeze(-1), padding);
  const at::Tensor scaled_values = Chunked(v * beta.unsqueeze(-1), padding);
  const at::Tensor decay = Chunked(g, padding).cumsum(-1);
  const at::Tensor grown = decay.exp().unsqueeze(-1);

  const at::Tensor above =
      at::ones({kDeltaChunk, kDeltaChunk}, q.options().dtype(at::kBool)).triu(1);
  const at::Tensor pairwise = (decay.unsqueeze(-1) - decay.unsqueeze(-2))
                                  .masked_fill(above, -std::numeric_limits<double>::infinity())
                                  .exp();
  const at::Tensor keys_t = keys.transpose(-1, -2);
  const at::Tensor system = at::matmul(scaled_keys, keys_t) * pairwise;
  const at::Tensor queries = Chunked(q, padding);
  const at::Tensor within = at::matmul(queries, keys_t) * pairwise;
  const at::Tensor values = SolveUnitLower(system, scaled_values);
  const at::Tensor readers = SolveUnitLower(system, scaled_keys * grown);

  const at::Tensor grown_queries = queries * grown;
  const at::Tensor last = decay.select(-1, kDeltaChunk - 1);
  const at::Tensor fading_keys_t =
      (keys * (last.unsqueeze(-1) - decay).exp().unsqueeze(-1)).transpose(-1, -2);
  const at::Tensor chunk_decay = last.exp().unsqueeze(-1).unsqueeze(-1);

  at::Tensor state = at::zeros({q.size(0), q.size(1), q.size(3), v.size(3)}, q.options());
  std::vector<at::Tensor> outputs;
  for (int64_t c = 0; c < keys.size(2); ++c) {
    const at::Tensor stored = values.select(2, c) - at::matmul(readers.select(2, c), state);
    outputs.push_back(at::matmul(grown_queries.select(2, c), state) +
                      at::matmul(within.select(2, c), stored));
    state = state * chunk_decay.select(2, c) + at::matmul(fading_keys_t.select(2, c), stored);
  }
  return at::cat(outputs, 2).narrow(2, 0, tokens);
}

at::Tensor RecurrentGatedDelta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const at::Tensor& g, const at::Tensor& beta) {
  at::Tensor state = at::zeros({q.size(0), q.size(1), q.size(3), v.size(3)}, q.options());
  std::vector<at::Tensor> outputs;
  for (int64_t t = 0; t < q.size(2); ++t) {
    const at::Tensor key = k.select(2, t).unsqueeze(-1);
    state = state * g.select(2, t).exp().unsqueeze(-1).unsqueeze(-1);
    const at::Tensor held = (state * key).sum(-2);
    const at::Tensor delta = beta.select(2, t).unsqueeze(-1) * (v.select(2, t) - held);
    state = state + key * delta.unsqueeze(-2);
    outputs.push_back((state * q.select(2, t).unsqueeze(-1)).sum(-2));
  }
  return at::stack(outputs, 2);
}

}  // namespace prismaquant

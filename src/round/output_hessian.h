#ifndef PRISMAQUANT_ROUND_OUTPUT_HESSIAN_H_
#define PRISMAQUANT_ROUND_OUTPUT_HESSIAN_H_

// The output Hessian K = sum_t v_t g_t g_t^T of a Linear, [out, out], from the gradients g_t at its
// output: what errors of different rows of W cost together, as the Hessian of the inputs says it of
// columns (docs/rendering.md). With both, rounding makes tr(K D H D^T) small.
//
// OutputSketch estimates it while the gradients go by, in [out, kProbes] numbers: its largest
// directions are well known from a few thousand tokens, the others are not. RowFeedback is what
// rounding takes from the estimate: how the errors of rows that are rounded move those that are
// not. Values; one thread.

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace prismaquant {

class OutputSketch {
 public:
  static constexpr int64_t kProbes = 256, kRank = 32;

  // g [tokens, out] of one sequence and |g_t|^2 [tokens], both float32. Its tokens count by v_t =
  // min(1, m / |g_t|^2), m being the mean of |g_t|^2 over them: a surprising label's gradient is
  // large and says no more than others.
  void Add(const at::Tensor& g, const at::Tensor& squares);

  // F, float32 [out, min(kRank, out)], F F^T being close to K over the mean of K's diagonal
  // (Tropp et al. 2017, fixed-rank approximation from a streaming sketch). Undefined if there was
  // no gradient, or one that is not finite.
  at::Tensor Factor() const;

 private:
  // Float32 [out, s]: random, and K times that. In bfloat16 a product of both would no longer say
  // which directions K has.
  at::Tensor probes_, sketch_;
  double trace_ = 0;  // of K
};

// With the estimate c I + F F^T of K and the rows' errors e_j = w_j - q_j, row k aims at
//   w_k + a_k^T z,   z = sum_{j<k} f_j e_j,   a_k = P f_k / (1 + f_k^T P f_k),
//   P = (c I + sum_{j>k} f_j f_j^T)^-1,
// which is what the factor R of K = R R^T, R upper triangular, says: a_k^T f_j = R_jk / R_kk.
class RowFeedback {
 public:
  RowFeedback() = default;  // rows do not know of each other
  // factor [out, r] as OutputSketch leaves it.
  explicit RowFeedback(const at::Tensor& factor);

  bool empty() const { return !factor_.defined(); }
  // So many of `out` rows are rounded side by side, without knowing of each other.
  int64_t RowsAtATime(int64_t out) const;
  // z [r, columns] before the first row.
  at::Tensor Start(int64_t columns) const;
  // a^T z of the rows from `first` on, [rows, columns].
  at::Tensor Moved(int64_t first, int64_t rows, const at::Tensor& z) const;
  // Adds the errors [rows, columns] of the rows from `first` on to z.
  void Add(int64_t first, const at::Tensor& errors, at::Tensor& z) const;

 private:
  at::Tensor factor_, answer_;  // float32 [out, r]: F and the rows a_k
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_ROUND_OUTPUT_HESSIAN_H_

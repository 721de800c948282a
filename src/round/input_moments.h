#ifndef PRISMAQUANT_ROUND_INPUT_MOMENTS_H_
#define PRISMAQUANT_ROUND_INPUT_MOMENTS_H_

// InputMoments: what rounding needs to know of the inputs of one Linear, summed over tokens with
// weights w_t, in float32, block by block of tokens (docs/rendering.md).
//
//   hessian   H = sum_t w_t x_t x_t^T, with x_t as the format's product sees it
//   pull      P = sum_t w_t e_t x_t^T, with e_t = W (s_t - x_t): what the output lacks of the
//   source
//             model's, whose input there is s_t
//
// The squared distance of a rounded weight's outputs from the source's, sum_t w_t |(W + D) x_t - W
// s_t|^2, is then tr(D H D^T) - 2 <D, P> + sum_t w_t |e_t|^2. One thread.

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace prismaquant {

// So few inputs say little of those to come.
inline constexpr int64_t kFewestInputs = 32;

// Of a rounded weight W + D, summed over the tokens.
struct RoundingError {
  double weight = 0;  // tr(D H D^T): the squared error of the outputs for one and the same input
  double output = 0;  // the squared distance of the outputs from the source's
};

class InputMoments {
 public:
  explicit InputMoments(int64_t in);
  // x [tokens, in] in any float dtype; weights [tokens] or undefined (all ones); lack e [tokens,
  // out], or undefined if x is what the source has. One of both for all calls.
  void Add(const at::Tensor& x, const at::Tensor& token_weights, const at::Tensor& lack = {});
  // These with `noise` [in] added to the Hessian's diagonal.
  InputMoments WithNoise(const at::Tensor& noise) const;
  // [in, in] float32, symmetric.
  const at::Tensor& hessian() const { return hessian_; }
  // [out, in] float32; undefined without a lack.
  const at::Tensor& pull() const { return pull_; }
  int64_t tokens() const { return tokens_; }

  RoundingError ErrorOf(const at::Tensor& decoded, const at::Tensor& weight) const;

 private:
  at::Tensor hessian_, pull_;
  double lack_energy_ = 0;
  int64_t tokens_ = 0;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_ROUND_INPUT_MOMENTS_H_

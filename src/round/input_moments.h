#ifndef PRISMAQUANT_ROUND_INPUT_MOMENTS_H_
#define PRISMAQUANT_ROUND_INPUT_MOMENTS_H_

// What rounding needs to know of the inputs of one Linear, weighted by w_t per token
// (docs/rendering.md). x_t is the input as the format's product sees it, s_t the source model's
// input there, e_t = W (s_t - x_t) what the output lacks of the source's.
//
// InputRows: the inputs and lacks themselves. They judge a rounded weight W + D by
// sum_t w_t |(W + D) x_t - W s_t|^2.
//
// InputMoments: the Hessian H = sum_t w_t x_t x_t^T, added up block by block of tokens in float32;
// of bfloat16 inputs each block's product is rounded to bfloat16 first. It judges by tr(D H D^T).
//
// One thread.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace prismaquant {

// So few inputs say little of those to come.
inline constexpr int64_t kFewestInputs = 32;

// The dtype of large products in a model that is computed in `compute`: bfloat16, if that is what
// it is (sums in float32, each rounded to it once), else float32.
at::ScalarType ProductType(at::ScalarType compute);

// Of a product that is symmetric, blocks of so many rows are computed from the diagonal on.
inline constexpr int64_t kUpperProductRows = 1024;
// Adds x^T x to `sum`, float32 [n, n], on and above the diagonal and to some of what is below; see
// ops::MirrorUpper. x [tokens, n] float32 or bfloat16, of which the product is rounded to bfloat16.
void AddUpperProduct(const at::Tensor& x, at::Tensor& sum);

// Of a rounded weight W + D, summed over the tokens.
struct RoundingError {
  double weight = 0;  // tr(D H D^T): the squared error of the outputs for one and the same input
  double output = 0;  // the squared distance of the outputs from the source's
};

class RoundingJudge {
 public:
  virtual ~RoundingJudge() = default;
  // decoded, weight float32 [out, in].
  virtual RoundingError ErrorOf(const at::Tensor& decoded, const at::Tensor& weight) const = 0;
};

class InputRows : public RoundingJudge {
 public:
  // x [tokens, in] in any float dtype; weights [tokens] or undefined (all ones); lack e [tokens,
  // out], or undefined if x is what the source has. One of both for all calls.
  void Add(const at::Tensor& x, const at::Tensor& token_weights, const at::Tensor& lack = {});
  // All rows times the root of their weight, in ProductType of their dtype: [tokens, in] and
  // [tokens, out]; undefined if there are none.
  at::Tensor x() const;
  at::Tensor lack() const;
  int64_t tokens() const { return tokens_; }
  // sum_t w_t |e_t|^2, the distance of the outputs from the source's before any rounding.
  double LackEnergy() const;
  // Products are taken in ProductType.
  RoundingError ErrorOf(const at::Tensor& decoded, const at::Tensor& weight) const override;

 private:
  std::vector<at::Tensor> x_, lack_;  // by call
  int64_t tokens_ = 0;
};

class InputMoments : public RoundingJudge {
 public:
  explicit InputMoments(int64_t in);
  // As InputRows::Add.
  void Add(const at::Tensor& x, const at::Tensor& token_weights);
  // These with `noise` [in] added to the Hessian's diagonal.
  InputMoments WithNoise(const at::Tensor& noise) const;
  // [in, in] float32, symmetric.
  const at::Tensor& hessian() const { return hessian_; }
  int64_t tokens() const { return tokens_; }
  RoundingError ErrorOf(const at::Tensor& decoded, const at::Tensor& weight) const override;

 private:
  at::Tensor hessian_;
  int64_t tokens_ = 0;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_ROUND_INPUT_MOMENTS_H_

#ifndef PRISMAQUANT_ROUND_FACTORED_HESSIAN_H_
#define PRISMAQUANT_ROUND_FACTORED_HESSIAN_H_

// FactoredHessian: what GPTQ needs of the Hessian of a Linear's inputs (docs/rendering.md): the
// order of its columns and, of the damped Hessian H = R R^T in that order, the factor R and the
// inverses of its diagonal blocks. The weight has no part in it, so Linears that read the same
// inputs in the same format share one. Immutable; it takes in^2 elements of the dtype of products.
//
// DampedMatrix: a symmetric matrix, scaled so that its factor stays within float32. One thread.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace prismaquant {

// The dtype in which a matrix of `columns` columns is factored: float64 up to 4096, float32 beyond,
// and beside products in bfloat16, to which its rounding is nothing.
at::ScalarType FactorType(int64_t columns, at::ScalarType products);

// A symmetric matrix over `unit`, with damping on its diagonal, and its factor in the same memory.
class DampedMatrix {
 public:
  // `matrix`: contiguous; overwritten if it is of `type`, that of the factor.
  DampedMatrix(at::Tensor matrix, at::ScalarType type);
  double unit() const { return unit_; }
  // The lower Cholesky factor, with the matrix's own elements above its diagonal; `damping` is
  // relative to the diagonal's mean, and a row without inputs has that alone for its diagonal.
  // Undefined if it cannot be had. Valid until the next call.
  at::Tensor Factor(double damping);

 private:
  bool IsUsable() const { return mean_ > 0; }

  double mean_;  // of the diagonal; 0 if an element is not finite
  double unit_;
  at::Tensor matrix_, diagonal_;
  bool overwritten_ = false;  // above the diagonal, by a factor
};

class FactoredHessian {
 public:
  static constexpr int64_t kBlockColumns = 128;

  FactoredHessian() = default;  // not ok()
  // hessian [in, in] float32, of which nothing is kept. group: columns that are rounded one after
  // the other since they share a scale. damping: as in GptqOptions. products: dtype of factor().
  FactoredHessian(const at::Tensor& hessian, int64_t group, double damping,
                  at::ScalarType products);

  // Whether there is a factor: H is finite and not zero, and could be factored.
  bool ok() const { return factor_.defined(); }
  // Which group comes next, int64 [in / group]: those with the largest diagonal of H first, since
  // what is rounded early can still be made up for.
  const at::Tensor& groups() const { return groups_; }
  // Which column comes next, int64 [in].
  const at::Tensor& columns() const { return columns_; }
  // H's diagonal as it was given, [in].
  const at::Tensor& diagonal() const { return diagonal_; }
  // R up to a positive multiple with rows and columns reversed, hence lower triangular, [in, in];
  // above the diagonal anything finite.
  const at::Tensor& factor() const { return factor_; }
  // Of the columns from block * kBlockColumns on, U_BB = R_BB^-1, upper triangular, float32.
  const at::Tensor& inverse(int64_t block) const { return inverses_[static_cast<size_t>(block)]; }

 private:
  at::Tensor groups_, columns_, diagonal_, factor_;
  std::vector<at::Tensor> inverses_;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_ROUND_FACTORED_HESSIAN_H_

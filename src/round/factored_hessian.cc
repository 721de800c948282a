#include "round/factored_hessian.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "formats/extremes.h"
#include "kernels/gather.h"
#include "kernels/symmetric.h"

namespace prismaquant {
namespace {

// A Hessian that cannot be factored is tried again with ten times the damping, at least this.
constexpr int kDampingRetries = 4;
constexpr double kSmallestRetry = 1e-4;
constexpr int64_t kLargestFloat64 = 4096;

// The power of four next below `x`: dividing a Hessian by it changes the exponents of its factor
// and no other bit.
double PowerOfFour(double x) { return std::exp2(2 * std::floor(std::log2(x) / 2)); }

// The Cholesky factor L of the damped Hessian with rows and columns reversed, up to a positive
// multiple, float32, its upper triangle anything; undefined if it cannot be had. `reversed`: that
// Hessian.
at::Tensor ReversedFactor(at::Tensor reversed, double damping, at::ScalarType type) {
  DampedMatrix damped(std::move(reversed), type);
  for (int attempt = 0; attempt <= kDampingRetries; ++attempt) {
    const at::Tensor factor = damped.Factor(damping);
    damping = std::max(damping * 10, kSmallestRetry);
    if (!factor.defined()) continue;
    at::Tensor lower = factor.to(at::kFloat);
    // Whatever is above the diagonal is finite.
    if (AllFinite(lower.t()) && (lower.diagonal() > 0).all().item<bool>()) return lower;
  }
  return {};
}

// `block`: the lower triangle of a diagonal block of the reversed factor.
at::Tensor InverseOfBlock(const at::Tensor& block) {
  const at::Tensor own = block.tril().flip({0, 1}).to(at::kDouble);
  return at::linalg_solve_triangular(own, at::eye(own.size(0), at::kDouble), /*upper=*/true)
      .to(at::kFloat)
      .contiguous();
}

}  // namespace

at::ScalarType FactorType(int64_t columns, at::ScalarType products) {
  return columns <= kLargestFloat64 && products != at::kBFloat16 ? at::kDouble : at::kFloat;
}

DampedMatrix::DampedMatrix(at::Tensor matrix, at::ScalarType type)
    : mean_(AllFinite(matrix) ? matrix.diagonal().to(at::kDouble).mean().item<double>() : 0),
      unit_(IsUsable() ? PowerOfFour(mean_) : 1),
      matrix_(matrix.to(type).div_(unit_)),
      diagonal_(matrix_.diagonal().clone()) {}

at::Tensor DampedMatrix::Factor(double damping) {
  if (!IsUsable()) return {};
  if (overwritten_) {
    const at::Tensor below = matrix_.tril(-1);
    matrix_ = below + below.t();
  }
  overwritten_ = true;
  matrix_.diagonal().copy_(diagonal_ + damping * mean_ / unit_);
  return ops::CholeskyInPlace(matrix_) ? matrix_.t() : at::Tensor();
}

FactoredHessian::FactoredHessian(const at::Tensor& hessian, int64_t group, double damping,
                                 at::ScalarType products)
    : diagonal_(hessian.diagonal().contiguous()) {
  const int64_t in = hessian.size(0);
  const at::Tensor importance = diagonal_.view({in / group, group}).sum(1);
  groups_ = at::argsort(importance, /*stable=*/true, /*dim=*/0, /*descending=*/true);
  columns_ = (groups_.unsqueeze(1) * group + at::arange(group).unsqueeze(0)).flatten();
  const at::Tensor backwards = columns_.flip(0);
  const at::Tensor factor = ReversedFactor(ops::Gather(hessian.contiguous(), backwards, backwards),
                                           damping, FactorType(in, products));
  if (!factor.defined()) return;
  for (int64_t begin = 0; begin < in; begin += kBlockColumns) {
    const int64_t columns = std::min(kBlockColumns, in - begin), after = in - begin - columns;
    inverses_.push_back(InverseOfBlock(factor.narrow(0, after, columns).narrow(1, after, columns)));
  }
  factor_ = factor.to(products);
}

}  // namespace prismaquant

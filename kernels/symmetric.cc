#include "kernels/symmetric.h"

#include <ATen/Parallel.h>
#include <ATen/native/BatchLinearAlgebra.h>
#include <torch/library.h>
#include <torch/torch.h>

#include <algorithm>

#include "kernels/operator.h"

namespace prismaquant::ops {
namespace {

// A tile and its mirror image stay in the first-level cache.
constexpr int64_t kTile = 32;

bool IsSquare(const at::Tensor& matrix) {
  return matrix.dim() == 2 && matrix.size(0) == matrix.size(1) && matrix.is_contiguous();
}

void MirrorTile(float* matrix, int64_t n, int64_t row, int64_t column) {
  const int64_t rows = std::min(row + kTile, n), columns = std::min(column + kTile, n);
  for (int64_t i = row; i < rows; ++i) {
    for (int64_t j = column; j < std::min(columns, i); ++j) matrix[i * n + j] = matrix[j * n + i];
  }
}

void MirrorUpperCpu(const at::Tensor& matrix) {
  TORCH_CHECK(IsSquare(matrix) && matrix.scalar_type() == at::kFloat, "matrix is ",
              matrix.scalar_type(), " ", matrix.sizes(), ", expected a contiguous square of Float");
  const int64_t n = matrix.size(0), tiles = (n + kTile - 1) / kTile;
  auto* elements = matrix.mutable_data_ptr<float>();
  // A short row of tiles and a long one together, so that all tasks are alike.
  at::parallel_for(0, (tiles + 1) / 2, 1, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      for (int64_t t = 0; t <= pair; ++t) MirrorTile(elements, n, pair * kTile, t * kTile);
      const int64_t other = tiles - 1 - pair;
      for (int64_t t = 0; other > pair && t <= other; ++t) {
        MirrorTile(elements, n, other * kTile, t * kTile);
      }
    }
  });
}

// LAPACK's matrices are column-major: its lower half is the upper one here.
template <typename Element>
bool Factor(const at::Tensor& matrix) {
  const int n = static_cast<int>(matrix.size(0));
  int failed = 0;
  at::native::lapackCholesky<Element>('L', n, matrix.mutable_data_ptr<Element>(), std::max(n, 1),
                                      &failed);
  return failed == 0;
}

bool CholeskyCpu(const at::Tensor& matrix) {
  const at::ScalarType type = matrix.scalar_type();
  TORCH_CHECK(IsSquare(matrix) && (type == at::kFloat || type == at::kDouble), "matrix is ", type,
              " ", matrix.sizes(), ", expected a contiguous square of Float or Double");
  return type == at::kDouble ? Factor<double>(matrix) : Factor<float>(matrix);
}

TORCH_LIBRARY_FRAGMENT(prismaquant, m) {
  m.def("mirror_upper(Tensor(a!) matrix) -> ()");
  m.def("cholesky_(Tensor(a!) matrix) -> bool");
}

TORCH_LIBRARY_IMPL(prismaquant, CPU, m) {
  m.impl("mirror_upper", &MirrorUpperCpu);
  m.impl("cholesky_", &CholeskyCpu);
}

}  // namespace

void MirrorUpper(const at::Tensor& matrix) {
  static const auto op = Operator<void(const at::Tensor&)>("prismaquant::mirror_upper");
  op.call(matrix);
}

bool CholeskyInPlace(const at::Tensor& matrix) {
  static const auto op = Operator<bool(const at::Tensor&)>("prismaquant::cholesky_");
  return op.call(matrix);
}

}  // namespace prismaquant::ops

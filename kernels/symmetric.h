#ifndef PRISMAQUANT_KERNELS_SYMMETRIC_H_
#define PRISMAQUANT_KERNELS_SYMMETRIC_H_

// Operators on a symmetric matrix in its own memory. prismaquant::mirror_upper: the lower half of
// one whose upper half alone was computed. prismaquant::cholesky_: the factor, by LAPACK, with the
// other half left as it is; at::linalg_cholesky_ex needs the same memory again and clears that half
// column by column, which takes as long as the factor. Thread-safe on different matrices; parallel.

#include <ATen/core/Tensor.h>

namespace prismaquant::ops {

// matrix float32 [n, n], contiguous: elements below the diagonal become those above it. Another
// matrix throws c10::Error.
void MirrorUpper(const at::Tensor& matrix);

// matrix float32 or float64 [n, n], contiguous: diagonal and what is above it become L^T with
// L L^T = matrix, L lower triangular. Returns whether there is one; if not, that half is undefined.
// Another matrix throws c10::Error.
bool CholeskyInPlace(const at::Tensor& matrix);

}  // namespace prismaquant::ops

#endif  // PRISMAQUANT_KERNELS_SYMMETRIC_H_

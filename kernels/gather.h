#ifndef PRISMAQUANT_KERNELS_GATHER_H_
#define PRISMAQUANT_KERNELS_GATHER_H_

// The operator prismaquant::gather: a matrix with its rows and columns in another order, in one
// pass. Thread-safe; parallel over rows.

#include <ATen/core/Tensor.h>

namespace prismaquant::ops {

// matrix [r, c] of elements of 1, 2 or 4 bytes, contiguous; rows and columns int64, places in the
// matrix -> [rows, columns], element (i, j) being matrix[rows_i, columns_j]. `rows` undefined: all
// in order. Other tensors, and places outside, throw c10::Error.
at::Tensor Gather(const at::Tensor& matrix, const at::Tensor& columns, const at::Tensor& rows = {});

}  // namespace prismaquant::ops

#endif  // PRISMAQUANT_KERNELS_GATHER_H_

#ifndef PRISMAQUANT_KERNELS_ROW_PRODUCTS_H_
#define PRISMAQUANT_KERNELS_ROW_PRODUCTS_H_

// The operator prismaquant::row_products: inner products of the rows of one matrix with those of
// others, in one pass over all of them and without a matrix of products. Thread-safe; parallel over
// rows; results do not depend on the number of threads.

#include <ATen/core/Tensor.h>

namespace prismaquant::ops {

// a and each of b [rows, columns], all float32 or all bfloat16, contiguous -> float32 [b's, rows]:
// sum_j a_rj b_rj, summed in float32 in 32 interleaved parts. Other tensors throw c10::Error.
at::Tensor RowProducts(const at::Tensor& a, at::TensorList b);

// sum_rj a_rj b_rj of two such matrices: the same row sums, added in float64.
double InnerProduct(const at::Tensor& a, const at::Tensor& b);

}  // namespace prismaquant::ops

#endif  // PRISMAQUANT_KERNELS_ROW_PRODUCTS_H_

#ifndef PRISMAQUANT_FORMATS_EXTREMES_H_
#define PRISMAQUANT_FORMATS_EXTREMES_H_

// What the largest magnitude of a tensor tells, in one pass and, but for float64, without a
// temporary of its size.

#include <ATen/core/Tensor.h>

namespace prismaquant {

// Whether all elements are finite. Tensors here are float64, float32, float16 or bfloat16.
bool AllFinite(const at::Tensor& tensor);
// Largest |x|; 0 if there are no elements, NaN if one is NaN.
double LargestMagnitude(const at::Tensor& tensor);

}  // namespace prismaquant

#endif  // PRISMAQUANT_FORMATS_EXTREMES_H_

#ifndef PRISMAQUANT_KERNELS_MAGNITUDE_H_
#define PRISMAQUANT_KERNELS_MAGNITUDE_H_

// The operator prismaquant::largest_magnitude, at the speed of memory. Thread-safe; parallel.

#include <ATen/core/Tensor.h>

namespace prismaquant::ops {

// Largest |x| of a contiguous float32, float16 or bfloat16 tensor; 0 if it is empty, NaN if one is
// NaN. Other tensors throw c10::Error.
double LargestMagnitude(const at::Tensor& tensor);

}  // namespace prismaquant::ops

#endif  // PRISMAQUANT_KERNELS_MAGNITUDE_H_

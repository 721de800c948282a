#ifndef PRISMAQUANT_FORMATS_TENSOR_BYTES_H_
#define PRISMAQUANT_FORMATS_TENSOR_BYTES_H_

// The raw bytes of a contiguous CPU tensor, for writing. The span lives as long as the tensor.

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <span>

namespace prismaquant {

inline std::span<const std::byte> TensorBytes(const at::Tensor& tensor) {
  return {static_cast<const std::byte*>(tensor.const_data_ptr()), tensor.nbytes()};
}

}  // namespace prismaquant

#endif  // PRISMAQUANT_FORMATS_TENSOR_BYTES_H_

#include "formats/extremes.h"

#include <torch/torch.h>

#include <cmath>

#include "kernels/magnitude.h"

namespace prismaquant {

double LargestMagnitude(const at::Tensor& tensor) {
  if (tensor.scalar_type() != at::kDouble) return ops::LargestMagnitude(tensor.contiguous());
  return tensor.numel() == 0 ? 0 : tensor.abs().max().item<double>();
}

bool AllFinite(const at::Tensor& tensor) { return std::isfinite(LargestMagnitude(tensor)); }

}  // namespace prismaquant

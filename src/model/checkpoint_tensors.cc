#include "model/checkpoint_tensors.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include "formats/format.h"

namespace prismaquant::checkpoint_tensors {

Result<at::Tensor> Map(const Checkpoint& checkpoint, const std::string& name) {
  PQ_ASSIGN_OR_RETURN(const TensorView view, checkpoint.Get(name));
  at::Tensor tensor = TensorFromView(view);
  if (tensor.is_floating_point() && !tensor.isfinite().all().item<bool>()) {
    const int64_t bad = tensor.isfinite().logical_not().sum().item<int64_t>();
    return Status::InvalidInput(fmt::format("{}: tensor {} holds {} values that are not finite",
                                            checkpoint.folder().string(), name, bad));
  }
  return tensor;
}

Result<at::Tensor> Load(const Checkpoint& checkpoint, const std::string& name, at::ScalarType dtype,
                        at::Device device) {
  PQ_ASSIGN_OR_RETURN(const at::Tensor tensor, Map(checkpoint, name));
  return tensor.to(device, dtype, /*non_blocking=*/false, /*copy=*/true);
}

}  // namespace prismaquant::checkpoint_tensors

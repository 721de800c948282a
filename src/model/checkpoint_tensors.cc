#include "model/checkpoint_tensors.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>

#include "formats/extremes.h"
#include "formats/format.h"

namespace prismaquant::checkpoint_tensors {
namespace {

// Elements that are tested at a time: the masks are as large as what they test.
constexpr int64_t kBlock = int64_t{1} << 22;

}  // namespace

Status RequireFinite(const Checkpoint& checkpoint, const std::string& name,
                     const at::Tensor& values) {
  if (!values.is_floating_point() || AllFinite(values)) return {};
  const at::Tensor flat = values.reshape({-1});
  int64_t bad = 0;
  for (int64_t begin = 0; begin < flat.numel(); begin += kBlock) {
    const at::Tensor block = flat.narrow(0, begin, std::min(kBlock, flat.numel() - begin));
    bad += at::isfinite(block).logical_not().sum().item<int64_t>();
  }
  return Status::InvalidInput(fmt::format("{}: tensor {} holds {} values that are not finite",
                                          checkpoint.folder().string(), name, bad));
}

Status RequireShape(const Checkpoint& checkpoint, const std::string& name,
                    const std::vector<int64_t>& shape) {
  PQ_ASSIGN_OR_RETURN(const TensorView view, checkpoint.Get(name));
  if (view.shape != shape) {
    return Status::InvalidInput(fmt::format(
        "{}: tensor {} has shape [{}], expected [{}] by config.json", checkpoint.folder().string(),
        name, fmt::join(view.shape, ", "), fmt::join(shape, ", ")));
  }
  if (view.dtype != DType::kBF16 && view.dtype != DType::kF16 && view.dtype != DType::kF32) {
    return Status::InvalidInput(fmt::format("{}: tensor {} is {}, expected BF16, F16 or F32",
                                            checkpoint.folder().string(), name,
                                            DTypeName(view.dtype)));
  }
  return {};
}

Status RequireWeight(const Checkpoint& checkpoint, const std::string& linear,
                     const std::vector<int64_t>& shape) {
  const bool quantized = checkpoint.Find(linear + ".weight_packed") != nullptr ||
                         checkpoint.Find(linear + ".weight_scale") != nullptr;
  return quantized ? Status() : RequireShape(checkpoint, linear + ".weight", shape);
}

DType SourceType(const Checkpoint& checkpoint, const std::string& weight,
                 const std::string& other) {
  const TensorView* own = checkpoint.Find(weight);
  const bool plain = own != nullptr && own->dtype != DType::kF8E4M3;
  const TensorView* source = plain ? own : checkpoint.Find(other);
  return source != nullptr ? source->dtype : DType::kBF16;
}

Result<at::Tensor> Map(const Checkpoint& checkpoint, const std::string& name) {
  PQ_ASSIGN_OR_RETURN(const TensorView view, checkpoint.Get(name));
  const at::Tensor tensor = TensorFromView(view);
  PQ_RETURN_IF_ERROR(RequireFinite(checkpoint, name, tensor));
  return tensor;
}

Result<at::Tensor> Load(const Checkpoint& checkpoint, const std::string& name, at::ScalarType dtype,
                        at::Device device) {
  PQ_ASSIGN_OR_RETURN(const at::Tensor tensor, Map(checkpoint, name));
  return tensor.to(device, dtype, /*non_blocking=*/false, /*copy=*/true);
}

}  // namespace prismaquant::checkpoint_tensors

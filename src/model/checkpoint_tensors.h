#ifndef PRISMAQUANT_MODEL_CHECKPOINT_TENSORS_H_
#define PRISMAQUANT_MODEL_CHECKPOINT_TENSORS_H_

// What a checkpoint holds of single tensors, and reading them into libtorch, refused if a value is
// not finite.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "io/checkpoint.h"

namespace prismaquant::checkpoint_tensors {

// kInvalidInput, naming folder and tensor, if one of `values` (the tensor or a part of it) is NaN
// or infinite.
Status RequireFinite(const Checkpoint& checkpoint, const std::string& name,
                     const at::Tensor& values);
// kInvalidInput, naming folder, tensor, found and expected, unless the tensor is there in this
// shape and in BF16, F16 or F32.
Status RequireShape(const Checkpoint& checkpoint, const std::string& name,
                    const std::vector<int64_t>& shape);
// The same of the weight of `linear`, unless a quantized format stores it.
Status RequireWeight(const Checkpoint& checkpoint, const std::string& linear,
                     const std::vector<int64_t>& shape);
// The dtype that the source has for `weight`: its own, or, if it is missing or quantized, that of
// the tensor `other`, or BF16.
DType SourceType(const Checkpoint& checkpoint, const std::string& weight, const std::string& other);
// As stored, mapped without copying: valid as long as the checkpoint.
Result<at::Tensor> Map(const Checkpoint& checkpoint, const std::string& name);
// Converted; a copy of its own.
Result<at::Tensor> Load(const Checkpoint& checkpoint, const std::string& name, at::ScalarType dtype,
                        at::Device device);

}  // namespace prismaquant::checkpoint_tensors

#endif  // PRISMAQUANT_MODEL_CHECKPOINT_TENSORS_H_

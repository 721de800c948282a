#ifndef PRISMAQUANT_FORMATS_WRITE_TENSORS_H_
#define PRISMAQUANT_FORMATS_WRITE_TENSORS_H_

// WriteTensors: for tests, a checkpoint of given tensors, in the place of one that is there.

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "base/json.h"
#include "base/status.h"
#include "formats/format.h"
#include "formats/tensor_bytes.h"
#include "io/checkpoint.h"
#include "io/file_system.h"

namespace prismaquant {

inline Status WriteTensors(const std::filesystem::path& folder,
                           const std::map<std::string, at::Tensor>& tensors, const Json& config) {
  std::vector<CheckpointWriter::Tensor> plan;
  for (const auto& [name, tensor] : tensors) {
    plan.push_back({{name, FromScalarType(tensor.scalar_type()), tensor.sizes().vec()},
                    [tensor = tensor.contiguous()](const CheckpointWriter::Sink& sink) {
                      return sink(TensorBytes(tensor));
                    }});
  }
  return CheckpointWriter::Write(FileSystem::Default(), folder, {.overwrite = true}, plan,
                                 {{"config.json", config.dump()}});
}

}  // namespace prismaquant

#endif  // PRISMAQUANT_FORMATS_WRITE_TENSORS_H_

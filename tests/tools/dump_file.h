#ifndef PRISMAQUANT_TESTS_TOOLS_DUMP_FILE_H_
#define PRISMAQUANT_TESTS_TOOLS_DUMP_FILE_H_

// What the dump programs share: the safetensors file they write for the oracles, the arguments they
// read, and their way to end.

#include <fmt/format.h>
#include <torch/torch.h>

#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "base/json.h"
#include "base/status.h"
#include "formats/format.h"
#include "formats/tensor_bytes.h"
#include "formats/torch_guard.h"
#include "io/file_system.h"
#include "io/safetensors.h"

namespace prismaquant {

using NamedTensors = std::map<std::string, at::Tensor>;

inline Result<at::ScalarType> ParseComputeType(const std::string& name) {
  if (name == "float32") return at::kFloat;
  if (name == "bfloat16") return at::kBFloat16;
  if (name == "float64") return at::kDouble;
  return Status::InvalidInput(
      fmt::format("dtype {} is not known, expected float32, bfloat16 or float64", name));
}

inline Status WriteDump(const std::string& path, NamedTensors tensors) {
  std::vector<TensorSpec> specs;
  for (auto& [name, tensor] : tensors) {
    tensor = tensor.detach().contiguous();
    specs.push_back({name, FromScalarType(tensor.scalar_type()), tensor.sizes().vec()});
  }
  PQ_ASSIGN_OR_RETURN(SafetensorsWriter writer,
                      SafetensorsWriter::Create(FileSystem::Default(), path, specs, {}));
  for (const auto& [name, tensor] : tensors) {
    PQ_RETURN_IF_ERROR(writer.Append(TensorBytes(tensor)));
  }
  return writer.Close();
}

// The tensor `direction` of a file, copied.
inline Result<at::Tensor> ReadDirection(const std::string& path) {
  PQ_ASSIGN_OR_RETURN(const SafetensorsFile file, SafetensorsFile::Open(path));
  const TensorView* direction = file.Find("direction");
  if (direction == nullptr) return Status::InvalidInput(path + ": no tensor direction");
  return TensorFromView(*direction).clone();
}

// The exit code of a program that did `body`; what failed goes to stderr.
template <typename Body>
int RunDump(const char* program, Body body) {
  const Status status = GuardTorch(program, body);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.message().c_str());
  return status.exit_code();
}

}  // namespace prismaquant

#endif  // PRISMAQUANT_TESTS_TOOLS_DUMP_FILE_H_

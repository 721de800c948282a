#include "probe/blob_tensors.h"

#include <torch/torch.h>

#include <map>
#include <utility>

#include "formats/format.h"
#include "formats/tensor_bytes.h"

namespace prismaquant {

Status PutTensors(RunStore& store, const std::string& blob,
                  const std::vector<std::pair<std::string, at::Tensor>>& tensors) {
  std::vector<at::Tensor> kept;
  std::vector<BlobTensor> entries;
  kept.reserve(tensors.size());
  for (const auto& [name, tensor] : tensors) {
    kept.push_back(tensor.contiguous());
    entries.push_back({{name, FromScalarType(tensor.scalar_type()), tensor.sizes().vec()},
                       TensorBytes(kept.back())});
  }
  return store.PutBlob(blob, entries);
}

Status PutSequences(RunStore& store, const std::string& blob, int64_t first,
                    const std::vector<at::Tensor>& tensors) {
  std::vector<std::pair<std::string, at::Tensor>> named;
  for (const at::Tensor& tensor : tensors) {
    named.emplace_back(std::to_string(first + static_cast<int64_t>(named.size())), tensor);
  }
  return PutTensors(store, blob, named);
}

Result<StoredSequences> StoredSequences::Open(const RunStore& store, const std::string& blob) {
  PQ_ASSIGN_OR_RETURN(SafetensorsFile file, store.Blob(blob));
  std::map<int64_t, at::Tensor> numbered;
  for (const TensorView& view : file.tensors()) {
    numbered[std::stoll(view.name)] = TensorFromView(view);
  }
  StoredSequences result(std::move(file));
  if (!numbered.empty()) result.first_ = numbered.begin()->first;
  for (auto& [sequence, tensor] : numbered) result.tensors_.push_back(std::move(tensor));
  return result;
}

}  // namespace prismaquant

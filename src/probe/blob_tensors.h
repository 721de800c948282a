#ifndef PRISMAQUANT_PROBE_BLOB_TENSORS_H_
#define PRISMAQUANT_PROBE_BLOB_TENSORS_H_

// Tensors in a blob of the run store, under their names or one per sequence: the hidden states and
// gradients that wait between two layers. Sequences may differ in length.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "io/safetensors.h"
#include "store/run_store.h"

namespace prismaquant {

Status PutTensors(RunStore& store, const std::string& blob,
                  const std::vector<std::pair<std::string, at::Tensor>>& tensors);

// `tensors` belong to the sequences from `first` on.
Status PutSequences(RunStore& store, const std::string& blob, int64_t first,
                    const std::vector<at::Tensor>& tensors);

// Mapped without copying: the tensors live as long as the object.
class StoredSequences {
 public:
  static Result<StoredSequences> Open(const RunStore& store, const std::string& blob);
  const at::Tensor& of(int64_t sequence) const {
    return tensors_[static_cast<size_t>(sequence - first_)];
  }
  // Undefined if the sequence has none.
  at::Tensor Find(int64_t sequence) const {
    return sequence >= first_ && sequence < first_ + count() ? of(sequence) : at::Tensor();
  }
  int64_t first() const { return first_; }
  int64_t count() const { return static_cast<int64_t>(tensors_.size()); }

 private:
  explicit StoredSequences(SafetensorsFile file) : file_(std::move(file)) {}
  SafetensorsFile file_;
  int64_t first_ = 0;
  std::vector<at::Tensor> tensors_;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_PROBE_BLOB_TENSORS_H_

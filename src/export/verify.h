#ifndef PRISMAQUANT_EXPORT_VERIFY_H_
#define PRISMAQUANT_EXPORT_VERIFY_H_

// Verification of a checkpoint on disk, from its bytes alone: that readers will take every tensor
// for what it is. Also the stored formats, as inspection and verification read them. Reads every
// weight once; holds one Linear in memory.

#include <map>
#include <string>

#include "base/status.h"
#include "formats/format.h"
#include "io/checkpoint.h"
#include "model/model.h"

namespace prismaquant {

// A Linear of a checkpoint as it is stored.
struct StoredLinear {
  const Format* format = nullptr;
  int64_t out = 0, in = 0;
  DType dtype = DType::kBF16;  // of the unquantized weight
  int layer = -1;              // of the body; -1 outside it
  PackedSlice packed = {};
  // As in LinearInfo; its own name for a Linear that the model does not know.
  std::string unit = {}, scale_group = {}, input_group = {};
};

// Module name -> how it is stored, for every Linear of the model and any others. kUnmet naming
// module and tensors if they fit no format.
Result<std::map<std::string, StoredLinear>> ReadStoredLinears(const Model& model);

// Checks that
// - every Linear has exactly the tensors of its format, with the right dtypes and shapes and values
// that can be decoded,
//   and no tensor of a quantized format belongs to anything else;
// - quantization_config is complete, and leads both readers to the stored format of every Linear
// (VerifyMatching);
// - modules that vLLM fuses share their format and, bit for bit, their global scales; so do, as far
//   as they must, the experts of a layer, which are stored alike in all layers of a part;
// - the index states the tensors' bytes, and no *.safetensors file lies beside it;
// - given the source: every tensor is the source's bit for bit (smoothed, if prismaquant.json in
//   the folder says so), or an expert's slice of one, or belongs to a quantized Linear of the
//   source, none of the source's is missing, config.json differs by quantization_config alone and
//   copied files are equal.
// kUnmet names the first violation.
Status VerifyCheckpoint(const Checkpoint& out, const Checkpoint* source);

}  // namespace prismaquant

#endif  // PRISMAQUANT_EXPORT_VERIFY_H_

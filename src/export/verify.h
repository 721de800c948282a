#ifndef PRISMAQUANT_EXPORT_VERIFY_H_
#define PRISMAQUANT_EXPORT_VERIFY_H_

// Verification of a checkpoint against every rule of docs/checkpoint.md, by re-reading what was written.

#include "base/status.h"
#include "io/checkpoint.h"

namespace prismaquant {

// Each Linear's tensors are exactly those of the format that quantization_config gives it, with valid values; fused Linears
// share a format and their global scales; readers resolve each module as intended; and, with a source, every other tensor is
// there bit for bit and none is left over. kUnmet names what is wrong.
Status VerifyCheckpoint(const Checkpoint& checkpoint, const Checkpoint* source);

}  // namespace prismaquant

#endif  // PRISMAQUANT_EXPORT_VERIFY_H_

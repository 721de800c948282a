#ifndef PRISMAQUANT_EXPORT_EXPORTER_H_
#define PRISMAQUANT_EXPORT_EXPORTER_H_

// Export: write the quantized checkpoint. Its tensors stand in the order of the source, each
// quantized Linear's weight replaced in place by the tensors of its format, the packed experts of a
// part with a quantized expert by those of each expert, everything else passed through bit for bit
// from the source's mapping, or as smoothed where the model is. Rendered tensors are asked for one
// Linear at a time, when their bytes are due, so memory holds one Linear. The folder appears at its
// name only after VerifyCheckpoint has accepted it; on failure nothing is left behind.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <string>

#include "base/json.h"
#include "base/status.h"
#include "formats/format.h"
#include "io/checkpoint.h"
#include "model/model.h"

namespace prismaquant {

// The name under which the record of the run stands in a checkpoint.
inline constexpr char kRecordFile[] = "prismaquant.json";
// Its key for SmoothingToJson, null or absent if the model is not smoothed.
inline constexpr char kSmoothingKey[] = "smoothing";

struct ExportPlan {
  const Model* model = nullptr;                  // of the source; if smoothed, the record says how
  std::map<std::string, const Format*> formats;  // every Linear of the model
  // The stored tensors of a quantized Linear; called once each, in the order of the source's
  // tensors.
  std::function<Result<StoredTensors>(const std::string& linear)> rendered;
  Json run_record;   // contents of kRecordFile; none is written if null
  std::string card;  // contents of README.md; none is written if empty
  // `check`, if set, runs after the program's own verification.
  CheckpointWriter::Options options;
};

// kInvalidInput if a Linear has no format or one that cannot store it, or `formats` names an
// unknown Linear.
Status ExportCheckpoint(FileSystem& fs, const ExportPlan& plan, const std::filesystem::path& out);

// The exact bytes of all *.safetensors, headers included, that an export with these formats writes.
Result<int64_t> PlannedFileBytes(const Model& model,
                                 const std::map<std::string, const Format*>& formats,
                                 const CheckpointWriter::Options& options);

}  // namespace prismaquant

#endif  // PRISMAQUANT_EXPORT_EXPORTER_H_

#ifndef PRISMAQUANT_EXPORT_EXPORTER_H_
#define PRISMAQUANT_EXPORT_EXPORTER_H_

// The exporter: writes the quantized checkpoint. Tensors come in the order of the source's files; the weight of a quantized
// Linear is replaced by its format's tensors, everything else is copied bit for bit from the source's mapping. Memory holds one
// layer's rendered tensors.

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

struct ExportPlan {
  const Model* model = nullptr;                   // of the source
  std::map<std::string, const Format*> formats;   // every Linear of the body
  // Stored tensors of all quantized Linears of a layer; asked for in rising and possibly repeated order.
  std::function<Result<std::map<std::string, StoredTensors>>(int layer)> rendered;
  Json record;        // contents of prismaquant.json
  std::string card;   // README.md
  CheckpointWriter::Options options;
};

// Writes `out`, whole or not at all, and checks it afterwards with VerifyCheckpoint.
Status ExportCheckpoint(FileSystem& fs, const ExportPlan& plan, const std::filesystem::path& out);

// Bytes of all *.safetensors files, headers included, that an export with these formats writes.
int64_t PlannedFileBytes(const Model& model, const std::map<std::string, const Format*>& formats,
                         int64_t shard_bytes);

// Modules outside the body that a runtime builds as Linears (vision tower, MTP head).
std::vector<std::string> OtherLinearsOf(const Model& model, const std::map<std::string, const Format*>& formats);

// The name under which the record of the run stands in a checkpoint.
inline constexpr char kRecordFile[] = "prismaquant.json";

}  // namespace prismaquant

#endif  // PRISMAQUANT_EXPORT_EXPORTER_H_

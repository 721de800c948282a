#ifndef PRISMAQUANT_EXPORT_SUMMARY_H_
#define PRISMAQUANT_EXPORT_SUMMARY_H_

// CheckpointSummary: how many Linears, weights and bytes of a checkpoint are in which format, part
// by part, for a checkpoint on disk or for an export that is only planned. Plain values.

#include <cstdint>
#include <map>
#include <string>

#include "base/json.h"
#include "base/status.h"
#include "export/inventory.h"
#include "export/verify.h"
#include "formats/format.h"
#include "model/model.h"

namespace prismaquant {

// Linears of one format.
struct FormatTotals {
  int64_t linears = 0;
  int64_t weights = 0;
  int64_t bytes = 0;    // of all their tensors, biases excluded
  int64_t payload = 0;  // of codes and group or channel scales
};

struct PartSummary {
  std::map<std::string, FormatTotals> formats;    // by format name
  int64_t other_parameters = 0, other_bytes = 0;  // norms, embeddings, convolutions, biases
};

struct CheckpointSummary {
  std::map<Part, PartSummary> parts;
  std::map<int, std::map<std::string, FormatTotals>> layers;  // of the text body
  int64_t parameters = 0;  // of the model, not of the packed tensors
  int64_t file_bytes = 0;  // of all *.safetensors
  // Of all Linears, and what of them is read for one token of text: of a mixture's experts, those
  // that a token is routed to.
  int64_t linear_bytes = 0, active_bytes = 0;
  double bpp = 0;  // over the Linears that have a choice of formats; 0 if there are none

  double file_bpp() const;                            // 0 for a checkpoint without parameters
  std::map<std::string, FormatTotals> Total() const;  // over all parts
};

// `model` of the checkpoint that is summarized.
Result<CheckpointSummary> Summarize(const Model& model);
// What an export of `source` with these formats and this size (PlannedFileBytes) will hold.
Result<CheckpointSummary> SummarizePlan(const Model& source,
                                        const std::map<std::string, const Format*>& formats,
                                        int64_t file_bytes);

// {"parameters", "bytes", "bpp", "file_bpp", "formats": {...}, "parts": {"text body": {...}},
// "layers": [...]}.
Json SummaryToJson(const CheckpointSummary& summary);

}  // namespace prismaquant

#endif  // PRISMAQUANT_EXPORT_SUMMARY_H_

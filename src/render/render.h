#ifndef PRISMAQUANT_RENDER_RENDER_H_
#define PRISMAQUANT_RENDER_RENDER_H_

// Rendering: turn the weights of every quantized Linear into final codes and scales, part by part
// (vision tower, body, output projection, MTP head) and stage by stage through the already
// quantized prefix, so that each Linear is rounded for the inputs that it will really see
// (docs/rendering.md). Every finished layer is committed to the run store; memory holds one layer
// and the calibration's activations of one stage.

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

#include "base/json.h"
#include "base/status.h"
#include "data/calibration.h"
#include "formats/format.h"
#include "model/model.h"
#include "round/gptq.h"
#include "store/run_store.h"

namespace prismaquant {

// One sequence in so many, at least one of so few, is kept out of the Hessian and judges the
// result.
inline constexpr size_t kHeldOutEvery = 8;

enum class RenderMode {
  kRtn,   // round to nearest, as compressed-tensors
  kGptq,  // GPTQ with the group scale chosen inside the loop
};

struct RenderOptions {
  RenderMode mode = RenderMode::kGptq;
  GptqOptions gptq;
  // Weight each token of the Hessian by |g_t|^2 of the probe, if the store has it for all layers.
  bool guided = true;
  bool correct = true;  // round what Correct makes of a weight
  ComputeOptions compute;
};

// Linear name -> format; every Linear of the model is listed.
using FormatChoice = std::map<std::string, const Format*>;

// Names the rendering of these choices under these options within a run store.
std::string RenderKey(const FormatChoice& formats, const RenderOptions& options);

// Whether the store holds a layer of it.
Result<bool> IsRenderingBegun(RunStore& store, const std::string& key);

// Renders what the store does not hold yet under `key`.
Status RenderModel(const Model& model, const Calibration& calibration, const FormatChoice& formats,
                   const RenderOptions& options, const std::string& key, RunStore& store);

// The rendered tensors of one layer, copied from the store: Linear name -> stored tensors.
Result<std::map<std::string, StoredTensors>> RenderedLayer(const RunStore& store,
                                                           const std::string& key, int layer);

// What rendering did to each Linear: {"<name>": {"format", "rendered" ("gptq", "rtn", or
// "rtn+scales" for an expert that saw too few tokens), "error_ratio", "weight_error_ratio",
// "tokens"}}. The ratios: GptqResult's, on held-out sequences; absent without any. tokens: of
// experts.
Result<Json> RenderReport(RunStore& store, const std::string& key, int64_t layers);

// Frees the store of a rendering that has been exported: its tensors and its marks. What
// RenderReport says, a few bytes per Linear, stays.
Status DropRendering(RunStore& store, const std::string& key);

}  // namespace prismaquant

#endif  // PRISMAQUANT_RENDER_RENDER_H_

// sequence_dump CHECKPOINT IDS.json IMAGES DTYPE OUT.safetensors
//
// Runs a checkpoint, as it is stored, on token ids ([[id, ..], ..], all of one length) and on the
// captioned images of IMAGES ("-": none), in float32 or bfloat16. Writes per text N `text.N.logits`
// and, with an MTP head, `text.N.mtp_logits`; per caption N `caption.N.ids`, `caption.N.patches`,
// `caption.N.grid` (rows, columns) and `caption.N.logits`.

#include <fmt/format.h>
#include <torch/torch.h>

#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cli/calibration_store.h"
#include "dump_file.h"
#include "evaluate/forward.h"
#include "evaluate/quantized_linears.h"

namespace prismaquant {
namespace {

Result<TokenWindows> ReadWindows(const std::string& path) {
  PQ_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  PQ_ASSIGN_OR_RETURN(const Json json, ParseJson(text, path));
  TokenWindows windows;
  for (const Json& row : json) windows.windows.push_back(row.get<std::vector<int32_t>>());
  return windows;
}

Status DumpMtp(const Model& model, const Calibration& data, const Sequences& sequences,
               const BodyOutputs& outputs, const ComputeOptions& compute, NamedTensors& out) {
  const int layer = model.FindPart(Part::kMtp)->first;
  PQ_ASSIGN_OR_RETURN(const auto block, model.LoadLayer(layer, compute));
  PQ_ASSIGN_OR_RETURN(const auto linears, QuantizedLinears::Load(model, layer, compute));
  PQ_ASSIGN_OR_RETURN(const auto projection,
                      LoadProjection(model, StoredLinears(model, compute), compute));
  PQ_ASSIGN_OR_RETURN(const auto head, model.LoadHead(Part::kMtp, compute, projection));
  for (int64_t n = 0; n < data.text.count(); ++n) {
    PQ_ASSIGN_OR_RETURN(const at::Tensor input,
                        sequences.MtpInput(n, outputs.hidden[static_cast<size_t>(n)]));
    const at::Tensor y = RunLayer(*block, sequences.Context(Part::kMtp, n), input, *linears);
    out[fmt::format("text.{}.mtp_logits", n)] = head->Logits(y)[0];
  }
  return {};
}

Status Dump(const std::vector<std::string>& arguments) {
  const at::NoGradGuard no_grad;
  PQ_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(arguments[0]));
  PQ_ASSIGN_OR_RETURN(const std::unique_ptr<Model> model, Model::Open(checkpoint));
  Calibration data;
  PQ_ASSIGN_OR_RETURN(data.text, ReadWindows(arguments[1]));
  if (arguments[2] != "-") {
    PQ_ASSIGN_OR_RETURN(const Tokenizer tokenizer, Tokenizer::Load(arguments[0]));
    PQ_ASSIGN_OR_RETURN(data.captions, LoadModelCaptions(*model, tokenizer, arguments[2], 0));
  }
  ComputeOptions compute;
  PQ_ASSIGN_OR_RETURN(compute.dtype, ParseComputeType(arguments[3]));
  PQ_ASSIGN_OR_RETURN(const Sequences sequences, Sequences::Make(*model, data, compute));
  const LayerLinears linears = StoredLinears(*model, compute);
  PQ_ASSIGN_OR_RETURN(const BodyOutputs outputs,
                      RunBody(*model, linears, data, sequences, compute, "forward"));
  PQ_ASSIGN_OR_RETURN(const auto projection, LoadProjection(*model, linears, compute));
  PQ_ASSIGN_OR_RETURN(const auto head, model->LoadHead(Part::kText, compute, projection));
  NamedTensors out;
  for (int64_t n = 0; n < data.count(); ++n) {
    const at::Tensor logits = head->Logits(outputs.hidden[static_cast<size_t>(n)])[0];
    if (!data.IsCaption(n)) {
      out[fmt::format("text.{}.logits", n)] = logits;
      continue;
    }
    const CaptionSequence& caption = data.caption(n);
    const std::string name = fmt::format("caption.{}", n - data.text.count());
    out[name + ".logits"] = logits;
    out[name + ".ids"] = at::tensor(std::vector<int64_t>(caption.ids.begin(), caption.ids.end()));
    out[name + ".grid"] =
        at::tensor(std::vector<int64_t>{caption.image.grid_rows, caption.image.grid_columns});
    out[name + ".patches"] =
        at::tensor(caption.image.values).view({caption.image.patches, caption.image.width});
  }
  if (model->FindPart(Part::kMtp) != nullptr) {
    PQ_RETURN_IF_ERROR(DumpMtp(*model, data, sequences, outputs, compute, out));
  }
  return WriteDump(arguments[4], std::move(out));
}

}  // namespace
}  // namespace prismaquant

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  if (arguments.size() != 5) {
    std::fputs("usage: sequence_dump CHECKPOINT IDS.json IMAGES DTYPE OUT\n", stderr);
    return 2;
  }
  return prismaquant::RunDump("sequence_dump", [&] { return prismaquant::Dump(arguments); });
}

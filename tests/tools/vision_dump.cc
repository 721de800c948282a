// vision_dump patches FOLDER IMAGE OUT.safetensors
// vision_dump tower CHECKPOINT IMAGE DTYPE OUT.safetensors [DIRECTION.safetensors]
// vision_dump positions IDS.json IMAGE_TOKEN GRID_ROWS GRID_COLUMNS MERGE OUT.safetensors
//
// `patches` writes an image's `patches` and its `grid` (rows, columns) by FOLDER's
// preprocessor_config.json. `tower` adds the vision tower's `embeddings` and `output` in float32,
// bfloat16 or float64; with a file that holds `direction` (shaped as the output), also, per Linear,
// its input `NAME.x` and the gradients of <output, direction>: `NAME.g` at its output, `NAME.dx` =
// g W, and `embeddings.grad`. `positions` writes the three rotary `positions` of the ids of one
// sequence.

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "data/image_processor.h"
#include "model/checkpoint_tensors.h"
#include "model/mrope.h"
#include "model/vision.h"
#include "tests/tools/dump_file.h"

namespace prismaquant {
namespace {

using Arguments = std::vector<std::string>;

// Multiplies with a block's own weights and keeps inputs and outputs.
class RecordingLinears : public LinearRunner {
 public:
  struct Record {
    std::string name;
    at::Tensor x, y, weight;
  };

  Status Load(const VisionTower& tower, int block, const ComputeOptions& options) {
    for (const LinearInfo& linear : tower.BlockLinears(block)) {
      for (const char* part : {".weight", ".bias"}) {
        PQ_ASSIGN_OR_RETURN(parameters_[linear.name + part],
                            checkpoint_tensors::Load(tower.checkpoint(), linear.name + part,
                                                     options.dtype, options.device));
      }
    }
    return {};
  }
  at::Tensor Apply(const LinearInfo& linear, const at::Tensor& x) override {
    const at::Tensor& weight = parameters_.at(linear.name + ".weight");
    const at::Tensor y = at::linear(x, weight, parameters_.at(linear.name + ".bias"));
    if (y.requires_grad()) y.retain_grad();
    records_.push_back({linear.name, x.detach(), y, weight});
    return y;
  }
  const std::vector<Record>& records() const { return records_; }

 private:
  NamedTensors parameters_;
  std::vector<Record> records_;
};

Result<NamedTensors> Patches(const std::string& folder, const std::string& file) {
  PQ_ASSIGN_OR_RETURN(const ImageProcessor processor, ImageProcessor::Read(folder));
  PQ_ASSIGN_OR_RETURN(const Image image, LoadImage(file));
  PQ_ASSIGN_OR_RETURN(const ImagePatches patches, processor.Process(image, file));
  return NamedTensors{
      {"patches", at::tensor(patches.values).reshape({patches.patches, patches.width})},
      {"grid", at::tensor({patches.grid_rows, patches.grid_columns})}};
}

Status DumpPatches(const Arguments& arguments) {
  PQ_ASSIGN_OR_RETURN(NamedTensors out, Patches(arguments[0], arguments[1]));
  return WriteDump(arguments[2], std::move(out));
}

void AddGradients(const RecordingLinears& linears, NamedTensors& out) {
  for (const RecordingLinears::Record& record : linears.records()) {
    out[record.name + ".x"] = record.x;
    out[record.name + ".g"] = record.y.grad();
    out[record.name + ".dx"] = at::matmul(record.y.grad(), record.weight);
  }
}

Status DumpTower(const Arguments& arguments) {
  PQ_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(arguments[0]));
  PQ_ASSIGN_OR_RETURN(const auto tower, VisionTower::Open(checkpoint, 0));
  PQ_ASSIGN_OR_RETURN(NamedTensors out, Patches(arguments[0], arguments[1]));
  ComputeOptions options;
  PQ_ASSIGN_OR_RETURN(options.dtype, ParseComputeType(arguments[2]));
  const int64_t rows = out["grid"][0].item<int64_t>(), columns = out["grid"][1].item<int64_t>();
  PQ_ASSIGN_OR_RETURN(const at::Tensor embedded,
                      tower->Embed(out["patches"], rows, columns, options));
  const bool gradients = arguments.size() == 5;
  embedded.set_requires_grad(gradients);
  const SequenceContext context = tower->Context(rows, columns, options);
  RecordingLinears linears;
  at::Tensor hidden = embedded;
  for (int index = 0; index < tower->num_blocks(); ++index) {
    PQ_ASSIGN_OR_RETURN(const auto block, tower->LoadBlock(index, options));
    PQ_RETURN_IF_ERROR(linears.Load(*tower, index, options));
    hidden = RunLayer(*block, context, hidden, linears);
  }
  if (gradients) {
    PQ_ASSIGN_OR_RETURN(const at::Tensor direction, ReadDirection(arguments[4]));
    (hidden * direction.to(hidden.scalar_type())).sum().backward();
    out["embeddings.grad"] = embedded.grad();
    AddGradients(linears, out);
  }
  out["embeddings"] = embedded;
  out["output"] = hidden;
  return WriteDump(arguments[3], std::move(out));
}

Status DumpPositions(const Arguments& arguments) {
  PQ_ASSIGN_OR_RETURN(const std::string text, ReadFile(arguments[0]));
  PQ_ASSIGN_OR_RETURN(const Json json, ParseJson(text, arguments[0]));
  const at::Tensor ids = at::tensor(json.get<std::vector<int64_t>>());
  std::vector<int64_t> numbers;
  for (size_t i = 1; i < 5; ++i) numbers.push_back(std::strtoll(arguments[i].c_str(), nullptr, 10));
  NamedTensors out;
  PQ_ASSIGN_OR_RETURN(out["positions"],
                      MropePositions(ids, numbers[0], numbers[1], numbers[2], numbers[3]));
  return WriteDump(arguments[5], std::move(out));
}

int Main(const std::string& what, const Arguments& arguments) {
  const size_t count = arguments.size();
  if (what == "patches" && count == 3) {
    return RunDump("vision_dump", [&] { return DumpPatches(arguments); });
  }
  if (what == "tower" && (count == 4 || count == 5)) {
    return RunDump("vision_dump", [&] { return DumpTower(arguments); });
  }
  if (what == "positions" && count == 6) {
    return RunDump("vision_dump", [&] { return DumpPositions(arguments); });
  }
  std::fputs("usage: vision_dump patches|tower|positions ARGUMENTS: see vision_dump.cc\n", stderr);
  return 2;
}

}  // namespace
}  // namespace prismaquant

int main(int argc, char** argv) {
  if (argc < 2) return prismaquant::Main("", {});
  return prismaquant::Main(argv[1], {argv + 2, argv + argc});
}

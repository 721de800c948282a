// make_shape OUT --shape 27b --layers 8 --example CHECKPOINT
//
// Writes a checkpoint with the tensor names, shapes and dtypes of a published model at a chosen
// number of layers, and random weights, or none: for measuring time and memory, never quality.
// Tokenizer and processor are the example's, whose token ids are the first of the published
// vocabulary.

#include <fmt/format.h>
#include <torch/torch.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <string>
#include <vector>

#include "bench/shape/model_shape.h"
#include "bench/shape/sparse_file_system.h"
#include "formats/tensor_bytes.h"
#include "formats/torch_guard.h"
#include "io/checkpoint.h"
#include "io/file_system.h"

namespace prismaquant {
namespace {

// Standard normal values that all tensors are cut from, each from another place.
constexpr int64_t kNoise = int64_t{1} << 25;
constexpr int64_t kStride = 7919 * 64;

struct Flags {
  std::string out, shape = "27b", example;
  int64_t layers = 8;
  uint64_t seed = 0;
  bool sparse = false, overwrite = false;
};

// `noise` times the standard deviation and plus the mean that `fill` asks for.
at::Tensor Filled(const ShapedTensor& tensor, const at::Tensor& noise) {
  int64_t in = 1;
  for (size_t i = 1; i < tensor.spec.shape.size(); ++i) in *= tensor.spec.shape[i];
  // A packed tensor of experts is [experts, out, in].
  if (tensor.spec.shape.size() == 3 && tensor.spec.shape[1] > 1) in = tensor.spec.shape[2];
  const double scale = 1 / std::sqrt(static_cast<double>(in));
  switch (tensor.fill) {
    case Fill::kProjection:
      return noise * scale;
    case Fill::kResidual:
      return noise * (scale / 10);
    case Fill::kSmall:
      return noise * 0.02;
    case Fill::kOnes:
      return noise * 0.02 + 1;
  }
  return {};
}

CheckpointWriter::Source SourceOf(const ShapedTensor& tensor, const at::Tensor& noise,
                                  int64_t number) {
  return [=](const CheckpointWriter::Sink& sink) -> Status {
    int64_t left = 1;
    for (const int64_t size : tensor.spec.shape) left *= size;
    int64_t begin = number * kStride % (kNoise / 2);
    while (left > 0) {
      const int64_t count = std::min(left, kNoise - begin);
      PQ_RETURN_IF_ERROR(
          sink(TensorBytes(Filled(tensor, noise.narrow(0, begin, count)).contiguous())));
      left -= count;
      begin = 0;
    }
    return {};
  };
}

// Holes in the place of a tensor.
CheckpointWriter::Source HoleOf(const ShapedTensor& tensor) {
  return [bytes = tensor.spec.bytes()](const CheckpointWriter::Sink& sink) -> Status {
    for (int64_t left = bytes; left > 0;) {
      const std::span<const std::byte> zeros = SparseFileSystem::Zeros(left);
      PQ_RETURN_IF_ERROR(sink(zeros));
      left -= static_cast<int64_t>(zeros.size());
    }
    return {};
  };
}

Status Run(const Flags& flags) {
  const std::vector<ModelShape>& shapes = PublishedShapes();
  const ModelShape& shape =
      *std::find_if(shapes.begin(), shapes.end(),
                    [&](const ModelShape& candidate) { return candidate.name == flags.shape; });
  PQ_ASSIGN_OR_RETURN(const Checkpoint example, Checkpoint::Open(flags.example));
  const std::string type = shape.experts > 0 ? "qwen3_5_moe" : "qwen3_5";
  if (example.config().value("model_type", "") != type) {
    return Status::InvalidInput(fmt::format("{}: model_type is {}, expected {}", flags.example,
                                            example.config().value("model_type", "none"), type));
  }
  PQ_ASSIGN_OR_RETURN(auto files, PassthroughFiles(flags.example));
  files["config.json"] = ConfigOf(shape, flags.layers, example.config()).dump(2) + "\n";
  torch::manual_seed(flags.seed);
  const at::Tensor noise = at::randn({kNoise}).to(at::kBFloat16);
  std::vector<CheckpointWriter::Tensor> tensors;
  for (const ShapedTensor& tensor : TensorsOf(shape, flags.layers)) {
    const auto number = static_cast<int64_t>(tensors.size());
    tensors.push_back(
        {tensor.spec, flags.sparse ? HoleOf(tensor) : SourceOf(tensor, noise, number)});
  }
  SparseFileSystem sparse;
  return CheckpointWriter::Write(flags.sparse ? sparse : FileSystem::Default(), flags.out,
                                 {.overwrite = flags.overwrite}, tensors, files);
}

void Register(CLI::App& app, Flags& flags) {
  std::vector<std::string> names;
  for (const ModelShape& shape : PublishedShapes()) names.push_back(shape.name);
  app.add_option("OUT", flags.out, "Folder to write")->required();
  app.add_option("--shape", flags.shape, "Model")
      ->check(CLI::IsMember(names))
      ->capture_default_str();
  app.add_option("--layers", flags.layers, "Layers of the text body")
      ->check(CLI::Range(1, 1 << 10))
      ->capture_default_str();
  app.add_option("--example", flags.example,
                 "Checkpoint of the same family that config and tokenizer come from")
      ->required();
  app.add_option("--seed", flags.seed, "Draws the weights")->capture_default_str();
  app.add_flag("--sparse", flags.sparse,
               "Holes for weights, which take no room: enough for --dry-run and inspect");
  app.add_flag("--overwrite", flags.overwrite, "Replace OUT if it exists");
}

}  // namespace
}  // namespace prismaquant

int main(int argc, char** argv) {
  CLI::App app("Writes a checkpoint of a published model's shape with random weights.",
               "make_shape");
  prismaquant::Flags flags;
  prismaquant::Register(app, flags);
  CLI11_PARSE(app, argc, argv);
  const prismaquant::Status status =
      prismaquant::GuardTorch("make_shape", [&] { return prismaquant::Run(flags); });
  if (!status.ok()) fmt::print(stderr, "make_shape: {}\n", status.message());
  return status.exit_code();
}

#include "model/vision.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <string_view>
#include <utility>

#include "model/checkpoint_tensors.h"
#include "model/vision_blocks.h"

namespace prismaquant {
namespace {

constexpr char kPatchBias[] = "model.visual.patch_embed.proj.bias";
constexpr char kPositionTable[] = "model.visual.pos_embed.weight";

std::string ShapeText(const std::vector<int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

struct BlockLinear {
  std::string_view name;
  int64_t out = 0, in = 0;
};

// One Linear per stage.
std::vector<BlockLinear> BlockShapes(const VisionConfig& config) {
  const int64_t h = config.hidden_size, m = config.intermediate_size;
  return {{"attn.qkv", 3 * h, h},
          {"attn.proj", h, h},
          {"mlp.linear_fc1", m, h},
          {"mlp.linear_fc2", h, m}};
}

std::vector<BlockLinear> MergerShapes(const VisionConfig& config) {
  const int64_t m = config.merged_size();
  return {{"linear_fc1", m, m}, {"linear_fc2", config.out_hidden_size, m}};
}

}  // namespace

Result<std::unique_ptr<VisionTower>> VisionTower::Open(const Checkpoint& checkpoint,
                                                       int first_layer) {
  PQ_ASSIGN_OR_RETURN(
      const VisionConfig config,
      VisionConfig::Parse(checkpoint.config(), (checkpoint.folder() / "config.json").string()));
  std::unique_ptr<VisionTower> tower(new VisionTower(checkpoint, config, first_layer));
  PQ_RETURN_IF_ERROR(tower->CheckTensors());
  for (int index = 0; index < tower->num_blocks(); ++index) {
    for (const std::vector<LinearInfo>& stage : tower->BlockStages(index)) {
      for (const LinearInfo& linear : stage) {
        PQ_RETURN_IF_ERROR(tower->CheckLinear(linear));
        tower->linears_.push_back(linear);
      }
    }
  }
  return tower;
}

std::vector<LinearInfo> VisionTower::BlockLinears(int index) const {
  std::vector<LinearInfo> linears;
  for (const std::vector<LinearInfo>& stage : BlockStages(index)) {
    linears.insert(linears.end(), stage.begin(), stage.end());
  }
  return linears;
}

std::string VisionTower::BlockPrefix(int index) const {
  return index == config_.depth ? "model.visual.merger."
                                : fmt::format("model.visual.blocks.{}.", index);
}

std::vector<std::vector<LinearInfo>> VisionTower::BlockStages(int index) const {
  std::vector<std::vector<LinearInfo>> stages;
  const bool merger = index == config_.depth;
  for (const BlockLinear& shape : merger ? MergerShapes(config_) : BlockShapes(config_)) {
    LinearInfo info;
    info.name = fmt::format("{}{}", BlockPrefix(index), shape.name);
    info.unit = info.name;
    info.scale_group = info.name;
    info.input_group = info.name;
    info.part = Part::kVision;
    info.out = shape.out;
    info.in = shape.in;
    info.layer = first_layer_ + index;
    info.stage = static_cast<int>(stages.size());
    info.has_bias = true;
    info.dtype = checkpoint_tensors::SourceType(*checkpoint_, info.name + ".weight", kPatchWeight);
    stages.push_back({std::move(info)});
  }
  stages.back().front().ends_layer = true;
  return stages;
}

Status VisionTower::CheckTensors() const {
  const int64_t h = config_.hidden_size, side = config_.patch_size;
  PQ_RETURN_IF_ERROR(checkpoint_tensors::RequireShape(
      *checkpoint_, kPatchWeight,
      {h, config_.in_channels, config_.temporal_patch_size, side, side}));
  PQ_RETURN_IF_ERROR(checkpoint_tensors::RequireShape(*checkpoint_, kPatchBias, {h}));
  PQ_RETURN_IF_ERROR(checkpoint_tensors::RequireShape(
      *checkpoint_, kPositionTable, {config_.table_side * config_.table_side, h}));
  for (int index = 0; index < num_blocks(); ++index) {
    const bool merger = index == config_.depth;
    for (const char* norm : {"norm1", "norm2", "norm"}) {
      if (merger != (norm == std::string_view("norm"))) continue;
      for (const char* part : {"weight", "bias"}) {
        PQ_RETURN_IF_ERROR(checkpoint_tensors::RequireShape(
            *checkpoint_, fmt::format("{}{}.{}", BlockPrefix(index), norm, part), {h}));
      }
    }
  }
  return {};
}

Status VisionTower::CheckLinear(const LinearInfo& linear) const {
  PQ_RETURN_IF_ERROR(
      checkpoint_tensors::RequireShape(*checkpoint_, linear.name + ".bias", {linear.out}));
  return checkpoint_tensors::RequireWeight(*checkpoint_, linear.name, {linear.out, linear.in});
}

Result<at::Tensor> VisionTower::Parameter(const std::string& name,
                                          const ComputeOptions& options) const {
  return LoadSmoothed(*checkpoint_, smoothing_.get(), name, options.dtype, options.device);
}

std::vector<SmoothingSite> VisionTower::SmoothingSites(int index) const {
  const std::string prefix = BlockPrefix(index);
  const int64_t h = config_.hidden_size;
  const auto norm_site = [&](const std::string& norm, const std::string& reader) {
    return SmoothingSite{.norm = {prefix + norm + ".weight", prefix + norm + ".bias"},
                         .channels = h,
                         .readers = {prefix + reader}};
  };
  if (index == config_.depth) {
    SmoothingSite merged = norm_site("norm", "linear_fc1");
    merged.channel_of = at::arange(h, at::kLong).repeat(config_.merged_size() / h);
    return {std::move(merged)};
  }
  // The rows of the values are the last third of attn.qkv's.
  SmoothingSite values{.producer = prefix + "attn.qkv",
                       .rows = 3 * h,
                       .row = 2 * h,
                       .channels = h,
                       .readers = {prefix + "attn.proj"}};
  return {norm_site("norm1", "attn.qkv"), std::move(values), norm_site("norm2", "mlp.linear_fc1")};
}

Result<at::Tensor> VisionTower::Embed(const at::Tensor& patches, int64_t grid_rows,
                                      int64_t grid_columns, const ComputeOptions& options) const {
  const int64_t merge = config_.merge_size;
  if (grid_rows < merge || grid_columns < merge || grid_rows % merge != 0 ||
      grid_columns % merge != 0) {
    return Status::InvalidInput(
        fmt::format("{}: image of {} x {} patches, expected multiples of {}",
                    checkpoint_->folder().string(), grid_rows, grid_columns, merge));
  }
  const std::vector<int64_t> expected = {grid_rows * grid_columns, config_.patch_width()};
  if (patches.sizes() != at::IntArrayRef(expected)) {
    return Status::InvalidInput(fmt::format(
        "{}: patches have shape {}, expected {} by config.json and an image of {} x {} patches",
        checkpoint_->folder().string(), ShapeText(patches.sizes().vec()), ShapeText(expected),
        grid_rows, grid_columns));
  }
  PQ_ASSIGN_OR_RETURN(const at::Tensor weight, Parameter(kPatchWeight, options));
  PQ_ASSIGN_OR_RETURN(const at::Tensor bias, Parameter(kPatchBias, options));
  PQ_ASSIGN_OR_RETURN(const at::Tensor table, Parameter(kPositionTable, options));
  const at::Tensor embedded =
      at::linear(patches.to(options.device, options.dtype), weight.flatten(1), bias);
  const at::Tensor positions =
      InterpolatePositions(table, config_.table_side, grid_rows, grid_columns, merge);
  return (embedded + positions.to(options.dtype)).unsqueeze(0);
}

SequenceContext VisionTower::Context(int64_t grid_rows, int64_t grid_columns,
                                     const ComputeOptions& options) const {
  return VisionRotaryContext(config_, grid_rows, grid_columns, options);
}

Result<std::unique_ptr<DecoderLayer>> VisionTower::LoadBlock(int index,
                                                             const ComputeOptions& options) const {
  const auto load = [&](const char* norm) -> Result<LayerNormParameters> {
    const std::string name = BlockPrefix(index) + norm;
    LayerNormParameters parameters;
    PQ_ASSIGN_OR_RETURN(parameters.weight, Parameter(name + ".weight", options));
    PQ_ASSIGN_OR_RETURN(parameters.bias, Parameter(name + ".bias", options));
    return parameters;
  };
  if (index == config_.depth) {
    PQ_ASSIGN_OR_RETURN(LayerNormParameters norm, load("norm"));
    return MakeVisionMerger(config_, BlockStages(index), std::move(norm));
  }
  PQ_ASSIGN_OR_RETURN(LayerNormParameters norm1, load("norm1"));
  PQ_ASSIGN_OR_RETURN(LayerNormParameters norm2, load("norm2"));
  return MakeVisionBlock(config_, BlockStages(index), std::move(norm1), std::move(norm2));
}

}  // namespace prismaquant

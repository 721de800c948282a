#include "model/vision_blocks.h"

#include <torch/torch.h>

#include <algorithm>
#include <utility>

namespace prismaquant {
namespace {

constexpr double kNormEps = 1e-6;

at::Tensor LayerNorm(const at::Tensor& x, const LayerNormParameters& norm) {
  return at::layer_norm(x, {x.size(-1)}, norm.weight, norm.bias, kNormEps);
}

// Turns whole heads [1, heads, P, dim], halves paired, in the precision of the angles.
at::Tensor Rotate(const at::Tensor& x, const SequenceContext& context) {
  const at::Tensor wide = x.to(context.cos.scalar_type());
  const std::vector<at::Tensor> halves = wide.chunk(2, -1);
  const at::Tensor turned = at::cat({-halves[1], halves[0]}, -1);
  return (wide * context.cos + turned * context.sin).to(x.scalar_type());
}

// Softmax attention of all patches to all patches: fused query, key and value [1, P, 3 * heads *
// dim] -> [1, P, heads * dim].
at::Tensor FullAttention(const at::Tensor& qkv, int64_t heads, const SequenceContext& context) {
  const at::Tensor parts = qkv.unflatten(-1, {3, heads, -1}).permute({2, 0, 3, 1, 4});
  const at::Tensor y = at::scaled_dot_product_attention(Rotate(parts[0], context),
                                                        Rotate(parts[1], context), parts[2]);
  return y.transpose(1, 2).flatten(-2);
}

class VisionBlock : public DecoderLayer {
 public:
  VisionBlock(int64_t heads, std::vector<std::vector<LinearInfo>> stages, LayerNormParameters norm1,
              LayerNormParameters norm2)
      : heads_(heads), norm1_(std::move(norm1)), norm2_(std::move(norm2)) {
    stages_ = std::move(stages);
  }

  std::vector<at::Tensor> StageInputs(int s, const SequenceContext&,
                                      LayerState& state) const override {
    if (s == 0) return {LayerNorm(state.hidden, norm1_)};
    if (s == 2) return {LayerNorm(state.hidden, norm2_)};
    return {state.held.front()};
  }

  void StageOutputs(int s, const SequenceContext& context, std::vector<at::Tensor> outputs,
                    LayerState& state) const override {
    if (s == 0) {
      state.held = {FullAttention(outputs[0], heads_, context)};
    } else if (s == 2) {
      state.held = {at::gelu(outputs[0], "tanh")};
    } else {
      state.hidden = state.hidden + outputs[0];
      state.held.clear();
    }
  }

 private:
  int64_t heads_;
  LayerNormParameters norm1_, norm2_;
};

class VisionMerger : public DecoderLayer {
 public:
  VisionMerger(int64_t merged_size, std::vector<std::vector<LinearInfo>> stages,
               LayerNormParameters norm)
      : merged_size_(merged_size), norm_(std::move(norm)) {
    stages_ = std::move(stages);
  }

  std::vector<at::Tensor> StageInputs(int s, const SequenceContext&,
                                      LayerState& state) const override {
    if (s == 1) return {state.held.front()};
    return {LayerNorm(state.hidden, norm_).reshape({state.hidden.size(0), -1, merged_size_})};
  }

  void StageOutputs(int s, const SequenceContext&, std::vector<at::Tensor> outputs,
                    LayerState& state) const override {
    if (s == 0) {
      state.held = {at::gelu(outputs[0])};
    } else {
      state.hidden = outputs[0];
      state.held.clear();
    }
  }

 private:
  int64_t merged_size_;
  LayerNormParameters norm_;
};

// Along one axis of the table: the two neighbours int64 [P, 2] and their weights float32 [P, 2].
struct Neighbours {
  at::Tensor index, weight;
};

Neighbours Interpolate(const at::Tensor& position, int64_t size, int64_t side) {
  const auto steps = static_cast<double>(std::max<int64_t>(size - 1, 1));
  const at::Tensor place = position.to(at::kFloat) * static_cast<double>(side - 1) / steps;
  const at::Tensor lower = at::floor(place), offsets = at::arange(2, at::kFloat);
  const at::Tensor nearest = lower.unsqueeze(-1) + offsets;
  const at::Tensor distance = ((place - lower).unsqueeze(-1) - offsets).abs();
  return {.index = nearest.to(at::kLong).clamp(0, side - 1), .weight = (1 - distance).clamp_min(0)};
}

}  // namespace

std::unique_ptr<DecoderLayer> MakeVisionBlock(const VisionConfig& config,
                                              std::vector<std::vector<LinearInfo>> stages,
                                              LayerNormParameters norm1,
                                              LayerNormParameters norm2) {
  return std::make_unique<VisionBlock>(config.num_heads, std::move(stages), std::move(norm1),
                                       std::move(norm2));
}

std::unique_ptr<DecoderLayer> MakeVisionMerger(const VisionConfig& config,
                                               std::vector<std::vector<LinearInfo>> stages,
                                               LayerNormParameters norm) {
  return std::make_unique<VisionMerger>(config.merged_size(), std::move(stages), std::move(norm));
}

PatchPositions MergeOrder(int64_t grid_rows, int64_t grid_columns, int64_t merge_size) {
  const at::Tensor raster =
      at::arange(grid_rows * grid_columns, at::kLong)
          .reshape({grid_rows / merge_size, merge_size, grid_columns / merge_size, merge_size});
  const at::Tensor index = raster.transpose(1, 2).flatten();
  const at::Tensor row = at::div(index, grid_columns, "floor");
  return {.row = row, .column = index - row * grid_columns};
}

at::Tensor InterpolatePositions(const at::Tensor& table, int64_t table_side, int64_t grid_rows,
                                int64_t grid_columns, int64_t merge_size) {
  const PatchPositions places = MergeOrder(grid_rows, grid_columns, merge_size);
  const Neighbours row = Interpolate(places.row, grid_rows, table_side);
  const Neighbours column = Interpolate(places.column, grid_columns, table_side);
  const at::Tensor index =
      (row.index.unsqueeze(2) * table_side + column.index.unsqueeze(1)).flatten(1);
  const at::Tensor weight = (row.weight.unsqueeze(2) * column.weight.unsqueeze(1)).flatten(1);
  const at::Tensor rows = at::embedding(table, index.to(table.device()));
  return (rows * weight.to(table.device()).unsqueeze(-1)).sum(1);
}

SequenceContext VisionRotaryContext(const VisionConfig& config, int64_t grid_rows,
                                    int64_t grid_columns, const ComputeOptions& options) {
  const PatchPositions places = MergeOrder(grid_rows, grid_columns, config.merge_size);
  const int64_t half = config.head_dim() / 2;
  const at::Tensor exponents = at::arange(0, half, 2, at::kFloat) / static_cast<double>(half);
  const at::Tensor frequencies = 1.0 / at::pow(config.rope_theta, exponents);
  const at::Tensor angles = at::cat({at::outer(places.row.to(at::kFloat), frequencies),
                                     at::outer(places.column.to(at::kFloat), frequencies)},
                                    -1);
  const at::Tensor whole = at::cat({angles, angles}, -1).to(options.device);
  const at::ScalarType wide = options.dtype == at::kDouble ? at::kDouble : at::kFloat;
  return {.cos = whole.cos().to(wide), .sin = whole.sin().to(wide)};
}

}  // namespace prismaquant

#ifndef PRISMAQUANT_MODEL_VISION_BLOCKS_H_
#define PRISMAQUANT_MODEL_VISION_BLOCKS_H_

// What the vision tower computes beside its Linears, without any checkpoint: the blocks between
// their Linears, and the positions of patches. Pure and differentiable.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "model/model.h"
#include "model/vision_config.h"

namespace prismaquant {

struct LayerNormParameters {
  at::Tensor weight, bias;
};

std::unique_ptr<DecoderLayer> MakeVisionBlock(const VisionConfig& config,
                                              std::vector<std::vector<LinearInfo>> stages,
                                              LayerNormParameters norm1, LayerNormParameters norm2);
std::unique_ptr<DecoderLayer> MakeVisionMerger(const VisionConfig& config,
                                               std::vector<std::vector<LinearInfo>> stages,
                                               LayerNormParameters norm);

// Row and column in the grid of each patch, int64 [P], patches ordered block by block.
struct PatchPositions {
  at::Tensor row, column;
};
PatchPositions MergeOrder(int64_t grid_rows, int64_t grid_columns, int64_t merge_size);

// The table [table_side^2, hidden] of a square grid, interpolated bilinearly with its corners on
// the corners of the image's grid: [P, hidden], float32 or wider.
at::Tensor InterpolatePositions(const at::Tensor& table, int64_t table_side, int64_t grid_rows,
                                int64_t grid_columns, int64_t merge_size);

// See VisionTower::Context.
SequenceContext VisionRotaryContext(const VisionConfig& config, int64_t grid_rows,
                                    int64_t grid_columns, const ComputeOptions& options);

}  // namespace prismaquant

#endif  // PRISMAQUANT_MODEL_VISION_BLOCKS_H_

#ifndef PRISMAQUANT_MODEL_VISION_H_
#define PRISMAQUANT_MODEL_VISION_H_

// VisionTower: the tower of Qwen3.5 that turns the patches of one image into token embeddings, run
// one block at a time like the layers of a Model. Blocks 0 to depth - 1 are transformer blocks with
// full attention over all patches; block `depth` is the merger, which makes one token of
// merge_size^2 consecutive patches. The patch embedding, the position table and the norms are not
// Linears and are never quantized.
//
// A VisionTower holds an inventory and no weights; LoadBlock reads a block's non-Linear parameters,
// which are freed with the block. All of it is differentiable by libtorch's autograd. In bfloat16
// it computes in float32 where transformers does (norms, rotation, position table, softmax).
//
// Thread compatibility: const methods may run concurrently.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "io/checkpoint.h"
#include "model/model.h"
#include "model/vision_config.h"

namespace prismaquant {

class VisionTower {
 public:
  // Every tower has this tensor.
  static constexpr char kPatchWeight[] = "model.visual.patch_embed.proj.weight";

  // `checkpoint` must outlive the tower. The Linears' layers count from `first_layer`. Fails with
  // kInvalidInput, naming folder and key or tensor, if the configuration is not supported, or a
  // tensor is missing or has another shape or dtype than expected. Of a quantized Linear only the
  // bias is checked.
  static Result<std::unique_ptr<VisionTower>> Open(const Checkpoint& checkpoint, int first_layer);

  const VisionConfig& config() const { return config_; }
  const Checkpoint& checkpoint() const { return *checkpoint_; }
  // Every Linear in block and stage order.
  const std::vector<LinearInfo>& linears() const { return linears_; }
  std::vector<LinearInfo> BlockLinears(int index) const;
  int num_blocks() const { return static_cast<int>(config_.depth) + 1; }

  // Patches [P, patch_width] of an image of P = grid_rows * grid_columns patches, ordered as
  // ImagePatches says, -> [1, P, hidden_size]. kInvalidInput if the shapes do not fit together.
  Result<at::Tensor> Embed(const at::Tensor& patches, int64_t grid_rows, int64_t grid_columns,
                           const ComputeOptions& options) const;
  // cos and sin [P, head_dim] in float32, or in float64 to compute in float64: rows turn the first
  // half of a head's frequencies, columns the second.
  SequenceContext Context(int64_t grid_rows, int64_t grid_columns,
                          const ComputeOptions& options) const;
  // Block `index` of num_blocks(), with the stages {attn.qkv}, {attn.proj}, {mlp.linear_fc1},
  // {mlp.linear_fc2}; the merger has {linear_fc1}, {linear_fc2} and leaves hidden as
  // [1, P / merge_size^2, out_hidden_size].
  Result<std::unique_ptr<DecoderLayer>> LoadBlock(int index, const ComputeOptions& options) const;
  // Of a block; as Model's.
  std::vector<SmoothingSite> SmoothingSites(int index) const;
  void SetSmoothing(std::shared_ptr<const Smoothing> smoothing) {
    smoothing_ = std::move(smoothing);
  }
  // "model.visual.blocks.0."
  std::string BlockPrefix(int index) const;

 private:
  VisionTower(const Checkpoint& checkpoint, const VisionConfig& config, int first_layer)
      : checkpoint_(&checkpoint), config_(config), first_layer_(first_layer) {}

  std::vector<std::vector<LinearInfo>> BlockStages(int index) const;
  Status CheckTensors() const;
  Status CheckLinear(const LinearInfo& linear) const;
  Result<at::Tensor> Parameter(const std::string& name, const ComputeOptions& options) const;

  const Checkpoint* checkpoint_;
  VisionConfig config_;
  int first_layer_;
  std::vector<LinearInfo> linears_;
  std::shared_ptr<const Smoothing> smoothing_;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_MODEL_VISION_H_

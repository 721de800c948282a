#ifndef PRISMAQUANT_MODEL_VISION_CONFIG_H_
#define PRISMAQUANT_MODEL_VISION_CONFIG_H_

// VisionConfig: what config.json's "vision_config" says about the vision tower of Qwen3.5, checked.
// A plain value.

#include <cstdint>
#include <string>

#include "base/json.h"
#include "base/status.h"

namespace prismaquant {

struct VisionConfig {
  int64_t depth = 0, hidden_size = 0, intermediate_size = 0, num_heads = 0;
  int64_t in_channels = 3, patch_size = 0, temporal_patch_size = 0;
  int64_t merge_size = 0;       // spatial_merge_size: merge_size^2 patches make one token
  int64_t out_hidden_size = 0;  // the text body's hidden_size
  int64_t table_side = 0;       // num_position_embeddings = table_side^2
  double rope_theta = 10000;

  int64_t head_dim() const { return hidden_size / num_heads; }
  int64_t patch_width() const {
    return in_channels * temporal_patch_size * patch_size * patch_size;
  }
  int64_t merged_size() const { return hidden_size * merge_size * merge_size; }

  // `config` is the whole config.json; `origin` names it in errors, which name the key too.
  static Result<VisionConfig> Parse(const Json& config, const std::string& origin);
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_MODEL_VISION_CONFIG_H_

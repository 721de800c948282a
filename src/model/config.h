#ifndef PRISMAQUANT_MODEL_CONFIG_H_
#define PRISMAQUANT_MODEL_CONFIG_H_

// ModelConfig: what config.json says about the text body, checked and in one spelling for all
// families. Old and new key spellings (rope_theta / rope_scaling and rope_parameters) are read
// alike. A plain value.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/json.h"
#include "base/status.h"

namespace prismaquant {

// Llama 3.1's frequency scaling (qualitatively: long wavelengths are divided by `factor`).
struct Llama3RopeScaling {
  double factor = 1, low_freq_factor = 1, high_freq_factor = 4;
  int64_t original_max_position = 8192;
};

enum class LayerKind { kFullAttention, kSlidingAttention, kLinearAttention };

// Mixture of experts, in every layer.
struct MixtureConfig {
  int64_t experts = 0, experts_per_token = 0;
  int64_t expert_size = 0, shared_size = 0;  // intermediate sizes; no shared expert: 0
  bool normalize = true;  // the weights of a token's experts are scaled to sum to one
};

struct ModelConfig {
  std::string architecture;  // config.json "architectures"[0]
  std::string family;        // the profile's: "llama", "qwen3", "qwen3_5"
  std::string body_prefix;   // of the body's tensors; Parse sets the first of the profile's
  int64_t vocab_size = 0, hidden_size = 0, num_layers = 0, intermediate_size = 0;
  int64_t num_heads = 0, num_kv_heads = 0, head_dim = 0;
  double rms_norm_eps = 1e-6;
  bool attention_bias = false;  // the key, which most families take as: on q, k, v, o
  bool mlp_bias = false;
  bool tied_head = false;
  double rope_theta = 10000;
  int64_t rotary_dim = 0;  // <= head_dim
  double rope_factor = 1;  // rope type linear: frequencies are divided by it
  std::optional<Llama3RopeScaling> rope_scaling;
  std::vector<LayerKind> layers;
  int64_t sliding_window = 0;  // tokens that a query of a sliding layer sees, itself included
  // Gemma 3
  double local_rope_theta = 0;       // of sliding layers, unscaled; 0: they turn as the others do
  double query_pre_attn_scalar = 0;  // scores are divided by its square root; 0: head_dim
  std::optional<MixtureConfig> mixture;
  int64_t mtp_layers = 0;  // of the MTP head
  // Frequencies that turn by a token's row and by its column in its image, every third one from
  // the second and third on; 0: all turn by time
  int64_t row_frequencies = 0, column_frequencies = 0;
  int64_t image_token = -1, vision_start_token = -1, vision_end_token = -1;
  // Gated DeltaNet
  int64_t linear_key_heads = 0, linear_value_heads = 0, linear_key_dim = 0, linear_value_dim = 0,
          linear_conv_kernel = 0;

  // `origin` names the file in errors. An unknown architecture is kInvalidInput and lists the known
  // ones.
  static Result<ModelConfig> Parse(const Json& config, const std::string& origin);
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_MODEL_CONFIG_H_

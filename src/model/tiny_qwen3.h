#ifndef PRISMAQUANT_MODEL_TINY_QWEN3_H_
#define PRISMAQUANT_MODEL_TINY_QWEN3_H_

// For tests, what small Qwen3 checkpoints have in common: 48 tokens, hidden size 64, two heads of
// 32 channels, one of keys and values, tied embeddings.

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/json.h"
#include "data/calibration.h"

namespace prismaquant {

using AddTensor = std::function<void(const std::string& name, const std::vector<int64_t>& shape)>;

// Norms and attention of one layer, whose tensors' names begin with `prefix`.
inline void AddTinyAttention(const std::string& prefix, const AddTensor& add) {
  add(prefix + "input_layernorm.weight", {64});
  add(prefix + "post_attention_layernorm.weight", {64});
  add(prefix + "self_attn.q_proj.weight", {64, 64});
  add(prefix + "self_attn.k_proj.weight", {32, 64});
  add(prefix + "self_attn.v_proj.weight", {32, 64});
  add(prefix + "self_attn.o_proj.weight", {64, 64});
  add(prefix + "self_attn.q_norm.weight", {32});
  add(prefix + "self_attn.k_norm.weight", {32});
}

// With `further` entries: architecture, layers, feed-forward sizes.
inline Json TinyQwen3Config(const Json& further) {
  Json config = {{"vocab_size", 48},         {"hidden_size", 64}, {"num_attention_heads", 2},
                 {"num_key_value_heads", 1}, {"head_dim", 32},    {"tie_word_embeddings", true}};
  config.update(further);
  return config;
}

inline TokenWindows TinyWindows(int64_t count, int64_t tokens) {
  TokenWindows windows;
  for (int64_t n = 0; n < count; ++n) {
    std::vector<int32_t>& window = windows.windows.emplace_back();
    for (int64_t t = 0; t < tokens; ++t)
      window.push_back(static_cast<int32_t>((n * 31 + t * t * 7 + n * t) % 48));
  }
  return windows;
}

}  // namespace prismaquant

#endif  // PRISMAQUANT_MODEL_TINY_QWEN3_H_

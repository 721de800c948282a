#include "model/cache_memory.h"

#include <algorithm>

namespace prismaquant {
namespace {

// Of keys, values and convolution states: vLLM serves a float32 source in 16 bits too.
constexpr int64_t kValueBytes = 2;
constexpr int64_t kRecurrenceBytes = 4;
// vLLM's max_num_batched_tokens of a server, on cards below 70 GiB, and the steps that it schedules
// ahead of their results.
constexpr int64_t kStepTokens = 2048, kStepsInFlight = 2;

int64_t Product(int64_t a, int64_t b) {
  int64_t product = 0;
  return __builtin_mul_overflow(a, b, &product) ? kMostCacheBytes
                                                : std::min(product, kMostCacheBytes);
}

int64_t Sum(int64_t a, int64_t b) { return std::min(a + b, kMostCacheBytes); }

int64_t SlidingTokens(const ModelConfig& config, const ServedLoad& load) {
  const int64_t seen = std::min(config.sliding_window - 1, load.context);
  return std::min(Product(load.sequences, load.context),
                  Sum(Product(load.sequences, seen), kStepsInFlight * kStepTokens));
}

int64_t DeltaNetStateBytes(const ModelConfig& config, int64_t drafts) {
  const int64_t key_width = Product(config.linear_key_heads, config.linear_key_dim);
  const int64_t value_width = Product(config.linear_value_heads, config.linear_value_dim);
  const int64_t channels = Sum(Sum(key_width, key_width), value_width);
  const int64_t taps = config.linear_conv_kernel - 1 + drafts;
  return Sum(Product(Product(taps, channels), kValueBytes),
             Product(Product(value_width, config.linear_key_dim), kRecurrenceBytes));
}

}  // namespace

CacheMemory CacheMemoryOf(const ModelConfig& config, const ServedLoad& load) {
  const auto layers = [&](LayerKind kind) -> int64_t {
    return std::count(config.layers.begin(), config.layers.end(), kind);
  };
  const int64_t mtp_layers = load.drafts > 0 ? config.mtp_layers : 0;
  const int64_t full_layers = layers(LayerKind::kFullAttention) + mtp_layers;
  const int64_t sliding_layers = layers(LayerKind::kSlidingAttention);
  const int64_t layer_tokens =
      Sum(Product(full_layers, Product(load.sequences, load.context)),
          sliding_layers == 0 ? 0 : Product(sliding_layers, SlidingTokens(config, load)));
  const int64_t token_bytes =
      Product(Product(config.num_kv_heads, config.head_dim), 2 * kValueBytes);
  const int64_t states =
      Product(layers(LayerKind::kLinearAttention), Product(load.sequences, 2 + load.drafts));
  return {.kv_cache_bytes = Product(layer_tokens, token_bytes),
          .state_bytes = Product(states, DeltaNetStateBytes(config, load.drafts))};
}

}  // namespace prismaquant

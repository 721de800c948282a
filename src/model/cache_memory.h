#ifndef PRISMAQUANT_MODEL_CACHE_MEMORY_H_
#define PRISMAQUANT_MODEL_CACHE_MEMORY_H_

// Cache memory: what vLLM keeps on the device for the sequences that it serves, beside the weights.
// Bytes of what is stored, by vLLM's own accounting (max_memory_usage_bytes in
// vllm/v1/kv_cache_interface.py, the shapes in model_executor/layers/mamba/mamba_utils.py; 0.28 and
// newer) at its defaults:
//
//   full attention     2 x KV heads x head_dim values of 2 bytes per token, for `context` tokens
//   sliding attention  the same per token, for min(window - 1, context) tokens of every sequence,
//                      and the tokens in flight, which share one allowance, and never for more
//                      than full attention
//   Gated DeltaNet     2 + `drafts` states per sequence (the running one, that of the last block
//                      for prefix caching, one per drafted token), each
//                        convolution  (kernel - 1 + drafts) x (2 key width + value width) x 2 bytes
//                        recurrence   value heads x value_dim x key_dim x 4 bytes
//   MTP head           a layer of full attention, held only if it drafts
//
// Left out: the rounding to blocks of tokens, activations and CUDA graphs.

#include <cstdint>

#include "model/config.h"

namespace prismaquant {

// What vLLM is to serve at once.
struct ServedLoad {
  int64_t context = 0;    // tokens of a sequence
  int64_t sequences = 1;  // of that length
  int64_t drafts = 0;     // tokens that the MTP head drafts (num_speculative_tokens); 0: not loaded
};

struct CacheMemory {
  int64_t kv_cache_bytes = 0;
  int64_t state_bytes = 0;  // of the Gated DeltaNet layers
};

// Sums beyond kMostCacheBytes are cut to it.
constexpr int64_t kMostCacheBytes = int64_t{1} << 56;
CacheMemory CacheMemoryOf(const ModelConfig& config, const ServedLoad& load);

}  // namespace prismaquant

#endif  // PRISMAQUANT_MODEL_CACHE_MEMORY_H_

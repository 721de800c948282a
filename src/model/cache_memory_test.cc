#include "model/cache_memory.h"

#include <gtest/gtest.h>

#include <string>

#include "base/json.h"

namespace prismaquant {
namespace {

CacheMemory Of(const char* config, const ServedLoad& load) {
  const Result<ModelConfig> parsed = ModelConfig::Parse(Json::parse(config), "config.json");
  EXPECT_TRUE(parsed.ok()) << parsed.status().message();
  return parsed.ok() ? CacheMemoryOf(*parsed, load) : CacheMemory{};
}

// Llama 3.1 8B.
constexpr char kLlama[] = R"({"architectures": ["LlamaForCausalLM"], "vocab_size": 128256,
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8})";

TEST(CacheMemory, LlamaHoldsEveryToken) {
  // 32 layers x 2 x 8 heads x 128 values x 2 bytes = 131072 bytes per token.
  const CacheMemory memory = Of(kLlama, {.context = 32768});
  EXPECT_EQ(memory.kv_cache_bytes, int64_t{32768} * 131072);
  EXPECT_EQ(memory.state_bytes, 0);
  EXPECT_EQ(Of(kLlama, {.context = 32768, .sequences = 5}).kv_cache_bytes,
            int64_t{5} * 32768 * 131072);
}

// Qwen3 0.6B: heads wider than hidden_size / heads.
TEST(CacheMemory, HeadDimIsTheConfigurations) {
  const CacheMemory memory = Of(R"({"architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936,
      "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128,
      "num_attention_heads": 16, "num_key_value_heads": 8})",
                                {.context = 1000});
  EXPECT_EQ(memory.kv_cache_bytes, int64_t{1000} * 28 * 2 * 8 * 128 * 2);
}

// Qwen2.5 7B with the upper layers sliding: layers 21 to 27.
TEST(CacheMemory, QwenSlidesFromALayerOn) {
  const CacheMemory memory = Of(R"({"architectures": ["Qwen2ForCausalLM"], "vocab_size": 152064,
      "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
      "num_attention_heads": 28, "num_key_value_heads": 4, "use_sliding_window": true,
      "sliding_window": 8192, "max_window_layers": 21})",
                                {.context = 100000});
  // 2048 bytes per token and layer; a sliding layer holds 8191 + 4096 tokens.
  EXPECT_EQ(memory.kv_cache_bytes, int64_t{2048} * (21 * 100000 + 7 * 12287));
}

// Mistral 7B v0.1: every layer slides by 4096.
constexpr char kMistral[] = R"({"architectures": ["MistralForCausalLM"], "vocab_size": 32000,
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096})";

TEST(CacheMemory, MistralHoldsAWindowAndTheTokensInFlight) {
  constexpr int64_t kTokenBytes = 32 * 2 * 8 * 128 * 2;
  const auto tokens = [](const ServedLoad& load) {
    return Of(kMistral, load).kv_cache_bytes / kTokenBytes;
  };
  EXPECT_EQ(tokens({.context = 32768}), 4095 + 4096);
  EXPECT_EQ(tokens({.context = 8000}), 8000) << "no more than full attention";
  EXPECT_EQ(tokens({.context = 2000, .sequences = 3}), 3 * 2000);
  EXPECT_EQ(tokens({.context = 32768, .sequences = 3}), 3 * 4095 + 4096)
      << "the tokens in flight are of all sequences together";
}

// Gemma 3 27B: 62 layers, of which 10 are full (every sixth) and 52 slide by 1024.
TEST(CacheMemory, GemmaSlidesInFiveLayersOfSix) {
  const CacheMemory memory =
      Of(R"({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {
      "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "head_dim": 128,
      "num_attention_heads": 32, "num_key_value_heads": 16, "sliding_window": 1024,
      "query_pre_attn_scalar": 168}})",
         {.context = 32768});
  // 8192 bytes per token and layer.
  EXPECT_EQ(memory.kv_cache_bytes, int64_t{8192} * (10 * 32768 + 52 * (1023 + 4096)));
  EXPECT_EQ(memory.state_bytes, 0);
}

// Qwen3.6 27B: 16 full layers, 48 of Gated DeltaNet, an MTP head.
constexpr char kHybrid[] = R"({"architectures": ["Qwen3_5ForConditionalGeneration"],
    "text_config": {"vocab_size": 248320, "hidden_size": 5120, "intermediate_size": 17408,
    "num_hidden_layers": 64, "head_dim": 256, "num_attention_heads": 24, "num_key_value_heads": 4,
    "linear_num_key_heads": 16, "linear_num_value_heads": 48, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "mtp_num_hidden_layers": 1}})";

TEST(CacheMemory, HybridKeepsStatesWhateverTheContext) {
  // A state: 3 x 10240 values of 2 bytes and 48 x 128 x 128 of 4: 61440 + 3145728 bytes.
  constexpr int64_t kState = 3207168;
  const CacheMemory memory = Of(kHybrid, {.context = 32768});
  EXPECT_EQ(memory.kv_cache_bytes, int64_t{32768} * 16 * 2 * 4 * 256 * 2);
  EXPECT_EQ(memory.kv_cache_bytes, 2147483648);
  EXPECT_EQ(memory.state_bytes, 48 * 2 * kState);
  const CacheMemory more = Of(kHybrid, {.context = 1000, .sequences = 4});
  EXPECT_EQ(more.kv_cache_bytes, int64_t{4} * 1000 * 65536);
  EXPECT_EQ(more.state_bytes, 4 * 48 * 2 * kState);
}

TEST(CacheMemory, DraftsAddTheHeadsCacheAndAStateEach) {
  const CacheMemory memory = Of(kHybrid, {.context = 32768, .drafts = 3});
  EXPECT_EQ(memory.kv_cache_bytes, int64_t{32768} * 17 * 4096);
  EXPECT_EQ(memory.state_bytes, int64_t{48} * 5 * (6 * 10240 * 2 + 3145728));
}

TEST(CacheMemory, AnAbsurdLoadIsCut) {
  const int64_t most = int64_t{1} << 40;
  const CacheMemory memory = Of(kHybrid, {.context = most, .sequences = most, .drafts = most});
  EXPECT_EQ(memory.kv_cache_bytes, kMostCacheBytes);
  EXPECT_EQ(memory.state_bytes, kMostCacheBytes);
  EXPECT_EQ(Of(kMistral, {.context = most, .sequences = most}).kv_cache_bytes, kMostCacheBytes);
}

}  // namespace
}  // namespace prismaquant

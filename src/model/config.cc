#include "model/config.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <string_view>

#include "model/config_reader.h"
#include "model/config_rope.h"
#include "model/profile.h"

namespace prismaquant {
namespace {

constexpr int64_t kMostLayers = 10000, kMostExperts = 4096;

// How a family's configuration class says which layers do what, unless layer_types lists them.
enum class LayerRule {
  kFull,          // all alike; sliding_window is not read
  kSliding,       // all slide if sliding_window is not null
  kUpperSliding,  // with use_sliding_window, those from max_window_layers on
  kPattern,       // every sliding_window_pattern-th is full, the others slide
  kHybrid,        // every full_attention_interval-th is full, the others Gated DeltaNet
};

// Values that a configuration class fills in; 0: the key must be there, or follows from others.
struct ShapeDefaults {
  int64_t vocab_size = 0, hidden_size = 0, num_layers = 0, intermediate_size = 0, num_heads = 0,
          num_kv_heads = 0, head_dim = 0;
};

// What a family's configuration class in transformers reads, and its defaults.
struct FamilyKeys {
  std::string_view family;
  LayerRule rule = LayerRule::kFull;
  bool attention_bias = true, mlp_bias = false;  // the key counts
  bool tied_head = false;
  const char* activation_key = "hidden_act";
  const char* activation = "silu";
  RopeKeys rope = {};
  ShapeDefaults shape = {};
  double query_pre_attn_scalar = 0;
  bool mixture = false;        // may be a mixture of experts
  bool shared_expert = false;  // which then has a shared expert, and normed weights always
  bool mtp = false;
};

constexpr int64_t kDefaultWindow = 4096, kDefaultWindowLayers = 28, kDefaultPattern = 6;

constexpr std::array<FamilyKeys, 7> kFamilies = {{
    {.family = "llama", .mlp_bias = true},
    {.family = "mistral", .rule = LayerRule::kSliding, .attention_bias = false},
    {.family = "qwen2", .rule = LayerRule::kUpperSliding, .attention_bias = false},
    {.family = "qwen3", .rule = LayerRule::kUpperSliding},
    {.family = "qwen3_moe", .rule = LayerRule::kUpperSliding, .mixture = true},
    {.family = "qwen3_5",
     .rule = LayerRule::kHybrid,
     .rope = {.fraction = 0.25, .partial_rotary = true, .sections = true},
     .mixture = true,
     .shared_expert = true,
     .mtp = true},
    {.family = "gemma3",
     .rule = LayerRule::kPattern,
     .tied_head = true,
     .activation_key = "hidden_activation",
     .activation = "gelu_pytorch_tanh",
     .rope = {.theta = 1e6, .local_theta = 1e4},
     .shape = {.vocab_size = 262208,
               .hidden_size = 2304,
               .num_layers = 26,
               .intermediate_size = 9216,
               .num_heads = 8,
               .num_kv_heads = 4,
               .head_dim = 256},
     .query_pre_attn_scalar = 256},
}};

const FamilyKeys& KeysOf(std::string_view family) {
  return *std::find_if(kFamilies.begin(), kFamilies.end(),
                       [&](const FamilyKeys& keys) { return keys.family == family; });
}

std::string KnownArchitectures() {
  std::string known;
  for (const Profile& profile : AllProfiles()) {
    for (const auto& name : profile.architectures)
      known += (known.empty() ? "" : ", ") + std::string(name);
  }
  return known;
}

Result<std::string> Architecture(const Json& config, const std::string& origin) {
  if (!config.is_object() || !config.contains("architectures") ||
      !config["architectures"].is_array() || config["architectures"].empty() ||
      !config["architectures"][0].is_string()) {
    return Status::InvalidInput(fmt::format("{}: no \"architectures\"", origin));
  }
  auto name = config["architectures"][0].get<std::string>();
  if (FindProfile(name) == nullptr) {
    return Status::InvalidInput(fmt::format("{}: architecture {} is not supported, known are {}",
                                            origin, name, KnownArchitectures()));
  }
  return name;
}

int64_t ParseWindow(ConfigReader& reader, LayerRule rule) {
  const bool in_use =
      rule == LayerRule::kSliding || rule == LayerRule::kPattern ||
      (rule == LayerRule::kUpperSliding && reader.BoolOr("use_sliding_window", false));
  if (!in_use || reader.IsNull("sliding_window")) return 0;
  return reader.IntOr("sliding_window", kDefaultWindow);
}

std::vector<LayerKind> LayersByRule(ConfigReader& reader, LayerRule rule,
                                    const ModelConfig& config) {
  const bool hybrid = rule == LayerRule::kHybrid;
  int64_t interval = 1, first = config.num_layers;
  if (hybrid) interval = reader.IntOr("full_attention_interval", 4);
  if (rule == LayerRule::kPattern) {
    interval = reader.IntOr("sliding_window_pattern", kDefaultPattern);
  }
  if (config.sliding_window > 0 && rule == LayerRule::kSliding) first = 0;
  if (config.sliding_window > 0 && rule == LayerRule::kUpperSliding) {
    first = reader.Has("max_window_layers") ? reader.Int("max_window_layers", kMostLayers, 0)
                                            : kDefaultWindowLayers;
  }
  std::vector<LayerKind> layers;
  for (int64_t i = 0; i < config.num_layers; ++i) {
    const bool full = (i + 1) % interval == 0 && i < first;
    layers.push_back(full     ? LayerKind::kFullAttention
                     : hybrid ? LayerKind::kLinearAttention
                              : LayerKind::kSlidingAttention);
  }
  return layers;
}

// Whether the family's class lets layer_types put `kind` where its rule says `by_rule`.
bool MayList(LayerRule rule, LayerKind kind, LayerKind by_rule) {
  if (rule == LayerRule::kFull || rule == LayerRule::kSliding) return kind == by_rule;
  const LayerKind other =
      rule == LayerRule::kHybrid ? LayerKind::kLinearAttention : LayerKind::kSlidingAttention;
  return kind == LayerKind::kFullAttention || kind == other;
}

std::optional<LayerKind> KindNamed(const Json& name) {
  if (name == "full_attention") return LayerKind::kFullAttention;
  if (name == "sliding_attention") return LayerKind::kSlidingAttention;
  if (name == "linear_attention") return LayerKind::kLinearAttention;
  return std::nullopt;
}

void ReadLayerTypes(ConfigReader& reader, LayerRule rule, ModelConfig& config) {
  const Json& types = reader.object()["layer_types"];
  if (!types.is_array() || types.size() != config.layers.size()) {
    reader.Refuse(
        fmt::format("layer_types lists {} layers, expected {}", types.size(), config.num_layers));
    return;
  }
  for (size_t i = 0; i < types.size(); ++i) {
    const std::optional<LayerKind> kind = KindNamed(types[i]);
    if (!kind || !MayList(rule, *kind, config.layers[i])) {
      reader.Refuse(fmt::format("layer_types: {} is not supported in {}", types[i].dump(),
                                config.architecture));
      return;
    }
    config.layers[i] = *kind;
  }
}

void ParseLayers(ConfigReader& reader, LayerRule rule, ModelConfig& config) {
  config.sliding_window = ParseWindow(reader, rule);
  config.layers = LayersByRule(reader, rule, config);
  if (reader.Has("layer_types")) ReadLayerTypes(reader, rule, config);
  const bool slides = std::find(config.layers.begin(), config.layers.end(),
                                LayerKind::kSlidingAttention) != config.layers.end();
  if (slides && config.sliding_window == 0) {
    reader.Refuse(
        "layer_types: sliding_attention without a sliding_window that is in use is not supported");
  }
}

void RefuseUnsupported(ConfigReader& reader, const FamilyKeys& keys) {
  const std::string activation = reader.StringOr(keys.activation_key, keys.activation);
  if (activation != keys.activation) {
    reader.Refuse(fmt::format("{} {} is not supported, expected {}", keys.activation_key,
                              activation, keys.activation));
  }
  const std::string gate = reader.StringOr("output_gate_type", "swish");
  if (gate != "swish" && gate != "silu") {
    reader.Refuse(fmt::format("output_gate_type {} is not supported, expected swish", gate));
  }
  for (const char* key : {"num_experts", "num_local_experts"}) {
    if (reader.Has(key) && !keys.mixture) {
      reader.Refuse(fmt::format("{}: mixtures of experts are not supported in this family", key));
    }
  }
  for (const char* key : {"final_logit_softcapping", "attn_logit_softcapping"}) {
    if (reader.Has(key)) reader.Refuse(fmt::format("{} is not supported, expected null", key));
  }
  if (!reader.BoolOr("attn_output_gate", true)) {
    reader.Refuse("attn_output_gate: false is not supported");
  }
  if (reader.BoolOr("use_bidirectional_attention", false)) {
    reader.Refuse("use_bidirectional_attention: true is not supported");
  }
  if (keys.family == "mistral" && reader.BoolOr("attention_bias", false)) {
    reader.Refuse("attention_bias: true is not supported in MistralForCausalLM");
  }
}

void ParseShape(ConfigReader& reader, const FamilyKeys& keys, ModelConfig& config) {
  const auto size = [&](const char* key, int64_t fallback) {
    return fallback > 0 ? reader.IntOr(key, fallback) : reader.Int(key);
  };
  const ShapeDefaults& shape = keys.shape;
  config.vocab_size = size("vocab_size", shape.vocab_size);
  config.hidden_size = size("hidden_size", shape.hidden_size);
  config.num_layers = size("num_hidden_layers", shape.num_layers);
  if (config.num_layers > kMostLayers) {
    reader.Refuse(
        fmt::format("num_hidden_layers is {}, expected 1 to {}", config.num_layers, kMostLayers));
    config.num_layers = 1;
  }
  config.intermediate_size = config.mixture ? config.mixture->expert_size
                                            : size("intermediate_size", shape.intermediate_size);
  config.num_heads = size("num_attention_heads", shape.num_heads);
  config.num_kv_heads =
      size("num_key_value_heads", shape.num_kv_heads > 0 ? shape.num_kv_heads : config.num_heads);
  config.head_dim = reader.IntOr(
      "head_dim", shape.head_dim > 0 ? shape.head_dim : config.hidden_size / config.num_heads);
  config.rms_norm_eps = reader.DoubleOr("rms_norm_eps", 1e-6);
  config.attention_bias = keys.attention_bias && reader.BoolOr("attention_bias", false);
  config.mlp_bias = keys.mlp_bias && reader.BoolOr("mlp_bias", false);
  if (keys.query_pre_attn_scalar > 0) {
    config.query_pre_attn_scalar =
        reader.DoubleOr("query_pre_attn_scalar", keys.query_pre_attn_scalar);
  }
  if (config.num_heads % config.num_kv_heads != 0) {
    reader.Refuse(fmt::format("{} attention heads are no multiple of {} key-value heads",
                              config.num_heads, config.num_kv_heads));
  }
}

void ParseMixture(ConfigReader& reader, const FamilyKeys& keys, ModelConfig& config) {
  const char* experts = reader.Has("num_experts") ? "num_experts" : "num_local_experts";
  MixtureConfig mixture{.experts = reader.Int(experts, kMostExperts),
                        .experts_per_token = reader.Int("num_experts_per_tok"),
                        .expert_size = reader.Int("moe_intermediate_size")};
  if (keys.shared_expert) {
    mixture.shared_size = reader.Int("shared_expert_intermediate_size");
  } else {
    mixture.normalize = reader.BoolOr("norm_topk_prob", false);
  }
  if (mixture.experts_per_token > mixture.experts) {
    reader.Refuse(fmt::format("num_experts_per_tok is {}, expected at most num_experts, {}",
                              mixture.experts_per_token, mixture.experts));
    mixture.experts_per_token = mixture.experts;
  }
  if (reader.IntOr("decoder_sparse_step", 1) != 1) {
    reader.Refuse("decoder_sparse_step: only 1, experts in every layer, is supported");
  }
  if (reader.Has("mlp_only_layers") && !reader.object()["mlp_only_layers"].empty()) {
    reader.Refuse("mlp_only_layers: layers without experts are not supported");
  }
  config.mixture = mixture;
}

// Tokens that stand for an image and around it; -1 for one that the vocabulary does not have.
void ParseImageTokens(ConfigReader& whole, ModelConfig& config) {
  const auto token = [&](const char* key) {
    const int64_t id = whole.Has(key) ? whole.Int(key, INT32_MAX, 0) : -1;
    return id < config.vocab_size ? id : -1;
  };
  config.image_token = token("image_token_id");
  config.vision_start_token = token("vision_start_token_id");
  config.vision_end_token = token("vision_end_token_id");
}

void ParseDeltaNet(ConfigReader& reader, ModelConfig& config) {
  config.linear_key_heads = reader.Int("linear_num_key_heads");
  config.linear_value_heads = reader.Int("linear_num_value_heads");
  config.linear_key_dim = reader.Int("linear_key_head_dim");
  config.linear_value_dim = reader.Int("linear_value_head_dim");
  config.linear_conv_kernel = reader.Int("linear_conv_kernel_dim");
  if (config.linear_value_heads % config.linear_key_heads != 0) {
    reader.Refuse(fmt::format("{} linear value heads are no multiple of {} key heads",
                              config.linear_value_heads, config.linear_key_heads));
  }
}

}  // namespace

Result<ModelConfig> ModelConfig::Parse(const Json& json, const std::string& origin) {
  ModelConfig config;
  PQ_ASSIGN_OR_RETURN(config.architecture, Architecture(json, origin));
  const Profile& profile = *FindProfile(config.architecture);
  const FamilyKeys& keys = KeysOf(profile.family);
  config.family = std::string(profile.family);
  config.body_prefix = std::string(profile.body_prefixes.front());
  ConfigReader whole(json, origin);
  const bool nested = whole.Has("text_config");
  ConfigReader text(nested ? json["text_config"] : json,
                    nested ? origin + ": text_config" : origin);
  config.tied_head =
      whole.BoolOr("tie_word_embeddings", text.BoolOr("tie_word_embeddings", keys.tied_head));
  const bool moe = keys.mixture && (keys.family == "qwen3_moe" || text.Has("num_experts"));
  if (moe) ParseMixture(text, keys, config);
  ParseShape(text, keys, config);
  RefuseUnsupported(text, keys);
  ParseRope(text, keys.rope, config);
  ParseLayers(text, keys.rule, config);
  if (keys.rule == LayerRule::kHybrid) ParseDeltaNet(text, config);
  // A head with embeddings of its own has never been published; it is passed through.
  if (keys.mtp && text.Has("mtp_num_hidden_layers") &&
      !text.BoolOr("mtp_use_dedicated_embeddings", false)) {
    config.mtp_layers = text.Int("mtp_num_hidden_layers", kMostLayers, 0);
  }
  ParseImageTokens(whole, config);
  PQ_RETURN_IF_ERROR(whole.status());
  PQ_RETURN_IF_ERROR(text.status());
  return config;
}

}  // namespace prismaquant

#include "model/config.h"

#include <fmt/format.h>

#include "model/profile.h"

namespace prismaquant {
namespace {

// Sizes above this are refused, so that products of two of them fit 64 bits.
constexpr int64_t kLargest = int64_t{1} << 30;
constexpr int64_t kMostLayers = 10000;

// Reads keys of an object of config.json and remembers the first error. After an error every getter
// still returns a value that the arithmetic below can live with.
class Reader {
 public:
  Reader(const Json& object, std::string origin) : object_(object), origin_(std::move(origin)) {}

  bool Has(const char* key) const {
    return object_.is_object() && object_.contains(key) && !object_[key].is_null();
  }
  int64_t Int(const char* key, int64_t largest = kLargest) {
    const int64_t value = Take(JsonInt(object_, key, origin_), int64_t{1});
    if (value >= 1 && value <= largest) return value;
    Refuse(fmt::format("{} is {}, expected 1 to {}", key, value, largest));
    return 1;
  }
  int64_t IntOr(const char* key, int64_t fallback) { return Has(key) ? Int(key) : fallback; }
  double Double(const char* key) {
    const double value = Take(JsonDouble(object_, key, origin_), 1.0);
    if (value > 0 && value <= 1e12) return value;
    Refuse(fmt::format("{} is {}, expected a positive number", key, value));
    return 1;
  }
  double DoubleOr(const char* key, double fallback) { return Has(key) ? Double(key) : fallback; }
  std::string StringOr(const char* key, const char* fallback) {
    return Has(key) ? Take(JsonString(object_, key, origin_), std::string(fallback)) : fallback;
  }
  bool BoolOr(const char* key, bool fallback) {
    if (!Has(key)) return fallback;
    if (object_[key].is_boolean()) return object_[key].get<bool>();
    Refuse(fmt::format("{} is {}, expected true or false", key, object_[key].type_name()));
    return fallback;
  }
  void Refuse(const std::string& what) {
    if (status_.ok()) status_ = Status::InvalidInput(fmt::format("{}: {}", origin_, what));
  }
  void Refuse(const Status& status) {
    if (status_.ok()) status_ = status;
  }
  const Json& object() const { return object_; }
  const std::string& origin() const { return origin_; }
  const Status& status() const { return status_; }

 private:
  template <typename T>
  T Take(Result<T> result, T fallback) {
    if (result.ok()) return std::move(result).value();
    Refuse(result.status());
    return fallback;
  }

  const Json& object_;
  std::string origin_;
  Status status_;
};

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

// Rope parameters stand in "rope_parameters" (new), or in "rope_theta" and "rope_scaling" (old).
void ParseRope(Reader& body, ModelConfig& config) {
  static const Json kNone = Json::object();
  const char* key = body.Has("rope_parameters") ? "rope_parameters" : "rope_scaling";
  if (body.Has(key) && !body.object()[key].is_object()) {
    body.Refuse(fmt::format("{} is {}, expected an object", key, body.object()[key].type_name()));
  }
  Reader rope(body.Has(key) ? body.object()[key] : kNone, body.origin() + ": " + key);
  const auto number = [&](const char* name, double fallback) {
    return rope.Has(name) ? rope.Double(name) : body.DoubleOr(name, fallback);
  };
  const bool partial = config.model_type == "qwen3_5";
  config.rope_theta = number("rope_theta", 10000);
  const double fraction = number("partial_rotary_factor", partial ? 0.25 : 1.0);
  if (fraction > 1 || (!partial && fraction != 1)) {
    body.Refuse(fmt::format("partial_rotary_factor {} is not supported, expected {}", fraction,
                            partial ? "at most 1" : "1"));
  } else {
    config.rotary_dim = static_cast<int64_t>(static_cast<double>(config.head_dim) * fraction);
  }
  if (config.rotary_dim <= 0 || config.rotary_dim % 2 != 0) {
    body.Refuse(fmt::format("rotary dimension {} of a head of {}, expected an even number",
                            config.rotary_dim, config.head_dim));
  }
  const std::string type = rope.StringOr("rope_type", rope.StringOr("type", "default").c_str());
  if (type == "llama3") {
    const double context =
        number("original_max_position_embeddings", body.DoubleOr("max_position_embeddings", 8192));
    config.rope_scaling = {.factor = rope.Double("factor"),
                           .low_freq_factor = rope.Double("low_freq_factor"),
                           .high_freq_factor = rope.Double("high_freq_factor"),
                           .original_max_position = static_cast<int64_t>(context)};
  } else if (type != "default") {
    rope.Refuse(fmt::format("rope type {} is not supported, known are default and llama3", type));
  }
  if (!rope.status().ok()) body.Refuse(rope.status());
}

void ParseLayers(Reader& reader, ModelConfig& config) {
  const bool hybrid = config.model_type == "qwen3_5";
  if (!reader.Has("layer_types")) {
    const int64_t interval = hybrid ? reader.IntOr("full_attention_interval", 4) : 1;
    for (int64_t i = 1; i <= config.num_layers; ++i) {
      config.layers.push_back(i % interval == 0 ? LayerKind::kFullAttention
                                                : LayerKind::kLinearAttention);
    }
    return;
  }
  const Json& types = reader.object()["layer_types"];
  if (!types.is_array() || static_cast<int64_t>(types.size()) != config.num_layers) {
    reader.Refuse(
        fmt::format("layer_types lists {} layers, expected {}", types.size(), config.num_layers));
    return;
  }
  for (const Json& type : types) {
    if (type == "full_attention") {
      config.layers.push_back(LayerKind::kFullAttention);
    } else if (type == "linear_attention" && hybrid) {
      config.layers.push_back(LayerKind::kLinearAttention);
    } else {
      reader.Refuse(
          fmt::format("layer_types: {} is not supported in {}", type.dump(), config.architecture));
      return;
    }
  }
}

void RefuseUnsupported(Reader& reader, const ModelConfig& config) {
  const std::string activation = reader.StringOr("hidden_act", "silu");
  if (activation != "silu") {
    reader.Refuse(fmt::format("hidden_act {} is not supported, expected silu", activation));
  }
  const std::string gate = reader.StringOr("output_gate_type", "swish");
  if (gate != "swish" && gate != "silu") {
    reader.Refuse(fmt::format("output_gate_type {} is not supported, expected swish", gate));
  }
  for (const char* key : {"num_experts", "num_local_experts"}) {
    if (reader.Has(key)) {
      reader.Refuse(fmt::format("{}: mixtures of experts are not supported", key));
    }
  }
  if (!reader.BoolOr("attn_output_gate", true)) {
    reader.Refuse("attn_output_gate: false is not supported");
  }
  if (reader.BoolOr("use_sliding_window", false) && reader.Has("sliding_window") &&
      !reader.Has("layer_types") && reader.IntOr("max_window_layers", 28) < config.num_layers) {
    reader.Refuse("use_sliding_window: true is not supported");
  }
}

void ParseShape(Reader& reader, ModelConfig& config) {
  config.vocab_size = reader.Int("vocab_size");
  config.hidden_size = reader.Int("hidden_size");
  config.num_layers = reader.Int("num_hidden_layers", kMostLayers);
  config.intermediate_size = reader.Int("intermediate_size");
  config.num_heads = reader.Int("num_attention_heads");
  config.num_kv_heads = reader.IntOr("num_key_value_heads", config.num_heads);
  config.head_dim = reader.IntOr("head_dim", config.hidden_size / config.num_heads);
  config.rms_norm_eps = reader.DoubleOr("rms_norm_eps", 1e-6);
  config.attention_bias = reader.BoolOr("attention_bias", false);
  config.mlp_bias = config.model_type == "llama" && reader.BoolOr("mlp_bias", false);
  if (config.num_heads % config.num_kv_heads != 0) {
    reader.Refuse(fmt::format("{} attention heads are no multiple of {} key-value heads",
                              config.num_heads, config.num_kv_heads));
  }
}

void ParseDeltaNet(Reader& reader, ModelConfig& config) {
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
  config.model_type = std::string(FindProfile(config.architecture)->family);
  config.body_prefix =
      config.architecture == "Qwen3_5ForConditionalGeneration" ? "model.language_model." : "model.";
  Reader whole(json, origin);
  const bool nested = whole.Has("text_config");
  Reader text(nested ? json["text_config"] : json, nested ? origin + ": text_config" : origin);
  config.tied_head = whole.BoolOr("tie_word_embeddings", text.BoolOr("tie_word_embeddings", false));
  ParseShape(text, config);
  RefuseUnsupported(text, config);
  ParseRope(text, config);
  ParseLayers(text, config);
  if (config.model_type == "qwen3_5") ParseDeltaNet(text, config);
  PQ_RETURN_IF_ERROR(whole.status());
  PQ_RETURN_IF_ERROR(text.status());
  return config;
}

}  // namespace prismaquant

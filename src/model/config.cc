#include "model/config.h"

#include <fmt/format.h>

#include "model/profile.h"

namespace prismaquant {
namespace {

// Reads keys of the text body's configuration and remembers the first error.
class Reader {
 public:
  Reader(const Json& object, std::string origin) : object_(object), origin_(std::move(origin)) {}

  bool Has(const char* key) const { return object_.contains(key) && !object_[key].is_null(); }
  int64_t Int(const char* key, int64_t smallest = 1) {
    const int64_t value = Take(JsonInt(object_, key, origin_), int64_t{1});
    if (status_.ok() && (value < smallest || value > (int64_t{1} << 32))) {
      status_ = Status::InvalidInput(fmt::format("{}: {} is {}, expected at least {}", origin_, key, value, smallest));
    }
    return value;
  }
  int64_t IntOr(const char* key, int64_t fallback) { return Has(key) ? Int(key) : fallback; }
  double Double(const char* key) { return Take(JsonDouble(object_, key, origin_), 1.0); }
  double DoubleOr(const char* key, double fallback) { return Has(key) ? Double(key) : fallback; }
  std::string String(const char* key) { return Take(JsonString(object_, key, origin_), std::string()); }
  bool BoolOr(const char* key, bool fallback) const {
    return Has(key) && object_[key].is_boolean() ? object_[key].get<bool>() : fallback;
  }
  void Refuse(const std::string& what) {
    if (status_.ok()) status_ = Status::InvalidInput(fmt::format("{}: {}", origin_, what));
  }
  const Json& object() const { return object_; }
  const std::string& origin() const { return origin_; }
  const Status& status() const { return status_; }

 private:
  template <typename T>
  T Take(Result<T> result, T fallback) {
    if (result.ok()) return std::move(result).value();
    if (status_.ok()) status_ = result.status();
    return fallback;
  }

  const Json& object_;
  std::string origin_;
  Status status_;
};

std::string KnownArchitectures() {
  std::string known;
  for (const Profile& profile : AllProfiles()) {
    for (const auto& name : profile.architectures) known += (known.empty() ? "" : ", ") + std::string(name);
  }
  return known;
}

Result<std::string> Architecture(const Json& config, const std::string& origin) {
  if (!config.is_object() || !config.contains("architectures") || !config["architectures"].is_array() ||
      config["architectures"].empty() || !config["architectures"][0].is_string()) {
    return Status::InvalidInput(fmt::format("{}: no \"architectures\"", origin));
  }
  auto name = config["architectures"][0].get<std::string>();
  if (FindProfile(name) == nullptr) {
    return Status::InvalidInput(
        fmt::format("{}: architecture {} is not supported, known are {}", origin, name, KnownArchitectures()));
  }
  return name;
}

// Rope parameters stand in "rope_parameters" (new), or in "rope_theta" and "rope_scaling" (old).
void ParseRope(Reader& reader, ModelConfig& config) {
  static const Json kNone = Json::object();
  const Json& top = reader.object();
  const char* key = reader.Has("rope_parameters") ? "rope_parameters" : "rope_scaling";
  const Json& rope = reader.Has(key) ? top[key] : kNone;
  const auto number = [&](const char* name, double fallback) {
    if (rope.contains(name) && rope[name].is_number()) return rope[name].get<double>();
    return top.contains(name) && top[name].is_number() ? top[name].get<double>() : fallback;
  };
  config.rope_theta = number("rope_theta", 10000);
  config.rotary_dim =
      static_cast<int64_t>(static_cast<double>(config.head_dim) * number("partial_rotary_factor", 1.0));
  std::string type = "default";
  for (const char* name : {"type", "rope_type"}) {
    if (rope.contains(name) && rope[name].is_string()) type = rope[name].get<std::string>();
  }
  if (type == "llama3") {
    config.rope_scaling = {.factor = number("factor", 1),
                           .low_freq_factor = number("low_freq_factor", 1),
                           .high_freq_factor = number("high_freq_factor", 4),
                           .original_max_position =
                               static_cast<int64_t>(number("original_max_position_embeddings", 8192))};
  } else if (type != "default") {
    reader.Refuse(fmt::format("{}: rope type {} is not supported, known are default and llama3", key, type));
  }
  if (config.rotary_dim <= 0 || config.rotary_dim > config.head_dim || config.rotary_dim % 2 != 0) {
    reader.Refuse(fmt::format("rotary dimension {} of a head of {}", config.rotary_dim, config.head_dim));
  }
}

void ParseLayers(Reader& reader, ModelConfig& config) {
  if (!reader.Has("layer_types")) {
    config.layers.assign(static_cast<size_t>(config.num_layers), LayerKind::kFullAttention);
    const int64_t interval = reader.IntOr("full_attention_interval", 1);
    for (int64_t i = 0; i < config.num_layers; ++i) {
      if ((i + 1) % interval != 0) config.layers[static_cast<size_t>(i)] = LayerKind::kLinearAttention;
    }
    return;
  }
  const Json& types = reader.object()["layer_types"];
  if (!types.is_array() || static_cast<int64_t>(types.size()) != config.num_layers) {
    reader.Refuse(fmt::format("layer_types lists {} layers, expected {}", types.size(), config.num_layers));
    return;
  }
  for (const Json& type : types) {
    if (type == "full_attention") {
      config.layers.push_back(LayerKind::kFullAttention);
    } else if (type == "linear_attention") {
      config.layers.push_back(LayerKind::kLinearAttention);
    } else {
      reader.Refuse(fmt::format("layer type {} is not supported", type.dump()));
      return;
    }
  }
}

void RefuseUnsupported(Reader& reader) {
  if (reader.Has("hidden_act") && reader.String("hidden_act") != "silu") {
    reader.Refuse(fmt::format("hidden_act {} is not supported, expected silu", reader.String("hidden_act")));
  }
  for (const char* key : {"num_experts", "num_local_experts"}) {
    if (reader.Has(key)) reader.Refuse(fmt::format("{}: mixtures of experts are not supported", key));
  }
  if (reader.BoolOr("use_sliding_window", false)) reader.Refuse("use_sliding_window: true is not supported");
}

}  // namespace

Result<ModelConfig> ModelConfig::Parse(const Json& json, const std::string& origin) {
  ModelConfig config;
  PQ_ASSIGN_OR_RETURN(config.architecture, Architecture(json, origin));
  const bool nested = json.contains("text_config") && json["text_config"].is_object();
  Reader reader(nested ? json["text_config"] : json, nested ? origin + ": text_config" : origin);
  config.body_prefix =
      config.architecture == "Qwen3_5ForConditionalGeneration" ? "model.language_model." : "model.";
  config.model_type = std::string(FindProfile(config.architecture)->family);
  config.vocab_size = reader.Int("vocab_size");
  config.hidden_size = reader.Int("hidden_size");
  config.num_layers = reader.Int("num_hidden_layers");
  config.intermediate_size = reader.Int("intermediate_size");
  config.num_heads = reader.Int("num_attention_heads");
  config.num_kv_heads = reader.IntOr("num_key_value_heads", config.num_heads);
  config.head_dim = reader.IntOr("head_dim", config.hidden_size / config.num_heads);
  config.rms_norm_eps = reader.DoubleOr("rms_norm_eps", 1e-6);
  config.attention_bias = reader.BoolOr("attention_bias", false);
  config.mlp_bias = reader.BoolOr("mlp_bias", false);
  config.tied_head = reader.BoolOr("tie_word_embeddings", nested && json.value("tie_word_embeddings", false));
  if (config.num_heads % config.num_kv_heads != 0) {
    reader.Refuse(fmt::format("{} attention heads are no multiple of {} key-value heads", config.num_heads,
                              config.num_kv_heads));
  }
  RefuseUnsupported(reader);
  ParseRope(reader, config);
  ParseLayers(reader, config);
  if (config.model_type == "qwen3_5") {
    config.linear_key_heads = reader.Int("linear_num_key_heads");
    config.linear_value_heads = reader.Int("linear_num_value_heads");
    config.linear_key_dim = reader.Int("linear_key_head_dim");
    config.linear_value_dim = reader.Int("linear_value_head_dim");
    config.linear_conv_kernel = reader.Int("linear_conv_kernel_dim");
    if (config.linear_value_heads % config.linear_key_heads != 0) {
      reader.Refuse(fmt::format("{} linear value heads are no multiple of {} key heads", config.linear_value_heads,
                                config.linear_key_heads));
    }
  } else {
    for (const LayerKind kind : config.layers) {
      if (kind != LayerKind::kFullAttention) reader.Refuse("linear attention layers are not supported here");
    }
  }
  PQ_RETURN_IF_ERROR(reader.status());
  return config;
}

}  // namespace prismaquant

#include "model/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace prismaquant {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr LayerKind kFull = LayerKind::kFullAttention, kSliding = LayerKind::kSlidingAttention;

Json With(Json json, const char* key, Json value) {
  json[key] = std::move(value);
  return json;
}

Json Llama() {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"vocab_size", 100},
          {"hidden_size", 64},
          {"num_hidden_layers", 2},
          {"intermediate_size", 128},
          {"num_attention_heads", 4}};
}

Json Gemma() {
  Json json = With(Llama(), "architectures", {"Gemma3ForCausalLM"});
  json.update({{"num_key_value_heads", 2}, {"head_dim", 16}});
  return json;
}

Json HybridText() {
  Json text = Llama();
  text.erase("architectures");
  text.update({{"num_hidden_layers", 5},
               {"head_dim", 32},
               {"num_key_value_heads", 2},
               {"linear_num_key_heads", 2},
               {"linear_num_value_heads", 6},
               {"linear_key_head_dim", 16},
               {"linear_value_head_dim", 24},
               {"linear_conv_kernel_dim", 4}});
  return text;
}

Json Hybrid() {
  return {{"architectures", {"Qwen3_5ForConditionalGeneration"}}, {"text_config", HybridText()}};
}

ModelConfig Parsed(const Json& json) {
  const Result<ModelConfig> config = ModelConfig::Parse(json, "config.json");
  EXPECT_TRUE(config.ok()) << config.status().message();
  return config.ok() ? *config : ModelConfig{};
}

std::string Error(const Json& json) {
  const Result<ModelConfig> config = ModelConfig::Parse(json, "dir/config.json");
  EXPECT_FALSE(config.ok());
  EXPECT_EQ(config.status().code(), StatusCode::kInvalidInput);
  EXPECT_THAT(config.status().message(), HasSubstr("dir/config.json"));
  return config.status().message();
}

TEST(ModelConfig, FillsInWhatLlamaConfigurationsLeaveOut) {
  const ModelConfig config = Parsed(Llama());
  EXPECT_EQ(config.family, "llama");
  EXPECT_EQ(config.body_prefix, "model.");
  EXPECT_EQ(config.num_kv_heads, 4);
  EXPECT_EQ(config.head_dim, 16);
  EXPECT_EQ(config.rotary_dim, 16);
  EXPECT_EQ(config.rope_theta, 10000);
  EXPECT_FALSE(config.tied_head);
  EXPECT_FALSE(config.rope_scaling.has_value());
  EXPECT_EQ(config.layers, std::vector<LayerKind>(2, LayerKind::kFullAttention));
}

TEST(ModelConfig, ReadsOldAndNewRopeSpellingsAlike) {
  const Json scaling = {{"rope_type", "llama3"},
                        {"factor", 8.0},
                        {"low_freq_factor", 1.0},
                        {"high_freq_factor", 4.0},
                        {"original_max_position_embeddings", 4096}};
  Json old_spelling = With(With(Llama(), "rope_theta", 5e5), "rope_scaling", scaling);
  Json new_spelling = With(Llama(), "rope_parameters", With(scaling, "rope_theta", 5e5));
  for (const Json& json : {old_spelling, new_spelling}) {
    const ModelConfig config = Parsed(json);
    EXPECT_EQ(config.rope_theta, 5e5);
    ASSERT_TRUE(config.rope_scaling.has_value());
    EXPECT_EQ(config.rope_scaling->factor, 8);
    EXPECT_EQ(config.rope_scaling->low_freq_factor, 1);
    EXPECT_EQ(config.rope_scaling->high_freq_factor, 4);
    EXPECT_EQ(config.rope_scaling->original_max_position, 4096);
  }
}

TEST(ModelConfig, LinearScalingIsReadInEverySpelling) {
  const Json settings = {{"factor", 2.0}, {"rope_theta", 5e5}};
  EXPECT_EQ(Parsed(Llama()).rope_factor, 1);
  for (const char* type : {"type", "rope_type"}) {
    for (const char* key : {"rope_scaling", "rope_parameters"}) {
      const ModelConfig config = Parsed(With(Llama(), key, With(settings, type, "linear")));
      EXPECT_EQ(config.rope_factor, 2);
      EXPECT_EQ(config.rope_theta, 5e5);
      EXPECT_FALSE(config.rope_scaling.has_value());
    }
  }
  EXPECT_THAT(Error(With(Llama(), "rope_scaling", {{"type", "linear"}})), HasSubstr("factor"));
}

TEST(ModelConfig, OtherRopeTypesAreRefusedByName) {
  for (const char* type : {"yarn", "dynamic", "longrope", "su"}) {
    EXPECT_THAT(Error(With(Llama(), "rope_scaling", {{"type", type}, {"factor", 2.0}})),
                AllOf(HasSubstr("rope_scaling"), HasSubstr(type), HasSubstr("linear")));
  }
  EXPECT_THAT(Error(With(Llama(), "rope_parameters", {{"full_attention", {{"factor", 2.0}}}})),
              AllOf(HasSubstr("rope_parameters"), HasSubstr("LlamaForCausalLM")));
}

TEST(ModelConfig, Llama3ScalingNeedsItsFactors) {
  EXPECT_THAT(Error(With(Llama(), "rope_scaling", {{"rope_type", "llama3"}})), HasSubstr("factor"));
}

TEST(ModelConfig, ReadsTheNestedTextBody) {
  const ModelConfig config = Parsed(Hybrid());
  EXPECT_EQ(config.family, "qwen3_5");
  EXPECT_EQ(config.body_prefix, "model.language_model.");
  EXPECT_EQ(config.rotary_dim, 8);  // a quarter of the head unless told otherwise
  EXPECT_EQ(config.linear_value_heads, 6);
  const auto linear = LayerKind::kLinearAttention;
  EXPECT_EQ(config.layers,
            (std::vector{linear, linear, linear, LayerKind::kFullAttention, linear}));
}

TEST(ModelConfig, TextOnlyConfigurationsHaveTheirFieldsAtTheTop) {
  const ModelConfig config = Parsed(With(HybridText(), "architectures", {"Qwen3_5ForCausalLM"}));
  EXPECT_EQ(config.body_prefix, "model.");
  EXPECT_EQ(config.linear_key_heads, 2);
}

TEST(ModelConfig, LayerTypesAndIntervalSayWhichLayersAttend) {
  Json listed = Hybrid();
  listed["text_config"]["layer_types"] = {"full_attention", "linear_attention", "full_attention",
                                          "linear_attention", "linear_attention"};
  EXPECT_EQ(Parsed(listed).layers[2], LayerKind::kFullAttention);
  Json interval = Hybrid();
  interval["text_config"]["full_attention_interval"] = 2;
  EXPECT_EQ(Parsed(interval).layers[1], LayerKind::kFullAttention);
  EXPECT_EQ(Parsed(interval).layers[2], LayerKind::kLinearAttention);
}

TEST(ModelConfig, TheOuterConfigurationTiesTheHead) {
  EXPECT_TRUE(Parsed(With(Hybrid(), "tie_word_embeddings", true)).tied_head);
  Json inner = Hybrid();
  inner["text_config"]["tie_word_embeddings"] = true;
  EXPECT_TRUE(Parsed(inner).tied_head);
  EXPECT_FALSE(Parsed(With(inner, "tie_word_embeddings", false)).tied_head);
}

TEST(ModelConfig, AnUnknownArchitectureListsTheKnownOnes) {
  EXPECT_THAT(Error(With(Llama(), "architectures", {"MambaForCausalLM"})),
              AllOf(HasSubstr("MambaForCausalLM"), HasSubstr("LlamaForCausalLM"),
                    HasSubstr("Qwen3ForCausalLM"), HasSubstr("Qwen3_5ForConditionalGeneration"),
                    HasSubstr("Qwen3_5ForCausalLM"), HasSubstr("MistralForCausalLM"),
                    HasSubstr("Qwen2ForCausalLM"), HasSubstr("Gemma3ForCausalLM"),
                    HasSubstr("Gemma3ForConditionalGeneration")));
  for (const Json& broken : {Json(), Json::array(), Json::array({1}), Json("LlamaForCausalLM")}) {
    EXPECT_THAT(Error(With(Llama(), "architectures", broken)), HasSubstr("architectures"));
  }
}

TEST(ModelConfig, RefusesWhatItDoesNotImplementByKey) {
  const std::vector<std::pair<const char*, Json>> unsupported = {
      {"hidden_act", "gelu"},
      {"num_experts", 8},
      {"num_local_experts", 8},
      {"attn_output_gate", false},
      {"output_gate_type", "sigmoid"},
      {"layer_types", {"full_attention", "sliding_attention"}},
      {"layer_types", {"full_attention", "chunked_attention"}},
      {"final_logit_softcapping", 30.0},
      {"attn_logit_softcapping", 50.0},
      {"layer_types", {"full_attention", "linear_attention"}},
      {"layer_types", {"full_attention"}},
      {"partial_rotary_factor", 0.5},
      {"rope_scaling", {{"rope_type", "yarn"}, {"factor", 4.0}}}};
  for (const auto& [key, value] : unsupported) {
    EXPECT_THAT(Error(With(Llama(), key, value)), HasSubstr(key));
  }
}

TEST(ModelConfig, EveryMistralLayerSlidesUnlessTheWindowIsNull) {
  Json json = With(Llama(), "architectures", {"MistralForCausalLM"});
  EXPECT_EQ(Parsed(json).layers, std::vector<LayerKind>(2, kSliding));
  EXPECT_EQ(Parsed(json).sliding_window, 4096);
  EXPECT_EQ(Parsed(With(json, "sliding_window", 16)).sliding_window, 16);
  json["layer_types"] = {"sliding_attention", "full_attention"};
  EXPECT_THAT(Error(json), AllOf(HasSubstr("layer_types"), HasSubstr("full_attention")));
  json["layer_types"] = {"full_attention", "full_attention"};
  json["sliding_window"] = nullptr;
  EXPECT_EQ(Parsed(json).layers, std::vector<LayerKind>(2, kFull));
  EXPECT_EQ(Parsed(json).sliding_window, 0);
  EXPECT_THAT(Error(With(json, "sliding_window", 0)), HasSubstr("sliding_window"));
  EXPECT_THAT(Error(With(json, "attention_bias", true)), HasSubstr("attention_bias"));
}

TEST(ModelConfig, UpperQwenLayersSlideIfToldTo) {
  for (const char* architecture : {"Qwen2ForCausalLM", "Qwen3ForCausalLM"}) {
    Json json = With(Llama(), "architectures", Json::array({architecture}));
    json.update({{"use_sliding_window", true}, {"sliding_window", 16}, {"max_window_layers", 1}});
    EXPECT_EQ(Parsed(json).layers, (std::vector{kFull, kSliding}));
    EXPECT_EQ(Parsed(json).sliding_window, 16);
    EXPECT_EQ(Parsed(With(json, "max_window_layers", 2)).layers, (std::vector{kFull, kFull}));
    EXPECT_EQ(Parsed(With(json, "max_window_layers", 0)).layers, (std::vector{kSliding, kSliding}));
    EXPECT_EQ(Parsed(With(json, "sliding_window", nullptr)).layers, (std::vector{kFull, kFull}));
    EXPECT_EQ(Parsed(With(json, "use_sliding_window", false)).layers, (std::vector{kFull, kFull}));
    json["layer_types"] = {"sliding_attention", "full_attention"};
    EXPECT_EQ(Parsed(json).layers, (std::vector{kSliding, kFull}));
    EXPECT_THAT(Error(With(json, "use_sliding_window", false)),
                AllOf(HasSubstr("layer_types"), HasSubstr("sliding_window")));
    EXPECT_THAT(Error(With(json, "max_window_layers", -1)), HasSubstr("max_window_layers"));
  }
}

TEST(ModelConfig, LlamaReadsNoWindow) {
  const ModelConfig config = Parsed(With(Llama(), "sliding_window", 16));
  EXPECT_EQ(config.layers, (std::vector{kFull, kFull}));
  EXPECT_EQ(config.sliding_window, 0);
}

TEST(ModelConfig, GemmaFillsInWhatItsConfigurationLeavesOut) {
  const Json json = {{"architectures", {"Gemma3ForConditionalGeneration"}},
                     {"text_config", {{"num_hidden_layers", 7}, {"sliding_window", 1024}}}};
  const ModelConfig config = Parsed(json);
  EXPECT_EQ(config.family, "gemma3");
  EXPECT_EQ(config.body_prefix, "model.language_model.");
  EXPECT_EQ(config.vocab_size, 262208);
  EXPECT_EQ(config.hidden_size, 2304);
  EXPECT_EQ(config.num_heads, 8);
  EXPECT_EQ(config.num_kv_heads, 4);
  EXPECT_EQ(config.head_dim, 256);
  EXPECT_EQ(config.rope_theta, 1e6);
  EXPECT_EQ(config.local_rope_theta, 1e4);
  EXPECT_EQ(config.rope_factor, 1);
  EXPECT_EQ(config.query_pre_attn_scalar, 256);
  EXPECT_EQ(config.sliding_window, 1024);
  EXPECT_TRUE(config.tied_head);
  std::vector<LayerKind> layers(7, kSliding);
  layers[5] = kFull;
  EXPECT_EQ(config.layers, layers);
}

TEST(ModelConfig, GemmaReadsOldAndNewSpellingsAlike) {
  const Json old_spelling = {{"rope_theta", 5e5},
                             {"rope_local_base_freq", 2e4},
                             {"rope_scaling", {{"rope_type", "linear"}, {"factor", 8.0}}},
                             {"sliding_window_pattern", 2}};
  const Json new_spelling = {
      {"rope_parameters",
       {{"full_attention", {{"rope_type", "linear"}, {"factor", 8.0}, {"rope_theta", 5e5}}},
        {"sliding_attention", {{"rope_type", "default"}, {"rope_theta", 2e4}}}}},
      {"layer_types", {"sliding_attention", "full_attention"}}};
  for (const Json& spelling : {old_spelling, new_spelling}) {
    Json json = Gemma();
    json.update(spelling);
    const ModelConfig config = Parsed(json);
    EXPECT_EQ(config.rope_theta, 5e5);
    EXPECT_EQ(config.local_rope_theta, 2e4);
    EXPECT_EQ(config.rope_factor, 8);
    EXPECT_EQ(config.rotary_dim, config.head_dim);
    EXPECT_EQ(config.layers, (std::vector{kSliding, kFull}));
    EXPECT_EQ(config.body_prefix, "model.");
  }
}

TEST(ModelConfig, GemmaRefusesWhatItDoesNotImplementByKey) {
  const Json scaled = {{"rope_type", "linear"}, {"factor", 8.0}};
  const std::vector<std::pair<const char*, Json>> unsupported = {
      {"final_logit_softcapping", 30.0},
      {"attn_logit_softcapping", 50.0},
      {"hidden_activation", "gelu"},
      {"use_bidirectional_attention", true},
      {"sliding_window", nullptr},
      {"query_pre_attn_scalar", 0},
      {"layer_types", {"linear_attention", "full_attention"}},
      {"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 1e6}}},
      {"rope_parameters", {{"sliding_attention", scaled}}},
      {"rope_parameters", {{"full_attention", "default"}}},
      {"rope_scaling", {{"full_attention", scaled}}}};
  for (const auto& [key, value] : unsupported) {
    EXPECT_THAT(Error(With(Gemma(), key, value)), HasSubstr(key)) << value;
  }
}

TEST(ModelConfig, RefusesValuesThatCannotBeByKey) {
  const std::vector<std::pair<const char*, Json>> wrong = {{"hidden_size", 0},
                                                           {"hidden_size", -64},
                                                           {"hidden_size", 1e18},
                                                           {"hidden_size", int64_t{1} << 40},
                                                           {"hidden_size", "64"},
                                                           {"num_hidden_layers", int64_t{1} << 29},
                                                           {"num_attention_heads", 0},
                                                           {"num_key_value_heads", 0},
                                                           {"head_dim", 0},
                                                           {"rms_norm_eps", -1e-6},
                                                           {"rope_theta", "1e6"},
                                                           {"rope_parameters", "llama3"},
                                                           {"tie_word_embeddings", "yes"},
                                                           {"attention_bias", 1},
                                                           {"hidden_act", 3}};
  for (const auto& [key, value] : wrong) {
    EXPECT_THAT(Error(With(Llama(), key, value)), HasSubstr(key)) << value;
  }
  for (const char* key : {"vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size",
                          "num_attention_heads"}) {
    Json json = Llama();
    json.erase(key);
    EXPECT_THAT(Error(json), HasSubstr(key));
  }
  EXPECT_THAT(Error(With(Llama(), "num_key_value_heads", 3)), HasSubstr("no multiple"));
  Json odd = Hybrid();
  odd["text_config"]["linear_num_value_heads"] = 5;
  EXPECT_THAT(Error(odd), HasSubstr("no multiple"));
  EXPECT_THAT(Error(With(Hybrid(), "text_config", 7)), HasSubstr("text_config"));
}

}  // namespace
}  // namespace prismaquant

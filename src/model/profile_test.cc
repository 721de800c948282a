#include "model/profile.h"

#include <gtest/gtest.h>

#include <string>

namespace prismaquant {
namespace {

TEST(Profile, EveryArchitectureFindsItsProfile) {
  for (const Profile& profile : AllProfiles()) {
    for (const std::string_view name : profile.architectures) {
      EXPECT_EQ(FindProfile(name), &profile) << name;
    }
  }
  EXPECT_EQ(FindProfile("MambaForCausalLM"), nullptr);
}

TEST(Profile, FusedNameJoinsSiblingsByLeaf) {
  const Profile& llama = *FindProfile("LlamaForCausalLM");
  for (const char* leaf : {"q_proj", "k_proj", "v_proj"}) {
    EXPECT_EQ(FusedName(llama, std::string("model.layers.3.self_attn.") + leaf),
              "model.layers.3.self_attn.qkv_proj");
  }
  for (const char* leaf : {"gate_proj", "up_proj"}) {
    EXPECT_EQ(FusedName(llama, std::string("model.layers.3.mlp.") + leaf),
              "model.layers.3.mlp.gate_up_proj");
  }
  EXPECT_EQ(FusedName(llama, "model.layers.3.mlp.down_proj"), "model.layers.3.mlp.down_proj");
  EXPECT_EQ(FusedName(llama, "lm_head"), "lm_head");
}

TEST(Profile, DeltaNetProjectionsFuseInPairs) {
  const Profile& hybrid = *FindProfile("Qwen3_5ForConditionalGeneration");
  const std::string prefix = "model.language_model.layers.0.linear_attn.";
  EXPECT_EQ(FusedName(hybrid, prefix + "in_proj_qkv"), prefix + "in_proj_qkvz");
  EXPECT_EQ(FusedName(hybrid, prefix + "in_proj_z"), prefix + "in_proj_qkvz");
  EXPECT_EQ(FusedName(hybrid, prefix + "in_proj_b"), prefix + "in_proj_ba");
  EXPECT_EQ(FusedName(hybrid, prefix + "in_proj_a"), prefix + "in_proj_ba");
  EXPECT_EQ(FusedName(hybrid, prefix + "out_proj"), prefix + "out_proj");
  EXPECT_EQ(FusedName(*FindProfile("LlamaForCausalLM"), "layers.0.in_proj_z"),
            "layers.0.in_proj_z");
}

TEST(Profile, VllmNamesFollowTheFirstMatchingPrefix) {
  const Profile& hybrid = *FindProfile("Qwen3_5ForConditionalGeneration");
  EXPECT_EQ(VllmName(hybrid, "model.language_model.layers.0.mlp.down_proj"),
            "language_model.model.layers.0.mlp.down_proj");
  EXPECT_EQ(VllmName(hybrid, "lm_head"), "language_model.lm_head");
  EXPECT_EQ(VllmName(hybrid, "model.visual.merger.linear_fc1"), "visual.merger.linear_fc1");
  EXPECT_EQ(VllmName(hybrid, "mtp.fc"), "mtp.fc");
  EXPECT_EQ(VllmName(*FindProfile("Qwen3_5ForCausalLM"), "model.layers.0.mlp.down_proj"),
            "model.layers.0.mlp.down_proj");
  for (const char* text : {"Qwen3ForCausalLM", "Qwen2ForCausalLM", "MistralForCausalLM",
                           "LlamaForCausalLM", "Gemma3ForCausalLM"}) {
    EXPECT_EQ(VllmName(*FindProfile(text), "model.layers.0.mlp.up_proj"),
              "model.layers.0.mlp.up_proj");
  }
}

TEST(Profile, BothSpellingsOfGemmaComeToOneVllmName) {
  const Profile& gemma = *FindProfile("Gemma3ForConditionalGeneration");
  for (const std::string_view prefix : gemma.body_prefixes) {
    EXPECT_EQ(VllmName(gemma, std::string(prefix) + "layers.0.mlp.down_proj"),
              "language_model.model.layers.0.mlp.down_proj");
  }
  EXPECT_EQ(VllmName(gemma, "lm_head"), "language_model.lm_head");
  EXPECT_EQ(VllmName(gemma, "model.vision_tower.a"), "vision_tower.a");
  EXPECT_EQ(VllmName(gemma, "vision_tower.a"), "vision_tower.a");
  EXPECT_EQ(VllmName(gemma, "model.multi_modal_projector.b"), "multi_modal_projector.b");
}

TEST(Profile, AttentionAndMlpProjectionsFuseInEveryFamily) {
  for (const Profile& profile : AllProfiles()) {
    for (const std::string_view prefix : profile.body_prefixes) {
      const std::string layer = std::string(prefix) + "layers.1.";
      EXPECT_EQ(FusedName(profile, layer + "self_attn.k_proj"), layer + "self_attn.qkv_proj");
      EXPECT_EQ(FusedName(profile, layer + "mlp.up_proj"), layer + "mlp.gate_up_proj");
      EXPECT_EQ(FusedName(profile, layer + "self_attn.o_proj"), layer + "self_attn.o_proj");
    }
  }
}

}  // namespace
}  // namespace prismaquant

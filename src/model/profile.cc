#include "model/profile.h"

#include <algorithm>
#include <array>

namespace prismaquant {
namespace {

const std::vector<FusedSet>& AttentionAndMlp() {
  static const std::vector<FusedSet> sets = {{"qkv_proj", {"q_proj", "k_proj", "v_proj"}},
                                             {"gate_up_proj", {"gate_proj", "up_proj"}}};
  return sets;
}

std::vector<Profile> MakeProfiles() {
  std::vector<FusedSet> hybrid = AttentionAndMlp();
  hybrid.push_back({"in_proj_qkvz", {"in_proj_qkv", "in_proj_z"}});
  hybrid.push_back({"in_proj_ba", {"in_proj_b", "in_proj_a"}});
  return {
      {.family = "llama",
       .architectures = {"LlamaForCausalLM"},
       .fused = AttentionAndMlp(),
       .unquantized = {},
       .vllm_names = {}},
      {.family = "mistral",
       .architectures = {"MistralForCausalLM"},
       .fused = AttentionAndMlp(),
       .unquantized = {},
       .vllm_names = {}},
      {.family = "qwen2",
       .architectures = {"Qwen2ForCausalLM"},
       .fused = AttentionAndMlp(),
       .unquantized = {},
       .vllm_names = {}},
      {.family = "qwen3",
       .architectures = {"Qwen3ForCausalLM"},
       .fused = AttentionAndMlp(),
       .unquantized = {},
       .vllm_names = {}},
      {.family = "qwen3_moe",
       .architectures = {"Qwen3MoeForCausalLM"},
       .fused = AttentionAndMlp(),
       .unquantized = {"gate"},
       .vllm_names = {}},
      {.family = "qwen3_5",
       .architectures = {"Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"},
       .fused = hybrid,
       .unquantized = {"in_proj_a", "in_proj_b", "gate", "shared_expert_gate"},
       .vllm_names = {{"model.visual.", "visual."},
                      {"lm_head", "language_model.lm_head"},
                      {"model.language_model.", "language_model.model."}},
       .text_names = {{"model.language_model.", "model."}},
       .body_prefixes = {"model.language_model."},
       .vision = true},
      {.family = "qwen3_5",
       .architectures = {"Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"},
       .fused = hybrid,
       .unquantized = {"in_proj_a", "in_proj_b", "gate", "shared_expert_gate"},
       .vllm_names = {{"model.language_model.", "model."}}},
      {.family = "gemma3",
       .architectures = {"Gemma3ForCausalLM"},
       .fused = AttentionAndMlp(),
       .unquantized = {},
       .vllm_names = {}},
      {.family = "gemma3",
       .architectures = {"Gemma3ForConditionalGeneration"},
       .fused = AttentionAndMlp(),
       .unquantized = {},
       .vllm_names = {{"model.language_model.", "language_model.model."},
                      {"model.vision_tower.", "vision_tower."},
                      {"model.multi_modal_projector.", "multi_modal_projector."},
                      {"lm_head", "language_model.lm_head"}},
       .text_names = {{"language_model.model.", "model.language_model."}},
       .body_prefixes = {"model.language_model.", "language_model.model."}},
  };
}

}  // namespace

std::span<const Profile> AllProfiles() {
  static const std::vector<Profile> profiles = MakeProfiles();
  return profiles;
}

const Profile* FindProfile(std::string_view architecture) {
  for (const Profile& profile : AllProfiles()) {
    const auto& names = profile.architectures;
    if (std::find(names.begin(), names.end(), architecture) != names.end()) return &profile;
  }
  return nullptr;
}

std::string FusedName(const Profile& profile, const std::string& linear) {
  // Experts: vLLM joins all of a layer.
  if (const size_t experts = linear.find(".experts."); experts != std::string::npos) {
    return linear.substr(0, experts) + ".experts";
  }
  const size_t dot = linear.rfind('.');
  const std::string leaf = linear.substr(dot + 1);
  for (const FusedSet& set : profile.fused) {
    if (std::find(set.members.begin(), set.members.end(), leaf) != set.members.end()) {
      return linear.substr(0, dot + 1) + std::string(set.fused);
    }
  }
  return linear;
}

std::string VllmName(const Profile& profile, const std::string& module) {
  for (const PrefixRename& rename : profile.vllm_names) {
    if (module.starts_with(rename.from))
      return std::string(rename.to) + module.substr(rename.from.size());
  }
  return module;
}

}  // namespace prismaquant

#ifndef PRISMAQUANT_MODEL_PROFILE_H_
#define PRISMAQUANT_MODEL_PROFILE_H_

// Profile: what a model family's runtime (vLLM) demands of its Linears, as data: which are fused
// into one at load time and so must share a format and global scales, which must stay unquantized,
// and how module names map to vLLM's. Profiles are constants.

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace prismaquant {

struct FusedSet {
  std::string_view fused;                 // vLLM's name, "qkv_proj"
  std::vector<std::string_view> members;  // leaf names, {"q_proj", "k_proj", "v_proj"}
};

struct PrefixRename {
  std::string_view from, to;
};

struct Profile {
  std::string_view family;                      // "qwen3_5", "llama", "qwen3", ..
  std::vector<std::string_view> architectures;  // values of config.json "architectures"
  std::vector<FusedSet> fused;
  std::vector<std::string_view>
      unquantized;  // leaf names of body Linears that stay in the source's dtype
  std::vector<PrefixRename> vllm_names;  // checkpoint prefix -> vLLM prefix, first match wins
  // checkpoint prefix -> prefix in transformers' text-only class, or in the class that reads an
  // older spelling of the checkpoint, where that class renames modules
  std::vector<PrefixRename> text_names = {};
  // where the body's tensors may stand, the newest spelling first
  std::vector<std::string_view> body_prefixes = {"model."};
  bool vision = false;  // a tower of Qwen's kind under "model.visual."
};

// Null if no profile lists the architecture.
const Profile* FindProfile(std::string_view architecture);
std::span<const Profile> AllProfiles();

// "model.layers.3.self_attn.q_proj" -> "model.layers.3.self_attn.qkv_proj" by the profile's fused
// sets; all experts of a layer -> "model.layers.3.mlp.experts"; the name itself if it is in none.
std::string FusedName(const Profile& profile, const std::string& linear);
// The module name that vLLM gives to a checkpoint's module.
std::string VllmName(const Profile& profile, const std::string& module);

}  // namespace prismaquant

#endif  // PRISMAQUANT_MODEL_PROFILE_H_

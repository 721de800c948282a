#ifndef PRISMAQUANT_EXPORT_MATCHING_H_
#define PRISMAQUANT_EXPORT_MATCHING_H_

// Matching: which config group of a quantization_config each reader gives to a module. The two
// readers differ (docs/checkpoint.md): compressed-tensors, on which transformers builds, ranks
// exact names before patterns before classes; vLLM takes the first target in order, lets a class
// target win over the shards of a fused layer, and never checks that the shards of a fused layer
// agree. VerifyMatching runs both on every Linear under every name it has.

#include <map>
#include <optional>
#include <regex>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/json.h"
#include "base/status.h"
#include "formats/format.h"
#include "model/profile.h"

namespace prismaquant {

struct ConfigGroup {
  std::string name, format;  // "group_0", "nvfp4-pack-quantized"
  Json weights, input_activations;
  std::vector<std::string> targets;
};

// What a quantization_config says about names.
struct ConfigRules {
  std::vector<ConfigGroup> groups;
  std::vector<std::string> ignore;

  // A null config has no rules. `origin` names the file in errors (kInvalidInput).
  static Result<ConfigRules> Parse(const Json& quantization_config, const std::string& origin);
};

// The format that a group describes; null if this program has none such.
const Format* FormatOfGroup(const ConfigGroup& group);

// Immutable and thread-safe.
class NameMatcher {
 public:
  static constexpr int kNone = -1;

  // Fails with kInvalidInput on a pattern that cannot be read.
  static Result<NameMatcher> Create(const ConfigRules& rules);

  // Index into the groups, or kNone, that transformers gives to module `name` of class `type`.
  int TransformersGroup(const std::string& name, const std::string& type) const;
  // The same for vLLM's layer `name` of class `type`, which fuses the modules `shards` (empty:
  // none). Fails with kUnmet if only some of the shards are ignored.
  Result<int> VllmGroup(const std::string& name, const std::vector<std::string>& shards,
                        const std::string& type) const;

 private:
  struct Target {
    std::string text;
    int group = kNone;
    std::optional<std::regex> pattern;  // of "re:..."

    bool Matches(const std::string& name) const;
  };
  static Result<Target> Compile(const std::string& text, int group);
  bool Ignored(const std::string& name) const;
  // First target in order that equals or matches the name.
  int FirstGroup(const std::string& name) const;
  int FirstClassGroup(const std::string& type) const;

  std::vector<Target> targets_;  // as the file orders them
  std::vector<Target> ignore_;
  std::unordered_map<std::string, size_t> first_exact_;  // position in targets_
  std::unordered_map<std::string, int> last_group_;      // of every target's text
};

// Proves that every Linear (module name in the checkpoint -> format as stored; the source's format
// if unquantized) gets the scheme of its format, and an unquantized one none, from transformers and
// from vLLM under every spelling that the profile knows, that fused layers are of one format, and
// that every exact target names a Linear. kUnmet naming reader, module, expected and found format.
Status VerifyMatching(const Json& quantization_config, const Profile& profile,
                      const std::map<std::string, const Format*>& linears);

}  // namespace prismaquant

#endif  // PRISMAQUANT_EXPORT_MATCHING_H_

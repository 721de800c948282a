#ifndef PRISMAQUANT_EXPORT_QUANTIZATION_CONFIG_H_
#define PRISMAQUANT_EXPORT_QUANTIZATION_CONFIG_H_

// The quantization_config of config.json in the compressed-tensors schema (docs/checkpoint.md): one
// group per format with exact module names as targets, and every other Linear in the ignore list.
//
// SchemeLookup simulates how readers look a module up, so that a written configuration can be checked: compressed-tensors
// (and transformers) by the module's own name, vLLM by its own spelling, fused Linears through their members.

#include <map>
#include <regex>
#include <set>
#include <string>
#include <vector>

#include "base/json.h"
#include "base/status.h"
#include "formats/format.h"
#include "model/profile.h"

namespace prismaquant {

// `formats`: every body Linear -> format, in the checkpoint's spelling. `others`: modules of all
// other Linears (vision tower, MTP head). Null if nothing is quantized.
Json BuildQuantizationConfig(const std::map<std::string, const Format*>& formats,
                             const std::vector<std::string>& others);

// Modules other than `linears` that a runtime builds as Linears: rank-2 weights that are no
// embedding table.
struct ModuleShape {
  std::string name;
  size_t rank = 0;
};
std::vector<std::string> OtherLinears(const std::vector<ModuleShape>& weights,
                                      const std::map<std::string, const Format*>& linears);

// Looks modules up in a quantization_config. `profile` renames its exact dotted names to vLLM's spelling first; null keeps the
// checkpoint's. A value; const methods may run concurrently.
class SchemeLookup {
 public:
  SchemeLookup(const Json& config, const Profile* profile);
  // The group ("group_0") of a module; "" if it stays unquantized.
  std::string Resolve(const std::string& module) const;
  // The group of a fused module by vLLM's rules: all members ignored, or the module's own target, or the members' common
  // group. Members that disagree are kUnmet.
  Result<std::string> ResolveFused(const std::string& module, const std::vector<std::string>& members) const;

 private:
  struct Pattern {
    std::regex regex;
    std::string group;
  };
  bool Ignored(const std::string& module) const;
  std::string Target(const std::string& module) const;

  std::set<std::string> ignored_;
  std::vector<std::regex> ignored_patterns_;
  std::map<std::string, std::string> targets_;
  std::vector<Pattern> target_patterns_;
};

// Proves that every Linear of `formats` resolves to its format, and every one of `others` to none,
// under both readers.
Status VerifyConfig(const Json& config, const Profile& profile,
                    const std::map<std::string, const Format*>& formats,
                    const std::vector<std::string>& others);

}  // namespace prismaquant

#endif  // PRISMAQUANT_EXPORT_QUANTIZATION_CONFIG_H_

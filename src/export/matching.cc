#include "export/matching.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <set>

#include "export/quantization_config.h"

namespace prismaquant {
namespace {

constexpr char kPatternPrefix[] = "re:";
constexpr char kOrigin[] = "quantization_config";

Result<std::vector<std::string>> StringList(const Json& object, const std::string& key,
                                            const std::string& origin) {
  std::vector<std::string> list;
  if (!object.contains(key) || object[key].is_null()) return list;
  if (!object[key].is_array()) {
    return Status::InvalidInput(fmt::format("{}: \"{}\" is not a list", origin, key));
  }
  for (const Json& item : object[key]) {
    if (!item.is_string()) {
      return Status::InvalidInput(
          fmt::format("{}: \"{}\" holds {}, expected strings", origin, key, item.type_name()));
    }
    list.push_back(item.get<std::string>());
  }
  return list;
}

Json Get(const Json& object, const char* key) {
  return object.is_object() && object.contains(key) ? object[key] : Json();
}

// Whether two QuantizationArgs select the same kernel; scale_dtype decides only for MX formats.
bool SameArgs(const Json& a, const Json& b) {
  if (a.is_object() != b.is_object()) return false;
  for (const char* key : {"num_bits", "type", "symmetric", "strategy", "group_size", "dynamic"}) {
    if (Get(a, key) != Get(b, key)) return false;
  }
  return (Get(a, "scale_dtype") == "torch.uint8") == (Get(b, "scale_dtype") == "torch.uint8");
}

// How one reader names the modules of a checkpoint.
struct Naming {
  std::string reader;
  bool vllm = false;
  std::vector<PrefixRename> renames;  // first match wins
  bool draft = false;                 // sees the MTP head and the output projection alone

  bool Sees(const std::string& module) const {
    return !draft || module.starts_with("mtp.") || module == "lm_head";
  }

  std::string Rename(const std::string& module) const {
    for (const PrefixRename& rename : renames) {
      if (module.starts_with(rename.from)) {
        return std::string(rename.to) + module.substr(rename.from.size());
      }
    }
    return module;
  }
};

std::vector<Naming> Namings(const Profile& profile) {
  std::vector<Naming> namings = {{"transformers", false, {}}, {"vLLM", true, profile.vllm_names}};
  if (!profile.text_names.empty()) {
    namings.push_back({"transformers (text only)", false, profile.text_names});
    namings.push_back({"vLLM (text only)", true, profile.text_names});
  }
  namings.push_back({"vLLM (MTP draft)", true, {}, true});
  return namings;
}

// vLLM renames dotted exact names in targets and ignore; patterns and names without a dot stay.
std::vector<std::string> RenameEntries(const std::vector<std::string>& entries,
                                       const Naming& naming) {
  std::vector<std::string> renamed;
  for (const std::string& entry : entries) {
    const bool mapped = !entry.starts_with(kPatternPrefix) && entry.find('.') != std::string::npos;
    renamed.push_back(mapped ? naming.Rename(entry) : entry);
  }
  return renamed;
}

ConfigRules RenameRules(ConfigRules rules, const Naming& naming) {
  rules.ignore = RenameEntries(rules.ignore, naming);
  for (ConfigGroup& group : rules.groups) group.targets = RenameEntries(group.targets, naming);
  return rules;
}

// What the name of a fused layer of experts ends with.
constexpr char kExperts[] = ".experts";

bool IsHead(const std::string& module) { return module.ends_with("lm_head"); }

std::string FormatName(const ConfigRules& rules, int group) {
  if (group == NameMatcher::kNone) return "none";
  const ConfigGroup& found = rules.groups[static_cast<size_t>(group)];
  const Format* format = FormatOfGroup(found);
  return format != nullptr ? std::string(format->name())
                           : fmt::format("the unknown scheme of {}", found.name);
}

Status CheckGroup(const std::string& reader, const std::string& module, const Format& expected,
                  const ConfigRules& rules, int group) {
  const std::string found = FormatName(rules, group);
  const bool quantized = !expected.compression_format().empty();
  const std::string wanted = quantized ? std::string(expected.name()) : "none";
  if (found == wanted) return {};
  return Status::Unmet(fmt::format("{}: {} gets scheme {} from {}, expected {}", module, reader,
                                   found, kOrigin, wanted));
}

Status CheckTransformers(const ConfigRules& rules, const Naming& naming,
                         const std::map<std::string, const Format*>& linears) {
  PQ_ASSIGN_OR_RETURN(const NameMatcher matcher, NameMatcher::Create(rules));
  for (const auto& [module, format] : linears) {
    const std::string name = naming.Rename(module);
    PQ_RETURN_IF_ERROR(
        CheckGroup(naming.reader, name, *format, rules, matcher.TransformersGroup(name, "Linear")));
  }
  return {};
}

// The members of a fused layer that the checkpoint holds, with their formats, in the profile's
// order.
std::vector<std::pair<std::string, const Format*>> FusedMembers(
    const Profile& profile, const std::string& fused,
    const std::map<std::string, const Format*>& linears) {
  std::vector<std::pair<std::string, const Format*>> members;
  const size_t leaf = fused.rfind('.') + 1;
  for (const FusedSet& set : profile.fused) {
    if (fused.substr(leaf) != set.fused) continue;
    for (const std::string_view member : set.members) {
      const auto found = linears.find(fused.substr(0, leaf) + std::string(member));
      if (found != linears.end()) members.emplace_back(found->first, found->second);
    }
  }
  return members;
}

// vLLM asks for the first expert's Linears alone, and wants one scheme for the three.
Status CheckExperts(const NameMatcher& matcher, const ConfigRules& rules, const Naming& naming,
                    const std::string& layer, const Format& format) {
  for (const char* projection : {"gate_proj", "up_proj", "down_proj"}) {
    const std::string name = fmt::format("{}.0.{}", naming.Rename(layer), projection);
    PQ_ASSIGN_OR_RETURN(const int group, matcher.VllmGroup(name, {}, "RoutedExperts"));
    PQ_RETURN_IF_ERROR(CheckGroup(naming.reader, name, format, rules, group));
  }
  return {};
}

Status CheckVllm(const ConfigRules& config_rules, const Naming& naming, const Profile& profile,
                 const std::map<std::string, const Format*>& linears) {
  const ConfigRules rules = RenameRules(config_rules, naming);
  PQ_ASSIGN_OR_RETURN(const NameMatcher matcher, NameMatcher::Create(rules));
  std::map<std::string, const Format*> done;
  for (const auto& [module, format] : linears) {
    if (!naming.Sees(module)) continue;
    const std::string layer = FusedName(profile, module);
    const auto [first, fresh] = done.emplace(layer, format);
    if (layer.ends_with(kExperts)) {
      if (first->second != format) {
        return Status::Unmet(fmt::format("{}: is {}, but another expert of {} is {}", module,
                                         format->name(), layer, first->second->name()));
      }
      if (fresh) PQ_RETURN_IF_ERROR(CheckExperts(matcher, rules, naming, layer, *format));
    }
    if (!fresh || layer.ends_with(kExperts)) continue;
    std::vector<std::string> shards;
    for (const auto& [member, member_format] : FusedMembers(profile, layer, linears)) {
      if (member_format != format) {
        return Status::Unmet(fmt::format("{}: is {}, but {} of the same fused layer is {}", member,
                                         member_format->name(), module, format->name()));
      }
      shards.push_back(naming.Rename(member));
    }
    const std::string type = IsHead(module)   ? "ParallelLMHead"
                             : shards.empty() ? "RowParallelLinear"
                                              : "MergedColumnParallelLinear";
    const std::string name = naming.Rename(layer);
    PQ_ASSIGN_OR_RETURN(const int group, matcher.VllmGroup(name, shards, type));
    PQ_RETURN_IF_ERROR(CheckGroup(naming.reader, name, *format, rules, group));
  }
  return {};
}

Status CheckTargets(const ConfigRules& rules, const Profile& profile,
                    const std::map<std::string, const Format*>& linears) {
  std::set<std::string> known;
  for (const auto& [module, format] : linears) {
    for (std::string& name : Spellings(profile, module)) known.insert(std::move(name));
  }
  for (const ConfigGroup& group : rules.groups) {
    for (const std::string& target : group.targets) {
      const bool exact =
          target.find('.') != std::string::npos && !target.starts_with(kPatternPrefix);
      if (exact && known.count(target) == 0) {
        return Status::Unmet(fmt::format("{}: target {} of {} names no Linear of the checkpoint",
                                         kOrigin, target, group.name));
      }
    }
  }
  return {};
}

std::string Lower(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return text;
}

}  // namespace

Result<ConfigRules> ConfigRules::Parse(const Json& quantization_config, const std::string& origin) {
  ConfigRules rules;
  if (quantization_config.is_null()) return rules;
  if (!Get(quantization_config, "config_groups").is_object()) {
    return Status::InvalidInput(origin + ": quantization_config has no config_groups object");
  }
  for (const auto& [name, body] : quantization_config["config_groups"].items()) {
    if (!body.is_object()) {
      return Status::InvalidInput(
          fmt::format("{}: config group {} is not an object", origin, name));
    }
    ConfigGroup group{name, "", Get(body, "weights"), Get(body, "input_activations"), {}};
    Json format = Get(body, "format");
    if (format.is_null()) format = Get(quantization_config, "format");
    if (format.is_string()) group.format = format.get<std::string>();
    PQ_ASSIGN_OR_RETURN(group.targets, StringList(body, "targets", origin + ": " + name));
    rules.groups.push_back(std::move(group));
  }
  PQ_ASSIGN_OR_RETURN(rules.ignore, StringList(quantization_config, "ignore", origin));
  return rules;
}

const Format* FormatOfGroup(const ConfigGroup& group) {
  for (const Format* format : AllFormats()) {
    const Json scheme = format->Scheme();
    if (!scheme.is_null() && group.format == format->compression_format() &&
        SameArgs(group.weights, scheme["weights"]) &&
        SameArgs(group.input_activations, scheme["input_activations"])) {
      return format;
    }
  }
  return nullptr;
}

bool NameMatcher::Target::Matches(const std::string& name) const {
  if (!pattern) return text == name;
  return std::regex_search(name, *pattern, std::regex_constants::match_continuous);
}

Result<NameMatcher::Target> NameMatcher::Compile(const std::string& text, int group) {
  Target target{text, group, std::nullopt};
  if (!text.starts_with(kPatternPrefix)) return target;
  try {
    target.pattern = std::regex(text.substr(sizeof(kPatternPrefix) - 1));
  } catch (const std::regex_error& error) {
    return Status::InvalidInput(
        fmt::format("{}: pattern \"{}\" cannot be read: {}", kOrigin, text, error.what()));
  }
  return target;
}

Result<NameMatcher> NameMatcher::Create(const ConfigRules& rules) {
  NameMatcher matcher;
  for (size_t g = 0; g < rules.groups.size(); ++g) {
    for (const std::string& text : rules.groups[g].targets) {
      PQ_ASSIGN_OR_RETURN(Target target, Compile(text, static_cast<int>(g)));
      matcher.first_exact_.emplace(text, matcher.targets_.size());
      matcher.last_group_[text] = static_cast<int>(g);
      matcher.targets_.push_back(std::move(target));
    }
  }
  for (const std::string& text : rules.ignore) {
    PQ_ASSIGN_OR_RETURN(Target entry, Compile(text, kNone));
    matcher.ignore_.push_back(std::move(entry));
  }
  return matcher;
}

bool NameMatcher::Ignored(const std::string& name) const {
  return std::any_of(ignore_.begin(), ignore_.end(),
                     [&](const Target& entry) { return entry.Matches(name); });
}

int NameMatcher::TransformersGroup(const std::string& name, const std::string& type) const {
  const std::array<std::string, 3> classes = {type, "Module", "object"};
  if (Ignored(name) || std::any_of(classes.begin(), classes.end(), [&](const std::string& c) {
        return std::any_of(ignore_.begin(), ignore_.end(),
                           [&](const Target& entry) { return entry.text == c; });
      })) {
    return kNone;
  }
  if (const auto exact = last_group_.find(name); exact != last_group_.end()) return exact->second;
  const Target* best = nullptr;
  for (const Target& target : targets_) {
    if (target.pattern && target.Matches(name) && (best == nullptr || target.text < best->text)) {
      best = &target;
    }
  }
  if (best != nullptr) return last_group_.at(best->text);
  for (const std::string& c : classes) {
    if (const auto found = last_group_.find(c); found != last_group_.end()) return found->second;
  }
  return kNone;
}

int NameMatcher::FirstGroup(const std::string& name) const {
  const auto exact = first_exact_.find(name);
  const size_t end = exact == first_exact_.end() ? targets_.size() : exact->second;
  for (size_t i = 0; i < end; ++i) {
    if (targets_[i].pattern && targets_[i].Matches(name)) return targets_[i].group;
  }
  return end < targets_.size() ? targets_[end].group : kNone;
}

int NameMatcher::FirstClassGroup(const std::string& type) const {
  const std::string lower = Lower(type);
  for (const Target& target : targets_) {
    const bool inside = !target.pattern && target.text.size() <= type.size() &&
                        lower.find(Lower(target.text)) != std::string::npos;
    if (inside || target.Matches(type)) return target.group;
  }
  return kNone;
}

Result<int> NameMatcher::VllmGroup(const std::string& name, const std::vector<std::string>& shards,
                                   const std::string& type) const {
  const bool named = std::any_of(ignore_.begin(), ignore_.end(),
                                 [&](const Target& entry) { return entry.text == name; });
  if (named || (shards.empty() && Ignored(name))) return kNone;
  const auto ignored = std::count_if(shards.begin(), shards.end(),
                                     [&](const std::string& shard) { return Ignored(shard); });
  if (ignored > 0 && ignored == static_cast<std::ptrdiff_t>(shards.size())) return kNone;
  if (ignored > 0) {
    return Status::Unmet(
        fmt::format("{}: vLLM finds only {} of its {} fused modules ignored, expected all or none",
                    name, ignored, shards.size()));
  }
  if (const int group = FirstGroup(name); group != kNone) return group;
  if (const int group = FirstClassGroup(type); group != kNone) return group;
  int first = kNone;
  for (size_t i = 0; i < shards.size(); ++i) {
    const int group = FirstGroup(shards[i]);
    if (group == kNone) return kNone;
    if (i == 0) first = group;
  }
  return first;
}

Status VerifyMatching(const Json& quantization_config, const Profile& profile,
                      const std::map<std::string, const Format*>& linears) {
  PQ_ASSIGN_OR_RETURN(const ConfigRules rules, ConfigRules::Parse(quantization_config, kOrigin));
  PQ_RETURN_IF_ERROR(CheckTargets(rules, profile, linears));
  for (const Naming& naming : Namings(profile)) {
    PQ_RETURN_IF_ERROR(naming.vllm ? CheckVllm(rules, naming, profile, linears)
                                   : CheckTransformers(rules, naming, linears));
  }
  return {};
}

}  // namespace prismaquant

#include "export/quantization_config.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <string_view>

namespace prismaquant {
namespace {

// The schema version of compressed-tensors that this follows; readers do not act on it.
constexpr char kSchemaVersion[] = "0.20.0";
constexpr char kHeadPattern[] = "re:.*lm_head$";

// Sorted so that layer 2 comes before layer 10.
bool ModelOrder(const std::string& a, const std::string& b) {
  size_t i = 0, j = 0;
  while (i < a.size() && j < b.size()) {
    if (std::isdigit(static_cast<unsigned char>(a[i])) &&
        std::isdigit(static_cast<unsigned char>(b[j]))) {
      size_t i_end = i, j_end = j;
      while (i_end < a.size() && std::isdigit(static_cast<unsigned char>(a[i_end]))) ++i_end;
      while (j_end < b.size() && std::isdigit(static_cast<unsigned char>(b[j_end]))) ++j_end;
      const size_t x = i_end - i, y = j_end - j;
      if (x != y) return x < y;
      if (const int order = a.compare(i, x, b, j, y); order != 0) return order < 0;
      i = i_end;
      j = j_end;
      continue;
    }
    if (a[i] != b[j]) return a[i] < b[j];
    ++i;
    ++j;
  }
  return a.size() - i < b.size() - j;
}

constexpr std::string_view kPatternPrefix = "re:";

// Python's re.match: anchored at the start, not at the end.
bool MatchesStart(const std::regex& regex, const std::string& name) {
  return std::regex_search(name, regex, std::regex_constants::match_continuous);
}

Status Mismatch(const char* reader, const std::string& module, const std::string& expected, const std::string& found) {
  return Status::Unmet(fmt::format("quantization_config: {} resolves {} to {}, expected {}", reader, module,
                                   found.empty() ? "no group" : found, expected.empty() ? "no group" : expected));
}

}  // namespace

Json BuildQuantizationConfig(const std::map<std::string, const Format*>& formats,
                             const std::vector<std::string>& others) {
  std::map<const Format*, std::vector<std::string>> targets;
  std::set<std::string> ignored(others.begin(), others.end());
  for (const auto& [linear, format] : formats) {
    if (format == &SourceFormat()) {
      ignored.insert(linear);
    } else {
      targets[format].push_back(linear);
    }
  }
  if (targets.empty()) return nullptr;
  Json groups = Json::object();
  std::string overall;
  for (const Format* format : AllFormats()) {
    const auto found = targets.find(format);
    if (found == targets.end()) continue;
    std::sort(found->second.begin(), found->second.end(), ModelOrder);
    Json group = format->Scheme();
    group["targets"] = found->second;
    group["output_activations"] = nullptr;
    group["format"] = format->compression_format();
    overall = targets.size() > 1 ? "mixed-precision" : std::string(format->compression_format());
    groups[fmt::format("group_{}", groups.size())] = std::move(group);
  }
  std::vector<std::string> ignore(ignored.begin(), ignored.end());
  std::sort(ignore.begin(), ignore.end(), ModelOrder);
  ignore.insert(ignore.begin(), {"lm_head", kHeadPattern});
  return {{"quant_method", "compressed-tensors"},
          {"version", kSchemaVersion},
          {"format", overall},
          {"quantization_status", "compressed"},
          {"global_compression_ratio", nullptr},
          {"kv_cache_scheme", nullptr},
          {"sparsity_config", Json::object()},
          {"transform_config", Json::object()},
          {"config_groups", std::move(groups)},
          {"ignore", std::move(ignore)}};
}

std::vector<std::string> OtherLinears(const std::vector<ModuleShape>& weights,
                                      const std::map<std::string, const Format*>& linears) {
  std::vector<std::string> others;
  for (const ModuleShape& module : weights) {
    const bool table = module.name.ends_with("embed_tokens") ||
                       module.name.ends_with("pos_embed") || module.name == "lm_head";
    if (module.rank == 2 && !table && !linears.count(module.name)) others.push_back(module.name);
  }
  return others;
}

SchemeLookup::SchemeLookup(const Json& config, const Profile* profile) {
  const auto spelled = [&](const std::string& name) {
    return profile != nullptr && name.find('.') != std::string::npos ? VllmName(*profile, name) : name;
  };
  for (const Json& entry : config.value("ignore", Json::array())) {
    const auto name = entry.get<std::string>();
    if (name.starts_with(kPatternPrefix)) {
      ignored_patterns_.emplace_back(name.substr(kPatternPrefix.size()));
    } else {
      ignored_.insert(spelled(name));
    }
  }
  for (const auto& [group, scheme] : config["config_groups"].items()) {
    for (const Json& target : scheme["targets"]) {
      const auto name = target.get<std::string>();
      if (name.starts_with(kPatternPrefix)) {
        target_patterns_.push_back({std::regex(name.substr(kPatternPrefix.size())), group});
      } else {
        targets_[spelled(name)] = group;
      }
    }
  }
}

bool SchemeLookup::Ignored(const std::string& module) const {
  if (ignored_.count(module) > 0) return true;
  return std::any_of(ignored_patterns_.begin(), ignored_patterns_.end(),
                     [&](const std::regex& regex) { return MatchesStart(regex, module); });
}

std::string SchemeLookup::Target(const std::string& module) const {
  if (const auto exact = targets_.find(module); exact != targets_.end()) return exact->second;
  for (const Pattern& pattern : target_patterns_) {
    if (MatchesStart(pattern.regex, module)) return pattern.group;
  }
  return "";
}

std::string SchemeLookup::Resolve(const std::string& module) const { return Ignored(module) ? "" : Target(module); }

Result<std::string> SchemeLookup::ResolveFused(const std::string& module, const std::vector<std::string>& members) const {
  const bool ignored = Ignored(members.front());
  const std::string first = Target(members.front());
  for (const std::string& member : members) {
    if (Ignored(member) != ignored || (!ignored && Target(member) != first)) {
      return Status::Unmet(fmt::format("quantization_config: the members of {} resolve to different groups", module));
    }
  }
  if (ignored) return std::string();
  const std::string own = Target(module);
  return own.empty() ? first : own;
}

Status VerifyConfig(const Json& config, const Profile& profile, const std::map<std::string, const Format*>& formats,
                    const std::vector<std::string>& others) {
  if (config.is_null()) return {};
  std::map<std::string, std::string> group_of;
  for (const auto& [group, scheme] : config["config_groups"].items()) {
    group_of[scheme["format"].get<std::string>()] = group;
  }
  const SchemeLookup plain(config, nullptr), vllm(config, &profile);
  std::map<std::string, std::vector<std::string>> fused;
  for (const auto& [linear, format] : formats) {
    const std::string expected = format == &SourceFormat() ? "" : group_of[std::string(format->compression_format())];
    if (plain.Resolve(linear) != expected) return Mismatch("compressed-tensors", linear, expected, plain.Resolve(linear));
    fused[FusedName(profile, linear)].push_back(linear);
  }
  for (const auto& [module, linears] : fused) {
    const Format* format = formats.at(linears.front());
    const std::string expected = format == &SourceFormat() ? "" : group_of[std::string(format->compression_format())];
    std::vector<std::string> members;
    for (const std::string& linear : linears) members.push_back(VllmName(profile, linear));
    PQ_ASSIGN_OR_RETURN(const std::string found, vllm.ResolveFused(VllmName(profile, module), members));
    if (found != expected) return Mismatch("vLLM", module, expected, found);
  }
  for (const std::string& module : others) {
    if (!plain.Resolve(module).empty()) return Mismatch("compressed-tensors", module, "", plain.Resolve(module));
    const std::string found = vllm.Resolve(VllmName(profile, module));
    if (!found.empty()) return Mismatch("vLLM", module, "", found);
  }
  return {};
}

}  // namespace prismaquant

#include "export/quantization_config.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <set>
#include <utility>

namespace prismaquant {
namespace {

using ModuleSet = std::set<std::string, ModelOrder>;

bool IsDigit(char c) { return c >= '0' && c <= '9'; }

// The run of digits at the start of `text`, without leading zeros; moves `text` behind it.
std::string_view TakeNumber(std::string_view& text) {
  size_t end = 0;
  while (end < text.size() && IsDigit(text[end])) ++end;
  std::string_view number = text.substr(0, end);
  text.remove_prefix(end);
  number.remove_prefix(std::min(number.find_first_not_of('0'), number.size()));
  return number;
}

constexpr char kHead[] = "lm_head";
constexpr char kExperts[] = ".experts.";
constexpr char kLayers[] = "layers.";

std::string Escaped(std::string_view text) {
  std::string pattern;
  for (const char c : text) pattern += c == '.' ? "\\." : std::string(1, c);
  return pattern;
}

// A module with experts: what stands before the number of its layer, the number, and what stands
// behind it, as in {"model.layers.", "3", ".mlp.experts"}.
struct ExpertLayer {
  std::string prefix, number, rest;
};

ExpertLayer SplitExpertLayer(const std::string& module) {
  const std::string experts = module.substr(0, module.find(kExperts) + sizeof(kExperts) - 2);
  const size_t number = experts.find(kLayers) + sizeof(kLayers) - 1;
  const size_t end = experts.find('.', number);
  return {experts.substr(0, number), experts.substr(number, end - number), experts.substr(end)};
}

// Modules of experts are too many to be listed: one pattern for all layers of a part, which matches
// them under each name that a reader gives them.
std::vector<std::string> ExpertPatterns(const Profile& profile, const ModuleSet& modules) {
  std::map<std::pair<std::string, std::string>, std::vector<std::string>> layers;
  for (const std::string& module : modules) {
    const ExpertLayer layer = SplitExpertLayer(module);
    std::vector<std::string>& numbers = layers[{layer.prefix, layer.rest}];
    if (numbers.empty() || numbers.back() != layer.number) numbers.push_back(layer.number);
  }
  std::vector<std::string> patterns;
  for (const auto& [place, numbers] : layers) {
    std::set<std::string> prefixes = {Escaped(VllmName(profile, place.first))};
    for (const std::string& name : Spellings(profile, place.first)) prefixes.insert(Escaped(name));
    patterns.push_back(fmt::format("re:^(?:{})(?:{}){}\\.[0-9]+\\.(?:gate|up|down)_proj$",
                                   fmt::join(prefixes, "|"), fmt::join(numbers, "|"),
                                   Escaped(place.second)));
  }
  return patterns;
}

// The entries that name these modules.
Json ListEntries(const Profile& profile, const ModuleSet& modules) {
  Json names = Json::array();
  ModuleSet experts;
  for (const std::string& module : modules) {
    if (module.find(kExperts) != std::string::npos) {
      experts.insert(module);
    } else if (module == kHead) {
      names.push_back("re:(?:.*[.])?lm_head$");
    } else {
      for (const std::string& name : Spellings(profile, module)) names.push_back(name);
    }
  }
  for (std::string& pattern : ExpertPatterns(profile, experts)) names.push_back(std::move(pattern));
  return names;
}

Json Group(const Profile& profile, const Format& format, const ModuleSet& modules) {
  Json group = format.Scheme();
  group["format"] = format.compression_format();
  group["targets"] = ListEntries(profile, modules);
  group["output_activations"] = nullptr;
  return group;
}

}  // namespace

bool ModelOrder::operator()(std::string_view a, std::string_view b) const {
  const std::string_view whole_a = a, whole_b = b;
  while (!a.empty() && !b.empty()) {
    if (IsDigit(a[0]) && IsDigit(b[0])) {
      const std::string_view x = TakeNumber(a), y = TakeNumber(b);
      if (x.size() != y.size()) return x.size() < y.size();
      if (x != y) return x < y;
    } else {
      if (a[0] != b[0]) return a[0] < b[0];
      a.remove_prefix(1);
      b.remove_prefix(1);
    }
  }
  if (a.empty() != b.empty()) return a.empty();
  return whole_a < whole_b;
}

std::vector<std::string> Spellings(const Profile& profile, const std::string& module) {
  std::vector<std::string> names = {module};
  for (const PrefixRename& rename : profile.text_names) {
    if (!module.starts_with(rename.from)) continue;
    names.push_back(std::string(rename.to) + module.substr(rename.from.size()));
    break;
  }
  return names;
}

Json BuildQuantizationConfig(const Profile& profile,
                             const std::map<std::string, const Format*>& formats,
                             const std::vector<std::string>& other_linears) {
  std::map<const Format*, ModuleSet> modules;
  ModuleSet unquantized(other_linears.begin(), other_linears.end());
  for (const auto& [name, format] : formats) {
    if (format->compression_format().empty()) {
      unquantized.insert(name);
    } else {
      modules[format].insert(name);
    }
  }
  if (modules.empty()) return nullptr;

  Json groups = Json::object();
  std::set<std::string_view> stored_formats;
  for (const Format* format : AllFormats()) {
    if (modules.count(format) == 0) continue;
    stored_formats.insert(format->compression_format());
    groups[fmt::format("group_{}", groups.size())] = Group(profile, *format, modules[format]);
  }
  const auto head = formats.find(kHead);
  const bool head_stays = head == formats.end() || head->second->compression_format().empty();
  unquantized.erase(kHead);
  Json ignore = ListEntries(profile, unquantized);
  // By name too: a vLLM layer that is named in the list is not looked up in the targets.
  if (head_stays) ignore.insert(ignore.end(), {kHead, "re:.*lm_head$"});
  return {{"quant_method", "compressed-tensors"},
          {"version", "0.20.0"},
          {"format", stored_formats.size() > 1 ? "mixed-precision" : *stored_formats.begin()},
          {"quantization_status", "compressed"},
          {"global_compression_ratio", nullptr},
          {"kv_cache_scheme", nullptr},
          {"sparsity_config", Json::object()},
          {"transform_config", Json::object()},
          {"config_groups", groups},
          {"ignore", ignore}};
}

}  // namespace prismaquant

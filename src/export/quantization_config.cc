#include "export/quantization_config.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>

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

Json ListSpellings(const Profile& profile, const ModuleSet& modules) {
  Json names = Json::array();
  for (const std::string& module : modules) {
    for (const std::string& name : Spellings(profile, module)) names.push_back(name);
  }
  return names;
}

Json Group(const Profile& profile, const Format& format, const ModuleSet& modules) {
  Json group = format.Scheme();
  group["format"] = format.compression_format();
  group["targets"] = ListSpellings(profile, modules);
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
  unquantized.insert("lm_head");
  Json ignore = ListSpellings(profile, unquantized);
  ignore.push_back("re:.*lm_head$");
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

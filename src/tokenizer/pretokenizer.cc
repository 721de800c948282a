#include "tokenizer/pretokenizer.h"

#include <fmt/format.h>

#include <utility>

#include "tokenizer/normalizer.h"

namespace prismaquant {
namespace {

// ByteLevel's own pattern (GPT-2).
constexpr char kByteLevelPattern[] =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

std::string EscapeRegex(const std::string& literal) {
  std::string escaped;
  for (const char c : literal) {
    if (std::string_view(R"(\^$.|?*+()[]{}#- )").find(c) != std::string_view::npos) escaped += '\\';
    escaped += c;
  }
  return escaped;
}

struct Part {
  size_t begin = 0, end = 0;
  bool match = false;
};

// Matches and what lies between them, covering the piece.
std::vector<Part> Cover(const std::vector<std::pair<size_t, size_t>>& matches, size_t size,
                        bool invert) {
  std::vector<Part> parts;
  size_t position = 0;
  for (const auto& [begin, end] : matches) {
    if (begin > position) parts.push_back({position, begin, invert});
    parts.push_back({begin, end, !invert});
    position = end;
  }
  if (position < size) parts.push_back({position, size, invert});
  return parts;
}

}  // namespace

Result<PreTokenizer> PreTokenizer::Parse(const Json& json, const std::string& origin) {
  PreTokenizer pre;
  if (!json.is_null()) PQ_RETURN_IF_ERROR(pre.Add(json, origin));
  return pre;
}

Status PreTokenizer::AddMetaspace(const Json& json, const std::string& origin) {
  if (!steps_.empty() || !space_.empty()) {
    return Status::InvalidInput(origin + ": pre_tokenizer Metaspace is not the first step");
  }
  space_ = json.value("replacement", "\u2581");
  const std::string scheme =
      json.value("prepend_scheme", json.value("add_prefix_space", true) ? "always" : "never");
  prepend_first_ = scheme == "always" || scheme == "first";
  prepend_later_ = scheme == "always";
  if (space_.empty() || (scheme != "never" && !prepend_first_)) {
    return Status::InvalidInput(
        fmt::format("{}: Metaspace with prepend_scheme {} is not supported", origin, scheme));
  }
  if (!json.value("split", true)) return {};
  PQ_ASSIGN_OR_RETURN(Regex regex, Regex::Compile(EscapeRegex(space_), origin));
  steps_.push_back({std::move(regex), Behavior::kMergedWithNext, false});
  return {};
}

std::string PreTokenizer::Prepare(std::string text, bool first) const {
  if (space_.empty() || text.empty()) return text;
  text = ReplaceAll(text, " ", space_);
  if ((first ? prepend_first_ : prepend_later_) && !text.starts_with(space_)) {
    text.insert(0, space_);
  }
  return text;
}

Status PreTokenizer::Add(const Json& json, const std::string& origin) {
  const std::string type = json.is_object() ? json.value("type", "") : "";
  if (type == "Sequence" && json.contains("pretokenizers") && json["pretokenizers"].is_array()) {
    for (const Json& step : json["pretokenizers"]) PQ_RETURN_IF_ERROR(Add(step, origin));
    return {};
  }
  if (byte_level_) {
    return Status::InvalidInput(
        fmt::format("{}: pre_tokenizer {} after ByteLevel is not supported", origin, type));
  }
  if (type == "Split") return AddSplit(json, origin);
  if (type == "Metaspace") return AddMetaspace(json, origin);
  if (type == "Digits") {
    const bool individual = json.value("individual_digits", false);
    PQ_ASSIGN_OR_RETURN(Regex regex, Regex::Compile(individual ? R"(\p{N})" : R"(\p{N}+)", origin));
    steps_.push_back({std::move(regex), Behavior::kIsolated, false});
    return {};
  }
  if (type == "ByteLevel") {
    if (json.value("add_prefix_space", true)) {
      return Status::InvalidInput(
          fmt::format("{}: ByteLevel with add_prefix_space is not supported", origin));
    }
    byte_level_ = true;
    if (!json.value("use_regex", true)) return {};
    PQ_ASSIGN_OR_RETURN(Regex regex, Regex::Compile(kByteLevelPattern, origin));
    steps_.push_back({std::move(regex), Behavior::kIsolated, false});
    return {};
  }
  return Status::InvalidInput(fmt::format("{}: pre_tokenizer {} is not supported", origin,
                                          type.empty() ? json.dump().substr(0, 60) : type));
}

Status PreTokenizer::AddSplit(const Json& json, const std::string& origin) {
  static const std::vector<std::pair<std::string, Behavior>> kBehaviors = {
      {"Isolated", Behavior::kIsolated},
      {"Removed", Behavior::kRemoved},
      {"MergedWithPrevious", Behavior::kMergedWithPrevious},
      {"MergedWithNext", Behavior::kMergedWithNext},
      {"Contiguous", Behavior::kContiguous}};
  const Json pattern = json.value("pattern", Json::object());
  std::string text;
  if (pattern.contains("Regex") && pattern["Regex"].is_string()) {
    text = pattern["Regex"].get<std::string>();
  } else if (pattern.contains("String") && pattern["String"].is_string()) {
    text = EscapeRegex(pattern["String"].get<std::string>());
  } else {
    return Status::InvalidInput(fmt::format("{}: Split without a Regex or String pattern", origin));
  }
  const std::string name = json.value("behavior", "");
  for (const auto& [known, behavior] : kBehaviors) {
    if (known != name) continue;
    PQ_ASSIGN_OR_RETURN(Regex regex, Regex::Compile(text, origin));
    steps_.push_back({std::move(regex), behavior, json.value("invert", false)});
    return {};
  }
  return Status::InvalidInput(
      fmt::format("{}: Split behavior \"{}\" is not supported", origin, name));
}

void PreTokenizer::SplitPiece(const Step& step, std::string_view piece,
                              std::vector<std::string_view>& pieces) {
  std::vector<Part> merged;
  bool previous_match = false;
  const std::vector<Part> parts = Cover(step.regex.FindAll(piece), piece.size(), step.invert);
  for (const Part& part : parts) {
    switch (step.behavior) {
      case Behavior::kIsolated:
        merged.push_back(part);
        break;
      case Behavior::kRemoved:
        if (!part.match) merged.push_back(part);
        break;
      case Behavior::kMergedWithPrevious:
        if (part.match && !previous_match && !merged.empty()) {
          merged.back().end = part.end;
        } else {
          merged.push_back(part);
        }
        break;
      case Behavior::kMergedWithNext:
        if (!merged.empty() && merged.back().match && !part.match) {
          merged.back().end = part.end;
          merged.back().match = false;
        } else {
          merged.push_back(part);
        }
        break;
      case Behavior::kContiguous:
        if (!merged.empty() && merged.back().match == part.match) {
          merged.back().end = part.end;
        } else {
          merged.push_back(part);
        }
        break;
    }
    previous_match = part.match;
  }
  for (const Part& part : merged) pieces.push_back(piece.substr(part.begin, part.end - part.begin));
}

std::vector<std::string_view> PreTokenizer::Split(std::string_view text) const {
  std::vector<std::string_view> pieces;
  if (!text.empty()) pieces.push_back(text);
  for (const Step& step : steps_) {
    std::vector<std::string_view> next;
    for (const std::string_view piece : pieces) SplitPiece(step, piece, next);
    pieces = std::move(next);
  }
  return pieces;
}

}  // namespace prismaquant

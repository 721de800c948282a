#include "tokenizer/normalizer.h"

#include <fmt/format.h>
#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <utility>

namespace prismaquant {
namespace {

bool IsAscii(std::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return static_cast<unsigned char>(c) < 0x80; });
}

std::string Nfc(std::string_view text) {
  if (IsAscii(text)) return std::string(text);
  utf8proc_uint8_t* mapped = nullptr;
  const auto options = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
  const auto size = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                                 static_cast<utf8proc_ssize_t>(text.size()), &mapped, options);
  std::string result(text);
  if (size >= 0) result.assign(reinterpret_cast<const char*>(mapped), static_cast<size_t>(size));
  std::free(mapped);
  return result;
}

}  // namespace

std::string ReplaceAll(std::string_view text, std::string_view from, std::string_view to) {
  std::string result;
  size_t done = 0;
  for (size_t at = text.find(from); at != std::string_view::npos; at = text.find(from, done)) {
    result += text.substr(done, at - done);
    result += to;
    done = at + from.size();
  }
  result += text.substr(done);
  return result;
}

Result<Normalizer> Normalizer::Parse(const Json& json, const std::string& origin) {
  Normalizer normalizer;
  PQ_RETURN_IF_ERROR(normalizer.Add(json, origin));
  return normalizer;
}

Status Normalizer::Add(const Json& json, const std::string& origin) {
  if (json.is_null()) return {};
  const std::string type = json.is_object() ? json.value("type", "") : "";
  if (type == "Sequence" && json.contains("normalizers") && json["normalizers"].is_array()) {
    for (const Json& step : json["normalizers"]) PQ_RETURN_IF_ERROR(Add(step, origin));
    return {};
  }
  if (type == "NFC") {
    steps_.push_back({});
    return {};
  }
  if (type == "Prepend") {
    PQ_ASSIGN_OR_RETURN(std::string prefix, JsonString(json, "prepend", origin));
    steps_.push_back({Kind::kPrepend, "", std::move(prefix)});
    return {};
  }
  if (type == "Replace") {
    const Json pattern = json.value("pattern", Json::object());
    PQ_ASSIGN_OR_RETURN(std::string from, JsonString(pattern, "String", origin + ": Replace"));
    PQ_ASSIGN_OR_RETURN(std::string to, JsonString(json, "content", origin + ": Replace"));
    if (from.empty()) return Status::InvalidInput(origin + ": Replace of an empty string");
    steps_.push_back({Kind::kReplace, std::move(from), std::move(to)});
    return {};
  }
  return Status::InvalidInput(fmt::format(
      "{}: normalizer {} is not supported, known are NFC, Replace and Prepend", origin, type));
}

std::string Normalizer::Apply(std::string_view text) const {
  std::string result(text);
  for (const Step& step : steps_) {
    if (step.kind == Kind::kNfc) result = Nfc(result);
    if (step.kind == Kind::kReplace) result = ReplaceAll(result, step.from, step.to);
    if (step.kind == Kind::kPrepend && !result.empty()) result.insert(0, step.to);
  }
  return result;
}

}  // namespace prismaquant

#include "base/json.h"

#include <fmt/format.h>

#include <set>
#include <vector>

namespace prismaquant {
namespace {

const char* TypeName(const Json& value) { return value.type_name(); }

Status WrongType(const std::string& origin, const std::string& key, const Json& object,
                 const char* expected) {
  if (!object.is_object() || !object.contains(key)) {
    return Status::InvalidInput(
        fmt::format("{}: key \"{}\" is missing, expected {}", origin, key, expected));
  }
  return Status::InvalidInput(fmt::format("{}: key \"{}\" is a {}, expected {}", origin, key,
                                          TypeName(object.at(key)), expected));
}

}  // namespace

Result<Json> ParseJson(std::string_view text, const std::string& origin) {
  std::vector<std::set<std::string>> open;
  std::string duplicate;
  const auto watch_keys = [&](int, Json::parse_event_t event, Json& parsed) {
    if (event == Json::parse_event_t::object_start) open.emplace_back();
    if (event == Json::parse_event_t::object_end) open.pop_back();
    if (event == Json::parse_event_t::key &&
        !open.back().insert(parsed.get<std::string>()).second) {
      duplicate = parsed.get<std::string>();
    }
    return true;
  };
  try {
    Json value = Json::parse(text.begin(), text.end(), watch_keys);
    if (!duplicate.empty()) {
      return Status::InvalidInput(fmt::format("{}: key \"{}\" appears twice", origin, duplicate));
    }
    return value;
  } catch (const Json::exception& error) {
    return Status::InvalidInput(fmt::format("{}: not valid JSON: {}", origin, error.what()));
  }
}

Result<int64_t> JsonInt(const Json& object, const std::string& key, const std::string& origin) {
  if (object.is_object() && object.contains(key) && object.at(key).is_number_integer()) {
    return object.at(key).get<int64_t>();
  }
  return WrongType(origin, key, object, "an integer");
}

Result<double> JsonDouble(const Json& object, const std::string& key, const std::string& origin) {
  if (object.is_object() && object.contains(key) && object.at(key).is_number()) {
    return object.at(key).get<double>();
  }
  return WrongType(origin, key, object, "a number");
}

Result<std::string> JsonString(const Json& object, const std::string& key,
                               const std::string& origin) {
  if (object.is_object() && object.contains(key) && object.at(key).is_string()) {
    return object.at(key).get<std::string>();
  }
  return WrongType(origin, key, object, "a string");
}

Status GuardJson(const std::string& origin, const std::function<Status()>& body) {
  try {
    return body();
  } catch (const Json::exception& error) {
    return Status::InvalidInput(fmt::format("{}: unexpected content: {}", origin, error.what()));
  }
}

}  // namespace prismaquant

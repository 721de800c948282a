#include "base/json.h"

#include <fmt/format.h>

#include <string>
#include <unordered_set>
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

// What is nested deeper is hostile: copying and printing a value recurse.
constexpr size_t kDeepest = 200;

// Notes the first key that an object gives twice, which the library's callback parser could do too
// but in time in the square of an object's size, and ends where values are nested too deep.
class KeyWatcher : public nlohmann::json_sax<Json> {
 public:
  const std::string& duplicate() const { return duplicate_; }
  bool too_deep() const { return depth_ > kDeepest; }

  bool key(std::string& name) override {
    if (!open_.back().insert(name).second && duplicate_.empty()) duplicate_ = name;
    return true;
  }
  bool start_object(std::size_t) override {
    open_.emplace_back();
    return Enter();
  }
  bool end_object() override {
    open_.pop_back();
    return Leave();
  }
  bool start_array(std::size_t) override { return Enter(); }
  bool end_array() override { return Leave(); }
  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(Json::number_integer_t) override { return true; }
  bool number_unsigned(Json::number_unsigned_t) override { return true; }
  bool number_float(Json::number_float_t, const std::string&) override { return true; }
  bool string(std::string&) override { return true; }
  bool binary(Json::binary_t&) override { return true; }
  // Reported by the parse that follows.
  bool parse_error(std::size_t, const std::string&, const nlohmann::detail::exception&) override {
    return false;
  }

 private:
  bool Enter() { return ++depth_ <= kDeepest; }
  bool Leave() {
    --depth_;
    return true;
  }

  size_t depth_ = 0;
  std::vector<std::unordered_set<std::string>> open_;
  std::string duplicate_;
};

}  // namespace

Result<Json> ParseJson(std::string_view text, const std::string& origin) {
  try {
    KeyWatcher watcher;
    Json::sax_parse(text.begin(), text.end(), &watcher);
    if (watcher.too_deep()) {
      return Status::InvalidInput(
          fmt::format("{}: values are nested deeper than {}", origin, kDeepest));
    }
    Json value = Json::parse(text.begin(), text.end());
    if (!watcher.duplicate().empty()) {
      return Status::InvalidInput(
          fmt::format("{}: key \"{}\" appears twice", origin, watcher.duplicate()));
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

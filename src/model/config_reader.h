#ifndef PRISMAQUANT_MODEL_CONFIG_READER_H_
#define PRISMAQUANT_MODEL_CONFIG_READER_H_

// ConfigReader: reads keys of an object of config.json and remembers the first error, so that a
// parser asks for every key first and for the status once. After an error every getter still
// returns a value that further arithmetic can live with. The object must outlive the reader.

#include <fmt/format.h>

#include <cstdint>
#include <string>
#include <utility>

#include "base/json.h"
#include "base/status.h"

namespace prismaquant {

class ConfigReader {
 public:
  ConfigReader(const Json& object, std::string origin)
      : object_(object), origin_(std::move(origin)) {}

  bool Has(const char* key) const {
    return object_.is_object() && object_.contains(key) && !object_[key].is_null();
  }
  bool IsNull(const char* key) const {
    return object_.is_object() && object_.contains(key) && object_[key].is_null();
  }
  int64_t Int(const char* key, int64_t largest = kLargest, int64_t least = 1) {
    const int64_t value = Take(JsonInt(object_, key, origin_), int64_t{1});
    if (value >= least && value <= largest) return value;
    Refuse(fmt::format("{} is {}, expected {} to {}", key, value, least, largest));
    return 1;
  }
  int64_t IntOr(const char* key, int64_t fallback) { return Has(key) ? Int(key) : fallback; }
  double Double(const char* key) {
    const double value = Take(JsonDouble(object_, key, origin_), 1.0);
    if (value > 0 && value <= 1e12) return value;
    Refuse(fmt::format("{} is {}, expected a positive number", key, value));
    return 1;
  }
  double DoubleOr(const char* key, double fallback) { return Has(key) ? Double(key) : fallback; }
  std::string StringOr(const char* key, const char* fallback) {
    return Has(key) ? Take(JsonString(object_, key, origin_), std::string(fallback)) : fallback;
  }
  bool BoolOr(const char* key, bool fallback) {
    if (!Has(key)) return fallback;
    if (object_[key].is_boolean()) return object_[key].get<bool>();
    Refuse(fmt::format("{} is {}, expected true or false", key, object_[key].type_name()));
    return fallback;
  }
  void Refuse(const std::string& what) {
    if (status_.ok()) status_ = Status::InvalidInput(fmt::format("{}: {}", origin_, what));
  }
  void Refuse(const Status& status) {
    if (status_.ok()) status_ = status;
  }
  const Json& object() const { return object_; }
  const std::string& origin() const { return origin_; }
  const Status& status() const { return status_; }

 private:
  // Sizes above this are refused, so that products of two of them fit 64 bits.
  static constexpr int64_t kLargest = int64_t{1} << 30;

  template <typename T>
  T Take(Result<T> result, T fallback) {
    if (result.ok()) return std::move(result).value();
    Refuse(result.status());
    return fallback;
  }

  const Json& object_;
  std::string origin_;
  Status status_;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_MODEL_CONFIG_READER_H_

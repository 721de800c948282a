#ifndef PRISMAQUANT_BASE_JSON_H_
#define PRISMAQUANT_BASE_JSON_H_

// JSON with errors that name the document and the key. Parsing rejects duplicate keys, since a
// reader that keeps the last and one that keeps the first would disagree about the same file.

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "base/status.h"

namespace prismaquant {

using Json = nlohmann::json;

// Parses `text`; `origin` (a file name) goes into the error message.
Result<Json> ParseJson(std::string_view text, const std::string& origin);

// Typed lookups of a key in an object. The error names origin, key, found and expected type.
Result<int64_t> JsonInt(const Json& object, const std::string& key, const std::string& origin);
Result<double> JsonDouble(const Json& object, const std::string& key, const std::string& origin);
Result<std::string> JsonString(const Json& object, const std::string& key,
                               const std::string& origin);

// Runs `body`, which reads a document with nlohmann's own accessors; what they throw (a value of
// another type than expected) becomes kInvalidInput that names `origin`.
Status GuardJson(const std::string& origin, const std::function<Status()>& body);

}  // namespace prismaquant

#endif  // PRISMAQUANT_BASE_JSON_H_

#ifndef PRISMAQUANT_BASE_STATUS_H_
#define PRISMAQUANT_BASE_STATUS_H_

// Status: how every fallible function of PrismaQuant reports failure, and which exit code the
// failure ends the program with. Result<T> is a value or a Status. Neither throws; both are values
// and as thread-safe as an int.
//
// A message is one line that names the file, the tensor or the option, what was found and what was
// expected.

#include <optional>
#include <string>
#include <utility>

namespace prismaquant {

enum class StatusCode {
  kOk = 0,
  kUnmet = 1,          // the request cannot be met: infeasible budget, failed verification
  kInvalidInput = 2,   // bad usage or bad input
  kSystem = 3,         // the system failed: disk full, out of memory
  kInterrupted = 130,  // a signal asked to stop; as shells report SIGINT
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  static Status Unmet(std::string message) { return {StatusCode::kUnmet, std::move(message)}; }
  static Status InvalidInput(std::string message) {
    return {StatusCode::kInvalidInput, std::move(message)};
  }
  static Status System(std::string message) { return {StatusCode::kSystem, std::move(message)}; }
  static Status Interrupted(std::string message) {
    return {StatusCode::kInterrupted, std::move(message)};
  }

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }
  // The process exit code that this status stands for.
  int exit_code() const { return static_cast<int>(code_); }

 private:
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}          // NOLINT(google-explicit-constructor)
  Result(Status status) : status_(std::move(status)) {}  // NOLINT(google-explicit-constructor)

  bool ok() const { return status_.ok(); }
  const Status& status() const { return status_; }
  // Require ok().
  T& value() & { return *value_; }
  const T& value() const& { return *value_; }
  T&& value() && { return std::move(*value_); }
  T& operator*() { return *value_; }
  const T& operator*() const { return *value_; }
  T* operator->() { return &*value_; }
  const T* operator->() const { return &*value_; }

 private:
  Status status_;
  std::optional<T> value_;
};

#define PQ_CONCAT_INNER(a, b) a##b
#define PQ_CONCAT(a, b) PQ_CONCAT_INNER(a, b)
#define PQ_RETURN_IF_ERROR(expression)                                                     \
  do {                                                                                     \
    if (::prismaquant::Status pq_status = (expression); !pq_status.ok()) return pq_status; \
  } while (false)
#define PQ_ASSIGN_OR_RETURN(target, expression) \
  PQ_ASSIGN_OR_RETURN_IMPL(PQ_CONCAT(pq_result_, __LINE__), target, expression)
#define PQ_ASSIGN_OR_RETURN_IMPL(result, target, expression) \
  auto result = (expression);                                \
  if (!result.ok()) return result.status();                  \
  target = std::move(result).value()

}  // namespace prismaquant

#endif  // PRISMAQUANT_BASE_STATUS_H_

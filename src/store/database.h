#ifndef PRISMAQUANT_STORE_DATABASE_H_
#define PRISMAQUANT_STORE_DATABASE_H_

// Database: the few SQLite calls that the run store needs, with Status instead of result codes. A
// Database and its Statements belong to one thread. A Statement must not outlive its Database.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

struct sqlite3;
struct sqlite3_stmt;

namespace prismaquant {

class Statement {
 public:
  Statement& Bind(int64_t value);
  Statement& Bind(double value);  // NaN is an error: SQLite would store NULL, which reads as 0
  Statement& Bind(std::string_view value);
  Statement& Bind(std::span<const double> values);  // as a blob of little-endian float64
  // True: a row is ready to be read. False: done. Errors (also those of Bind) are reported here.
  Result<bool> Step();

  int64_t Int(int column) const;
  double Double(int column) const;
  std::string Text(int column) const;
  std::vector<double> Doubles(int column) const;

 private:
  friend class Database;
  struct Finalizer {
    void operator()(sqlite3_stmt* statement) const;
  };
  explicit Statement(sqlite3_stmt* statement) : statement_(statement) {}
  void Note(int code);
  void Refuse(const char* reason);

  std::unique_ptr<sqlite3_stmt, Finalizer> statement_;
  int next_parameter_ = 1;
  Status error_;  // of the first Bind that failed
};

class Database {
 public:
  // Opens or creates; every commit is durable when it returns.
  static Result<Database> Open(const std::filesystem::path& path);

  Status Execute(const std::string& sql);
  Result<Statement> Prepare(const std::string& sql);
  // Runs `body` between BEGIN and COMMIT; rolls back if either fails.
  template <typename Body>
  Status Transaction(Body body) {
    PQ_RETURN_IF_ERROR(Execute("BEGIN IMMEDIATE"));
    Status status = body();
    if (status.ok()) status = Execute("COMMIT");
    if (!status.ok()) {
      const Status ignored = Execute("ROLLBACK");
      (void)ignored;
    }
    return status;
  }

 private:
  struct Closer {
    void operator()(sqlite3* database) const;
  };
  explicit Database(sqlite3* database) : database_(database) {}
  std::unique_ptr<sqlite3, Closer> database_;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_STORE_DATABASE_H_

#include "store/database.h"

#include <fmt/format.h>
#include <sqlite3.h>

#include <cmath>
#include <cstring>

namespace prismaquant {
namespace {

std::string FileName(sqlite3* database) {
  const char* file = sqlite3_db_filename(database, "main");
  return file == nullptr ? "run store" : file;
}

Status SqliteError(sqlite3* database, const std::string& doing) {
  const std::string message =
      fmt::format("{}: {}: {}", FileName(database), doing, sqlite3_errmsg(database));
  const int code = sqlite3_errcode(database) & 0xff;
  const bool damaged = code == SQLITE_NOTADB || code == SQLITE_CORRUPT;
  return damaged ? Status::InvalidInput(message + "; use another --work folder")
                 : Status::System(message);
}

}  // namespace

void Statement::Finalizer::operator()(sqlite3_stmt* statement) const {
  sqlite3_finalize(statement);
}

void Statement::Note(int code) {
  if (code != SQLITE_OK) Refuse(sqlite3_errstr(code));
}

void Statement::Refuse(const char* reason) {
  if (!error_.ok()) return;
  error_ = Status::System(fmt::format("{}: value {} of \"{}\": {}",
                                      FileName(sqlite3_db_handle(statement_.get())),
                                      next_parameter_ - 1, sqlite3_sql(statement_.get()), reason));
}

Statement& Statement::Bind(int64_t value) {
  Note(sqlite3_bind_int64(statement_.get(), next_parameter_++, value));
  return *this;
}

Statement& Statement::Bind(double value) {
  Note(sqlite3_bind_double(statement_.get(), next_parameter_++, value));
  if (std::isnan(value)) Refuse("NaN, expected a number");
  return *this;
}

Statement& Statement::Bind(std::string_view value) {
  Note(sqlite3_bind_text(statement_.get(), next_parameter_++, value.data(),
                         static_cast<int>(value.size()), SQLITE_TRANSIENT));
  return *this;
}

Statement& Statement::Bind(std::span<const double> values) {
  Note(sqlite3_bind_blob64(statement_.get(), next_parameter_++, values.data(), values.size_bytes(),
                           SQLITE_TRANSIENT));
  return *this;
}

Result<bool> Statement::Step() {
  sqlite3* database = sqlite3_db_handle(statement_.get());
  PQ_RETURN_IF_ERROR(error_);
  const int code = sqlite3_step(statement_.get());
  if (code == SQLITE_ROW) return true;
  if (code == SQLITE_DONE) return false;
  return SqliteError(database, "executing a statement");
}

int64_t Statement::Int(int column) const { return sqlite3_column_int64(statement_.get(), column); }

double Statement::Double(int column) const {
  return sqlite3_column_double(statement_.get(), column);
}

std::string Statement::Text(int column) const {
  const auto* text = reinterpret_cast<const char*>(sqlite3_column_text(statement_.get(), column));
  if (text == nullptr) return "";
  return {text, static_cast<size_t>(sqlite3_column_bytes(statement_.get(), column))};
}

std::vector<double> Statement::Doubles(int column) const {
  const void* bytes = sqlite3_column_blob(statement_.get(), column);
  const auto size = static_cast<size_t>(sqlite3_column_bytes(statement_.get(), column));
  std::vector<double> values(size / sizeof(double));
  if (!values.empty()) std::memcpy(values.data(), bytes, values.size() * sizeof(double));
  return values;
}

void Database::Closer::operator()(sqlite3* database) const { sqlite3_close(database); }

Result<Database> Database::Open(const std::filesystem::path& path) {
  sqlite3* handle = nullptr;
  const int code = sqlite3_open(path.c_str(), &handle);
  Database database(handle);
  if (code != SQLITE_OK) {
    return Status::System(fmt::format("{}: {}", path.string(), sqlite3_errmsg(handle)));
  }
  PQ_RETURN_IF_ERROR(database.Execute("PRAGMA synchronous = FULL"));
  return database;
}

Status Database::Execute(const std::string& sql) {
  if (sqlite3_exec(database_.get(), sql.c_str(), nullptr, nullptr, nullptr) != SQLITE_OK) {
    return SqliteError(database_.get(), sql.substr(0, sql.find('\n')));
  }
  return {};
}

Result<Statement> Database::Prepare(const std::string& sql) {
  sqlite3_stmt* statement = nullptr;
  if (sqlite3_prepare_v2(database_.get(), sql.c_str(), static_cast<int>(sql.size()), &statement,
                         nullptr) != SQLITE_OK) {
    return SqliteError(database_.get(), sql);
  }
  return Statement(statement);
}

}  // namespace prismaquant

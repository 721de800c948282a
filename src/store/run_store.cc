#include "store/run_store.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <set>
#include <utility>

namespace prismaquant {
namespace {

constexpr char kDatabaseName[] = "run.sqlite";
constexpr int64_t kSchemaVersion = 4;

// Of each value in a refusal.
constexpr size_t kShownCharacters = 16;
constexpr char kLockName[] = "lock";

constexpr char kSchema[] =
    R"(CREATE TABLE IF NOT EXISTS identity (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS done (stage TEXT, layer INTEGER, PRIMARY KEY (stage, layer));
CREATE TABLE IF NOT EXISTS linear (
  name TEXT PRIMARY KEY, layer INTEGER, weight_amax REAL, input_amax REAL,
  fisher_trace REAL, grad_square REAL, tokens INTEGER);
CREATE TABLE IF NOT EXISTS cost (
  linear TEXT, format TEXT, rounding INTEGER, weight_mse REAL, directional BLOB, squares BLOB,
  PRIMARY KEY (linear, format, rounding));
CREATE TABLE IF NOT EXISTS note (key TEXT PRIMARY KEY, text TEXT NOT NULL);
)";

Status RunToEnd(Statement& statement) {
  PQ_ASSIGN_OR_RETURN(const bool row, statement.Step());
  (void)row;
  return {};
}

Status CheckSchemaVersion(Database& database, const std::filesystem::path& folder) {
  PQ_ASSIGN_OR_RETURN(Statement read, database.Prepare("PRAGMA user_version"));
  PQ_ASSIGN_OR_RETURN(const bool row, read.Step());
  const int64_t version = row ? read.Int(0) : 0;
  if (version != 0 && version != kSchemaVersion) {
    return Status::InvalidInput(
        fmt::format("{}: run store of schema {}, expected {}; use another --work folder",
                    folder.string(), version, kSchemaVersion));
  }
  return {};
}

// A page that a truncation emptied reads as missing rows, not as an error of the query.
Status CheckIntact(Database& database, const std::filesystem::path& folder) {
  PQ_ASSIGN_OR_RETURN(Statement check, database.Prepare("PRAGMA integrity_check(1)"));
  PQ_ASSIGN_OR_RETURN(const bool row, check.Step());
  if (row && check.Text(0) == "ok") return {};
  return Status::InvalidInput(fmt::format("{}: the database is damaged; use another --work folder",
                                          (folder / kDatabaseName).string()));
}

// Whether a folder without a database holds more than a store that was killed while it was made.
bool IsForeign(const std::filesystem::path& folder) {
  std::error_code error;
  if (std::filesystem::exists(folder / kDatabaseName, error)) return false;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    if (entry.path().filename() != kLockName) return true;
  }
  return false;
}

}  // namespace

class RunStore::Lock {
 public:
  static Result<std::shared_ptr<Lock>> Take(const std::filesystem::path& path) {
    const int descriptor = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (descriptor < 0) {
      return Status::System(fmt::format("{}: {}", path.string(), std::strerror(errno)));
    }
    std::shared_ptr<Lock> lock(new Lock(descriptor));
    if (::flock(descriptor, LOCK_EX | LOCK_NB) != 0) {
      return Status::InvalidInput(fmt::format("{}: the run store is in use by another process",
                                              path.parent_path().string()));
    }
    return lock;
  }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;
  ~Lock() { ::close(descriptor_); }

 private:
  explicit Lock(int descriptor) : descriptor_(descriptor) {}
  int descriptor_;
};

RunStore::RunStore(FileSystem& fs, std::filesystem::path folder, std::shared_ptr<Lock> lock,
                   Database database)
    : fs_(&fs),
      folder_(std::move(folder)),
      lock_(std::move(lock)),
      database_(std::move(database)) {}

Result<RunStore> RunStore::Open(FileSystem& fs, const std::filesystem::path& folder) {
  std::error_code error;
  if (std::filesystem::exists(folder, error) && !std::filesystem::is_directory(folder, error)) {
    return Status::InvalidInput(fmt::format("{}: is not a folder", folder.string()));
  }
  if (IsForeign(folder)) {
    return Status::InvalidInput(
        fmt::format("{}: not a run store (no {}) and not empty; --work needs a folder of its own",
                    folder.string(), kDatabaseName));
  }
  PQ_RETURN_IF_ERROR(fs.CreateDirectories(folder));
  PQ_ASSIGN_OR_RETURN(std::shared_ptr<Lock> lock, Lock::Take(folder / kLockName));
  PQ_ASSIGN_OR_RETURN(Database database, Database::Open(folder / kDatabaseName));
  PQ_RETURN_IF_ERROR(CheckSchemaVersion(database, folder));
  PQ_RETURN_IF_ERROR(CheckIntact(database, folder));
  PQ_RETURN_IF_ERROR(database.Execute(kSchema));
  PQ_RETURN_IF_ERROR(database.Execute(fmt::format("PRAGMA user_version = {}", kSchemaVersion)));
  return RunStore(fs, folder, std::move(lock), std::move(database));
}

Result<RunStore> RunStore::OpenExisting(FileSystem& fs, const std::filesystem::path& folder) {
  std::error_code error;
  if (!std::filesystem::exists(folder / kDatabaseName, error)) {
    return Status::InvalidInput(
        fmt::format("{}: no run store here (no {}); run `prismaquant probe` first", folder.string(),
                    kDatabaseName));
  }
  return Open(fs, folder);
}

Result<std::map<std::string, std::string>> RunStore::Identity() {
  PQ_ASSIGN_OR_RETURN(Statement read, database_.Prepare("SELECT key, value FROM identity"));
  std::map<std::string, std::string> identity;
  while (true) {
    PQ_ASSIGN_OR_RETURN(const bool row, read.Step());
    if (!row) return identity;
    identity.emplace(read.Text(0), read.Text(1));
  }
}

Status RunStore::Bind(const std::map<std::string, std::string>& identity) {
  PQ_ASSIGN_OR_RETURN(const auto stored, Identity());
  if (stored.empty()) {
    return database_.Transaction([&]() -> Status {
      for (const auto& [key, value] : identity) {
        PQ_ASSIGN_OR_RETURN(Statement insert,
                            database_.Prepare("INSERT INTO identity VALUES (?, ?)"));
        insert.Bind(key).Bind(value);
        PQ_RETURN_IF_ERROR(RunToEnd(insert));
      }
      return {};
    });
  }
  std::set<std::string> keys;
  for (const auto& [key, value] : stored) keys.insert(key);
  for (const auto& [key, value] : identity) keys.insert(key);
  const auto shown = [](const std::map<std::string, std::string>& values, const std::string& key) {
    const auto found = values.find(key);
    return found == values.end() ? "(none)" : found->second.substr(0, kShownCharacters);
  };
  std::string differences;
  for (const std::string& key : keys) {
    const auto before = stored.find(key), now = identity.find(key);
    if (before != stored.end() && now != identity.end() && before->second == now->second) continue;
    differences += fmt::format("{}{} {} (this run: {})", differences.empty() ? "" : ", ", key,
                               shown(stored, key), shown(identity, key));
  }
  if (differences.empty()) return {};
  return Status::InvalidInput(
      fmt::format("{}: the run store was made with {}; use another --work folder", folder_.string(),
                  differences));
}

Result<bool> RunStore::IsDone(const std::string& stage, int64_t layer) {
  PQ_ASSIGN_OR_RETURN(Statement read,
                      database_.Prepare("SELECT 1 FROM done WHERE stage = ? AND layer = ?"));
  read.Bind(stage).Bind(layer);
  return read.Step();
}

Status RunStore::Commit(const std::string& stage, int64_t layer,
                        const std::vector<LinearStats>& stats,
                        const std::vector<LinearCost>& costs) {
  return database_.Transaction([&]() -> Status {
    for (const LinearStats& s : stats) {
      PQ_ASSIGN_OR_RETURN(
          Statement insert,
          database_.Prepare("INSERT OR REPLACE INTO linear VALUES (?, ?, ?, ?, ?, ?, ?)"));
      insert.Bind(s.name).Bind(s.layer).Bind(s.weight_amax).Bind(s.input_amax).Bind(s.fisher_trace);
      insert.Bind(s.grad_square).Bind(s.tokens);
      PQ_RETURN_IF_ERROR(RunToEnd(insert));
    }
    for (const LinearCost& c : costs) {
      PQ_ASSIGN_OR_RETURN(
          Statement insert,
          database_.Prepare("INSERT OR REPLACE INTO cost VALUES (?, ?, ?, ?, ?, ?)"));
      insert.Bind(c.linear)
          .Bind(c.format)
          .Bind(static_cast<int64_t>(c.rounding))
          .Bind(c.weight_mse)
          .Bind(std::span<const double>(c.directional))
          .Bind(std::span<const double>(c.squares));
      PQ_RETURN_IF_ERROR(RunToEnd(insert));
    }
    PQ_ASSIGN_OR_RETURN(Statement mark,
                        database_.Prepare("INSERT OR REPLACE INTO done VALUES (?, ?)"));
    mark.Bind(stage).Bind(layer);
    return RunToEnd(mark);
  });
}

Status RunStore::Forget(const std::string& stage) {
  PQ_ASSIGN_OR_RETURN(Statement remove, database_.Prepare("DELETE FROM done WHERE stage = ?"));
  remove.Bind(stage);
  return RunToEnd(remove);
}

Result<std::map<std::string, int64_t>> RunStore::Stages() {
  PQ_ASSIGN_OR_RETURN(Statement read,
                      database_.Prepare("SELECT stage, COUNT(*) FROM done GROUP BY stage"));
  std::map<std::string, int64_t> stages;
  while (true) {
    PQ_ASSIGN_OR_RETURN(const bool row, read.Step());
    if (!row) return stages;
    stages[read.Text(0)] = read.Int(1);
  }
}

Result<std::set<std::string>> RunStore::PricedFormats(Rounding rounding) {
  PQ_ASSIGN_OR_RETURN(Statement read,
                      database_.Prepare("SELECT DISTINCT format FROM cost WHERE rounding = ?"));
  read.Bind(static_cast<int64_t>(rounding));
  std::set<std::string> formats;
  while (true) {
    PQ_ASSIGN_OR_RETURN(const bool row, read.Step());
    if (!row) return formats;
    formats.insert(read.Text(0));
  }
}

Result<std::vector<LinearStats>> RunStore::Stats() {
  PQ_ASSIGN_OR_RETURN(
      Statement read,
      database_.Prepare("SELECT name, layer, weight_amax, input_amax, fisher_trace, grad_square, "
                        "tokens FROM linear ORDER BY layer, rowid"));
  std::vector<LinearStats> stats;
  while (true) {
    PQ_ASSIGN_OR_RETURN(const bool row, read.Step());
    if (!row) return stats;
    stats.push_back({.name = read.Text(0),
                     .layer = read.Int(1),
                     .weight_amax = read.Double(2),
                     .input_amax = read.Double(3),
                     .fisher_trace = read.Double(4),
                     .grad_square = read.Double(5),
                     .tokens = read.Int(6)});
  }
}

Result<std::map<std::string, std::map<std::string, LinearCost>>> RunStore::Costs(
    Rounding rounding) {
  PQ_ASSIGN_OR_RETURN(
      Statement read,
      database_.Prepare(
          "SELECT linear, format, weight_mse, directional, squares FROM cost WHERE rounding = ?"));
  read.Bind(static_cast<int64_t>(rounding));
  std::map<std::string, std::map<std::string, LinearCost>> costs;
  while (true) {
    PQ_ASSIGN_OR_RETURN(const bool row, read.Step());
    if (!row) return costs;
    LinearCost cost{.linear = read.Text(0),
                    .format = read.Text(1),
                    .rounding = rounding,
                    .weight_mse = read.Double(2),
                    .directional = read.Doubles(3),
                    .squares = read.Doubles(4)};
    costs[cost.linear][cost.format] = cost;
  }
}

Status RunStore::PutNote(const std::string& key, const std::string& text) {
  PQ_ASSIGN_OR_RETURN(Statement insert,
                      database_.Prepare("INSERT OR REPLACE INTO note VALUES (?, ?)"));
  insert.Bind(key).Bind(text);
  return RunToEnd(insert);
}

Result<std::optional<std::string>> RunStore::Note(const std::string& key) {
  PQ_ASSIGN_OR_RETURN(Statement read, database_.Prepare("SELECT text FROM note WHERE key = ?"));
  read.Bind(key);
  PQ_ASSIGN_OR_RETURN(const bool row, read.Step());
  if (!row) return std::optional<std::string>();
  return std::optional<std::string>(read.Text(0));
}

std::filesystem::path RunStore::BlobPath(const std::string& name) const {
  return folder_ / (name + ".safetensors");
}

Status RunStore::PutBlob(const std::string& name, const std::vector<BlobTensor>& tensors) {
  const std::filesystem::path path = BlobPath(name);
  const std::filesystem::path partial = path.string() + ".partial";
  PQ_RETURN_IF_ERROR(fs_->CreateDirectories(path.parent_path()));
  std::vector<TensorSpec> specs;
  int64_t bytes = 0;
  for (const BlobTensor& tensor : tensors) {
    specs.push_back(tensor.spec);
    bytes += tensor.spec.bytes();
  }
  PQ_RETURN_IF_ERROR(fs_->RemoveAll(partial));  // of a killed write
  PQ_RETURN_IF_ERROR(RequireRoom(*fs_, path.parent_path(), bytes));
  PQ_ASSIGN_OR_RETURN(SafetensorsWriter writer,
                      SafetensorsWriter::Create(*fs_, partial, specs, {}));
  for (const BlobTensor& tensor : tensors) PQ_RETURN_IF_ERROR(writer.Append(tensor.bytes));
  PQ_RETURN_IF_ERROR(writer.Close());
  PQ_RETURN_IF_ERROR(fs_->Rename(partial, path));
  return fs_->SyncDirectory(path.parent_path());
}

bool RunStore::HasBlob(const std::string& name) const {
  std::error_code error;
  return std::filesystem::exists(BlobPath(name), error);
}

Result<SafetensorsFile> RunStore::Blob(const std::string& name) const {
  return SafetensorsFile::Open(BlobPath(name));
}

Status RunStore::RemoveBlob(const std::string& name) { return fs_->RemoveAll(BlobPath(name)); }

Status RunStore::RemoveBlobs(const std::string& folder) { return fs_->RemoveAll(folder_ / folder); }

}  // namespace prismaquant

#ifndef PRISMAQUANT_IO_FAULTY_FILE_SYSTEM_H_
#define PRISMAQUANT_IO_FAULTY_FILE_SYSTEM_H_

// FaultyFileSystem: passes everything on to another file system and fails where a test says: the
// n-th operation, every operation from the n-th on (a machine that stops), or a write past a number
// of bytes (a full disk). A failed operation has no effect, except that a write on a full disk
// keeps what still fits, as a real one does. Used by tests only. Belongs to one thread and must
// outlive its files.

#include <cstdint>
#include <filesystem>
#include <limits>
#include <memory>
#include <string>

#include "base/status.h"
#include "io/file_system.h"

namespace prismaquant {

class FaultyFileSystem : public FileSystem {
 public:
  explicit FaultyFileSystem(FileSystem& base = FileSystem::Default()) : base_(base) {}

  // Operations are counted from 0: each call of FileSystem, WritableFile::Append and Close is one.
  // The n-th fails with "Input/output error".
  void FailAt(int64_t n) { first_ = last_ = n; }
  // As FailAt, for the n-th and all after it.
  void FailFrom(int64_t n);
  // Once `bytes` were appended, to all files together, Append fails with "No space left on device".
  void LimitBytes(int64_t bytes) { room_ = bytes; }
  // What FreeBytes says from now on.
  void ReportFree(int64_t bytes) { free_ = bytes; }
  // Number of operations so far, failed ones included.
  int64_t operations() const { return operations_; }

  Result<std::unique_ptr<WritableFile>> Create(const std::filesystem::path& path) override;
  Status CreateDirectories(const std::filesystem::path& path) override;
  Status Rename(const std::filesystem::path& from, const std::filesystem::path& to) override;
  Status RemoveAll(const std::filesystem::path& path) override;
  Status SyncDirectory(const std::filesystem::path& path) override;
  int64_t FreeBytes(const std::filesystem::path&) override { return free_; }

 private:
  class File;
  // Counts one operation and fails it if it is to fail.
  Status Count(const std::filesystem::path& path, const char* doing);

  static constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
  FileSystem& base_;
  int64_t operations_ = 0;
  int64_t first_ = kNever, last_ = kNever;
  int64_t room_ = kNever;
  int64_t free_ = kNever;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_IO_FAULTY_FILE_SYSTEM_H_

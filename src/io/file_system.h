#ifndef PRISMAQUANT_IO_FILE_SYSTEM_H_
#define PRISMAQUANT_IO_FILE_SYSTEM_H_

// FileSystem: every write of the program goes through this interface, so that tests can make any of
// them fail (FaultyFileSystem) and see that nothing is lost or half-written. Reads of large files
// are memory-mapped.
//
// The default file system is stateless and thread-safe. A WritableFile belongs to one thread.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "base/status.h"

namespace prismaquant {

class WritableFile {
 public:
  virtual ~WritableFile() = default;
  virtual Status Append(std::span<const std::byte> bytes) = 0;
  // Flushes to the device (fsync) and closes. Required: a file dropped without Close may lose data.
  virtual Status Close() = 0;
};

class FileSystem {
 public:
  virtual ~FileSystem() = default;
  // The operating system's files.
  static FileSystem& Default();

  // Creates or truncates.
  virtual Result<std::unique_ptr<WritableFile>> Create(const std::filesystem::path& path) = 0;
  virtual Status CreateDirectories(const std::filesystem::path& path) = 0;
  virtual Status Rename(const std::filesystem::path& from, const std::filesystem::path& to) = 0;
  virtual Status RemoveAll(const std::filesystem::path& path) = 0;
  // Makes renames and creations inside the folder durable.
  virtual Status SyncDirectory(const std::filesystem::path& path) = 0;
  // What can still be written where the folder `path` lies or will lie; the largest number if the
  // system does not say.
  virtual int64_t FreeBytes(const std::filesystem::path& path) = 0;
};

// "model/" is the folder "model": without the separators at its end.
std::filesystem::path WithoutSeparator(const std::filesystem::path& path);

// The nearest folder at or above `path` that exists; of an empty path the working folder.
std::filesystem::path ExistingFolder(const std::filesystem::path& path);

// kSystem, saying how much is missing, if the folder has no room for `bytes` more.
Status RequireRoom(FileSystem& fs, const std::filesystem::path& folder, int64_t bytes);

// Writes `contents` beside `path`, syncs, and renames over it: afterwards `path` holds the old or
// the new contents, and nothing lies beside it.
Status WriteFileAtomically(FileSystem& fs, const std::filesystem::path& path,
                           std::string_view contents);
// The whole file. A missing, unreadable or irregular file is kInvalidInput, a failing read kSystem.
Result<std::string> ReadFile(const std::filesystem::path& path);

// A read-only memory mapping of a whole file. Move-only.
class MappedFile {
 public:
  static Result<MappedFile> Open(const std::filesystem::path& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  // Hints that the range will be read soon (read-ahead), or is no longer needed.
  void WillNeed(std::span<const std::byte> range) const;
  void DontNeed(std::span<const std::byte> range) const;

 private:
  MappedFile() = default;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_IO_FILE_SYSTEM_H_

#ifndef PRISMAQUANT_BENCH_SHAPE_SPARSE_FILE_SYSTEM_H_
#define PRISMAQUANT_BENCH_SHAPE_SPARSE_FILE_SYSTEM_H_

// SparseFileSystem: the default file system, but that zeros given by Zeros become holes, which take
// no room: checkpoints of any size, for what reads no weights.

#include <filesystem>
#include <memory>
#include <span>

#include "io/file_system.h"

namespace prismaquant {

class SparseFileSystem : public FileSystem {
 public:
  // At most as many as wanted; to be handed to Append as they are.
  static std::span<const std::byte> Zeros(int64_t wanted);

  Result<std::unique_ptr<WritableFile>> Create(const std::filesystem::path& path) override;
  Status CreateDirectories(const std::filesystem::path& path) override {
    return base_.CreateDirectories(path);
  }
  Status Rename(const std::filesystem::path& from, const std::filesystem::path& to) override {
    return base_.Rename(from, to);
  }
  Status RemoveAll(const std::filesystem::path& path) override { return base_.RemoveAll(path); }
  Status SyncDirectory(const std::filesystem::path& path) override {
    return base_.SyncDirectory(path);
  }
  int64_t FreeBytes(const std::filesystem::path&) override;

 private:
  FileSystem& base_ = FileSystem::Default();
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_BENCH_SHAPE_SPARSE_FILE_SYSTEM_H_

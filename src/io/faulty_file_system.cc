#include "io/faulty_file_system.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

namespace prismaquant {
namespace {

Status Failure(const std::filesystem::path& path, const char* doing, int error) {
  return Status::System(fmt::format("{}: {}: {}", path.string(), doing, std::strerror(error)));
}

}  // namespace

class FaultyFileSystem::File : public WritableFile {
 public:
  File(FaultyFileSystem& fs, std::filesystem::path path, std::unique_ptr<WritableFile> base)
      : fs_(fs), path_(std::move(path)), base_(std::move(base)) {}

  Status Append(std::span<const std::byte> bytes) override {
    PQ_RETURN_IF_ERROR(fs_.Count(path_, "writing"));
    const int64_t fitting = std::min(static_cast<int64_t>(bytes.size()), fs_.room_);
    if (fs_.room_ != kNever) fs_.room_ -= fitting;
    PQ_RETURN_IF_ERROR(base_->Append(bytes.first(static_cast<size_t>(fitting))));
    return static_cast<size_t>(fitting) == bytes.size() ? Status()
                                                        : Failure(path_, "writing", ENOSPC);
  }
  Status Close() override {
    PQ_RETURN_IF_ERROR(fs_.Count(path_, "syncing"));
    return base_->Close();
  }

 private:
  FaultyFileSystem& fs_;
  std::filesystem::path path_;
  std::unique_ptr<WritableFile> base_;
};

void FaultyFileSystem::FailFrom(int64_t n) {
  first_ = n;
  last_ = kNever;
}

Status FaultyFileSystem::Count(const std::filesystem::path& path, const char* doing) {
  const int64_t operation = operations_++;
  return first_ <= operation && operation <= last_ ? Failure(path, doing, EIO) : Status();
}

Result<std::unique_ptr<WritableFile>> FaultyFileSystem::Create(const std::filesystem::path& path) {
  PQ_RETURN_IF_ERROR(Count(path, "creating"));
  PQ_ASSIGN_OR_RETURN(std::unique_ptr<WritableFile> file, base_.Create(path));
  return std::unique_ptr<WritableFile>(std::make_unique<File>(*this, path, std::move(file)));
}

Status FaultyFileSystem::CreateDirectories(const std::filesystem::path& path) {
  PQ_RETURN_IF_ERROR(Count(path, "creating the folder"));
  return base_.CreateDirectories(path);
}

Status FaultyFileSystem::Rename(const std::filesystem::path& from,
                                const std::filesystem::path& to) {
  PQ_RETURN_IF_ERROR(Count(to, "renaming into place"));
  return base_.Rename(from, to);
}

Status FaultyFileSystem::RemoveAll(const std::filesystem::path& path) {
  PQ_RETURN_IF_ERROR(Count(path, "removing"));
  return base_.RemoveAll(path);
}

Status FaultyFileSystem::SyncDirectory(const std::filesystem::path& path) {
  PQ_RETURN_IF_ERROR(Count(path, "syncing the folder"));
  return base_.SyncDirectory(path);
}

}  // namespace prismaquant

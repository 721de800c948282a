#include "io/file_system.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <utility>
#include <vector>

namespace prismaquant {
namespace {

namespace stdfs = std::filesystem;

constexpr size_t kBufferBytes = 1 << 20;

Status SystemError(const stdfs::path& path, const char* doing, int error) {
  return Status::System(fmt::format("{}: {}: {}", path.string(), doing, std::strerror(error)));
}

class PosixWritableFile : public WritableFile {
 public:
  PosixWritableFile(stdfs::path path, int descriptor)
      : path_(std::move(path)), descriptor_(descriptor) {
    buffer_.reserve(kBufferBytes);
  }
  ~PosixWritableFile() override {
    if (descriptor_ >= 0) ::close(descriptor_);
  }

  Status Append(std::span<const std::byte> bytes) override {
    if (buffer_.size() + bytes.size() > kBufferBytes) PQ_RETURN_IF_ERROR(Flush());
    if (bytes.size() >= kBufferBytes) return WriteAll(bytes);
    buffer_.insert(buffer_.end(), bytes.begin(), bytes.end());
    return {};
  }

  Status Close() override {
    PQ_RETURN_IF_ERROR(Flush());
    if (::fsync(descriptor_) != 0) return SystemError(path_, "syncing", errno);
    const int descriptor = std::exchange(descriptor_, -1);
    if (::close(descriptor) != 0) return SystemError(path_, "closing", errno);
    return {};
  }

 private:
  Status Flush() {
    PQ_RETURN_IF_ERROR(WriteAll(buffer_));
    buffer_.clear();
    return {};
  }
  Status WriteAll(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
      const ssize_t written = ::write(descriptor_, bytes.data(), bytes.size());
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) return SystemError(path_, "writing", errno);
      bytes = bytes.subspan(static_cast<size_t>(written));
    }
    return {};
  }

  stdfs::path path_;
  int descriptor_;
  std::vector<std::byte> buffer_;
};

class PosixFileSystem : public FileSystem {
 public:
  Result<std::unique_ptr<WritableFile>> Create(const stdfs::path& path) override {
    const int descriptor = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (descriptor < 0) return SystemError(path, "creating", errno);
    return std::unique_ptr<WritableFile>(std::make_unique<PosixWritableFile>(path, descriptor));
  }
  Status CreateDirectories(const stdfs::path& path) override {
    std::error_code error;
    stdfs::create_directories(path, error);
    return error ? SystemError(path, "creating the folder", error.value()) : Status();
  }
  Status Rename(const stdfs::path& from, const stdfs::path& to) override {
    return ::rename(from.c_str(), to.c_str()) == 0 ? Status()
                                                   : SystemError(to, "renaming into place", errno);
  }
  Status RemoveAll(const stdfs::path& path) override {
    std::error_code error;
    stdfs::remove_all(path, error);
    return error ? SystemError(path, "removing", error.value()) : Status();
  }
  Status SyncDirectory(const stdfs::path& path) override {
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (descriptor < 0) return SystemError(path, "opening the folder", errno);
    const int code = ::fsync(descriptor);
    const int error = errno;
    ::close(descriptor);
    return code == 0 ? Status() : SystemError(path, "syncing the folder", error);
  }
};

std::span<const std::byte> PageAligned(std::span<const std::byte> range) {
  static const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(range.data());
  const uintptr_t aligned = begin / page * page;
  return {range.data() - (begin - aligned), range.size() + (begin - aligned)};
}

}  // namespace

FileSystem& FileSystem::Default() {
  static PosixFileSystem file_system;
  return file_system;
}

Status WriteFileAtomically(FileSystem& fs, const stdfs::path& path, std::string_view contents) {
  const stdfs::path partial = path.string() + ".partial";
  PQ_ASSIGN_OR_RETURN(std::unique_ptr<WritableFile> file, fs.Create(partial));
  PQ_RETURN_IF_ERROR(file->Append(std::as_bytes(std::span(contents))));
  PQ_RETURN_IF_ERROR(file->Close());
  PQ_RETURN_IF_ERROR(fs.Rename(partial, path));
  return fs.SyncDirectory(path.parent_path().empty() ? "." : path.parent_path());
}

Result<std::string> ReadFile(const stdfs::path& path) {
  std::error_code error;
  if (!stdfs::is_regular_file(path, error)) {
    return Status::InvalidInput(fmt::format("{}: no such file", path.string()));
  }
  std::ifstream stream(path, std::ios::binary);
  std::string contents((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
  if (!stream.is_open() || stream.bad()) {
    return Status::InvalidInput(fmt::format("{}: cannot be read", path.string()));
  }
  return contents;
}

Result<MappedFile> MappedFile::Open(const stdfs::path& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) {
    return Status::InvalidInput(
        fmt::format("{}: opening: {}", path.string(), std::strerror(errno)));
  }
  struct stat info {};
  if (::fstat(descriptor, &info) != 0 || !S_ISREG(info.st_mode)) {
    ::close(descriptor);
    return Status::InvalidInput(fmt::format("{}: not a regular file", path.string()));
  }
  MappedFile file;
  file.size_ = static_cast<size_t>(info.st_size);
  if (file.size_ > 0) {
    void* data = ::mmap(nullptr, file.size_, PROT_READ, MAP_PRIVATE, descriptor, 0);
    if (data == MAP_FAILED) {
      const int error = errno;
      ::close(descriptor);
      return SystemError(path, "mapping", error);
    }
    file.data_ = static_cast<const std::byte*>(data);
  }
  ::close(descriptor);
  return file;
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

void MappedFile::WillNeed(std::span<const std::byte> range) const {
  const auto aligned = PageAligned(range);
  ::madvise(const_cast<std::byte*>(aligned.data()), aligned.size(), MADV_WILLNEED);
}

void MappedFile::DontNeed(std::span<const std::byte> range) const {
  const auto aligned = PageAligned(range);
  ::madvise(const_cast<std::byte*>(aligned.data()), aligned.size(), MADV_DONTNEED);
}

}  // namespace prismaquant

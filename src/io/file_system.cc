#include "io/file_system.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "base/progress.h"

namespace prismaquant {
namespace {

namespace stdfs = std::filesystem;

constexpr size_t kBufferBytes = 1 << 20;
constexpr size_t kReadBytes = 1 << 16;

Status SystemError(const stdfs::path& path, const char* doing, int error) {
  return Status::System(fmt::format("{}: {}: {}", path.string(), doing, std::strerror(error)));
}

// A path that the user got wrong, as opposed to a machine that fails.
bool IsWrongPath(int error) {
  return error == ENOENT || error == ENOTDIR || error == EACCES || error == EISDIR ||
         error == ELOOP || error == ENAMETOOLONG;
}

// An open descriptor that is closed with the object.
class Descriptor {
 public:
  explicit Descriptor(int value) : value_(value) {}
  Descriptor(Descriptor&& other) noexcept : value_(std::exchange(other.value_, -1)) {}
  Descriptor& operator=(Descriptor&&) = delete;
  ~Descriptor() {
    if (value_ >= 0) ::close(value_);
  }
  int get() const { return value_; }

 private:
  int value_;
};

struct InputFile {
  Descriptor descriptor;
  size_t size;
};

// Opens an existing regular file for reading.
Result<InputFile> OpenInput(const stdfs::path& path) {
  Descriptor descriptor(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (descriptor.get() < 0) {
    const int error = errno;
    if (error == ENOENT) {
      return Status::InvalidInput(fmt::format("{}: no such file", path.string()));
    }
    const Status status = SystemError(path, "opening", error);
    return IsWrongPath(error) ? Status::InvalidInput(status.message()) : status;
  }
  struct stat info {};
  if (::fstat(descriptor.get(), &info) != 0) return SystemError(path, "inspecting", errno);
  if (!S_ISREG(info.st_mode)) {
    return Status::InvalidInput(fmt::format("{}: not a regular file", path.string()));
  }
  return InputFile{std::move(descriptor), static_cast<size_t>(info.st_size)};
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
      if (written <= 0) return SystemError(path_, "writing", written < 0 ? errno : EIO);
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
    // EINVAL: the file system has no such operation and needs none.
    return code == 0 || error == EINVAL ? Status() : SystemError(path, "syncing the folder", error);
  }
  int64_t FreeBytes(const stdfs::path& path) override {
    constexpr auto kUnknown = std::numeric_limits<int64_t>::max();
    std::error_code error;
    const stdfs::space_info space = stdfs::space(ExistingFolder(path), error);
    return error || space.available > static_cast<uintmax_t>(kUnknown)
               ? kUnknown
               : static_cast<int64_t>(space.available);
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

stdfs::path WithoutSeparator(const stdfs::path& path) {
  return path.has_filename() ? path : path.parent_path();
}

stdfs::path ExistingFolder(const stdfs::path& path) {
  std::error_code error;
  stdfs::path folder = stdfs::absolute(path.empty() ? "." : path, error);
  while (!stdfs::is_directory(folder, error) && folder.has_relative_path()) {
    folder = folder.parent_path();
  }
  return folder;
}

Status RequireRoom(FileSystem& fs, const stdfs::path& folder, int64_t bytes) {
  const int64_t free = fs.FreeBytes(folder);
  if (bytes <= free) return {};
  return Status::System(fmt::format(
      "{}: no space left: {} are to be written, {} are free, {} are missing", folder.string(),
      FormatBytes(bytes), FormatBytes(free), FormatBytes(bytes - free)));
}

namespace {

Status WriteAndRename(FileSystem& fs, const stdfs::path& partial, const stdfs::path& path,
                      std::string_view contents) {
  PQ_ASSIGN_OR_RETURN(const std::unique_ptr<WritableFile> file, fs.Create(partial));
  PQ_RETURN_IF_ERROR(file->Append(std::as_bytes(std::span(contents))));
  PQ_RETURN_IF_ERROR(file->Close());
  return fs.Rename(partial, path);
}

}  // namespace

Status WriteFileAtomically(FileSystem& fs, const stdfs::path& path, std::string_view contents) {
  const stdfs::path partial = path.string() + ".partial";
  if (Status status = WriteAndRename(fs, partial, path, contents); !status.ok()) {
    const Status cleanup = fs.RemoveAll(partial);
    return cleanup.ok()
               ? status
               : Status::System(fmt::format("{}; then {}", status.message(), cleanup.message()));
  }
  return fs.SyncDirectory(path.parent_path().empty() ? "." : path.parent_path());
}

Result<std::string> ReadFile(const stdfs::path& path) {
  PQ_ASSIGN_OR_RETURN(const InputFile file, OpenInput(path));
  std::string contents(file.size, '\0');
  size_t filled = 0;
  while (true) {
    if (filled == contents.size()) contents.resize(filled + kReadBytes);
    const ssize_t got =
        ::read(file.descriptor.get(), contents.data() + filled, contents.size() - filled);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return SystemError(path, "reading", errno);
    if (got == 0) break;
    filled += static_cast<size_t>(got);
  }
  contents.resize(filled);
  return contents;
}

Result<MappedFile> MappedFile::Open(const stdfs::path& path) {
  PQ_ASSIGN_OR_RETURN(const InputFile input, OpenInput(path));
  MappedFile file;
  if (input.size == 0) return file;
  void* data = ::mmap(nullptr, input.size, PROT_READ, MAP_PRIVATE, input.descriptor.get(), 0);
  if (data == MAP_FAILED) return SystemError(path, "mapping", errno);
  file.data_ = static_cast<const std::byte*>(data);
  file.size_ = input.size;
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

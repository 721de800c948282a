#include "bench/shape/sparse_file_system.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <limits>
#include <system_error>

namespace prismaquant {
namespace {

constexpr std::array<std::byte, 1 << 20> kZeros = {};

class SparseFile : public WritableFile {
 public:
  explicit SparseFile(std::filesystem::path path)
      : path_(std::move(path)), file_(path_, std::ios::binary | std::ios::trunc) {}
  bool good() const { return file_.good(); }

  Status Append(std::span<const std::byte> bytes) override {
    if (bytes.data() == kZeros.data()) {
      file_.seekp(static_cast<std::streamoff>(bytes.size()), std::ios::cur);
    } else {
      file_.write(reinterpret_cast<const char*>(bytes.data()),
                  static_cast<std::streamsize>(bytes.size()));
    }
    return file_.good() ? Status() : Failed("writing");
  }

  Status Close() override {
    const std::streamoff size = file_.tellp();
    file_.close();
    std::error_code error;
    std::filesystem::resize_file(path_, static_cast<uintmax_t>(size), error);
    return error ? Failed("closing") : Status();
  }

 private:
  Status Failed(const char* doing) const {
    return Status::System(fmt::format("{}: {} failed", path_.string(), doing));
  }

  std::filesystem::path path_;
  std::ofstream file_;
};

}  // namespace

std::span<const std::byte> SparseFileSystem::Zeros(int64_t wanted) {
  return std::span(kZeros).first(std::min(kZeros.size(), static_cast<size_t>(wanted)));
}

Result<std::unique_ptr<WritableFile>> SparseFileSystem::Create(const std::filesystem::path& path) {
  auto file = std::make_unique<SparseFile>(path);
  if (!file->good()) return Status::System(fmt::format("{}: creating failed", path.string()));
  return std::unique_ptr<WritableFile>(std::move(file));
}

int64_t SparseFileSystem::FreeBytes(const std::filesystem::path&) {
  return std::numeric_limits<int64_t>::max();
}

}  // namespace prismaquant

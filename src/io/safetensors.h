#ifndef PRISMAQUANT_IO_SAFETENSORS_H_
#define PRISMAQUANT_IO_SAFETENSORS_H_

// SafetensorsFile: one memory-mapped .safetensors file whose header obeys every rule of the format
// (docs/formats.md): header length, offsets without holes or overlap, dtype x shape = bytes, no
// duplicate names, no trailing bytes. Immutable after Open, hence safe to share between threads.
// TensorViews point into the mapping and must not outlive the file.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "io/dtype.h"
#include "io/file_system.h"

namespace prismaquant {

struct TensorView {
  std::string name;
  DType dtype = DType::kU8;
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;

  int64_t elements() const;
};

class SafetensorsFile {
 public:
  static Result<SafetensorsFile> Open(const std::filesystem::path& path);

  // In the order of their data.
  const std::vector<TensorView>& tensors() const { return tensors_; }
  // Null if absent.
  const TensorView* Find(const std::string& name) const;
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::filesystem::path& path() const { return path_; }
  const MappedFile& mapping() const { return mapping_; }

 private:
  SafetensorsFile(std::filesystem::path path, MappedFile mapping)
      : path_(std::move(path)), mapping_(std::move(mapping)) {}

  std::filesystem::path path_;
  MappedFile mapping_;
  std::vector<TensorView> tensors_;
  std::map<std::string, size_t> index_;
  std::map<std::string, std::string> metadata_;
};

// What a tensor of a file to be written looks like; its bytes come later.
struct TensorSpec {
  std::string name;
  DType dtype = DType::kU8;
  std::vector<int64_t> shape;

  int64_t bytes() const;
};

// The first bytes of a file that holds `specs` in this order: length, JSON, padding to a multiple
// of 8.
std::string SafetensorsHeader(const std::vector<TensorSpec>& specs,
                              const std::map<std::string, std::string>& metadata);

// Writes one safetensors file tensor by tensor: the header is fixed at Create, each Append supplies
// the bytes of the next tensor in the order of `specs`, in one or several pieces.
class SafetensorsWriter {
 public:
  static Result<SafetensorsWriter> Create(FileSystem& fs, const std::filesystem::path& path,
                                          const std::vector<TensorSpec>& specs,
                                          const std::map<std::string, std::string>& metadata);
  // Fails if the bytes pass the end of the last tensor.
  Status Append(std::span<const std::byte> bytes);
  // Fails if bytes are missing. Syncs.
  Status Close();

 private:
  SafetensorsWriter() = default;
  std::filesystem::path path_;
  std::unique_ptr<WritableFile> file_;
  int64_t remaining_ = 0;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_IO_SAFETENSORS_H_

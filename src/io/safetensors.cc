#include "io/safetensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "base/json.h"

namespace prismaquant {
namespace {

constexpr uint64_t kLongestHeader = 100'000'000;
constexpr size_t kLengthBytes = 8;

uint64_t LittleEndian64(const std::byte* bytes) {
  uint64_t value = 0;
  for (int i = 7; i >= 0; --i) value = value << 8 | static_cast<uint64_t>(bytes[i]);
  return value;
}

// The product of the shape, or nullopt if a dimension is negative or the product overflows.
std::optional<int64_t> Elements(const std::vector<int64_t>& shape) {
  int64_t product = 1;
  for (const int64_t dimension : shape) {
    if (dimension < 0 || __builtin_mul_overflow(product, dimension, &product)) return std::nullopt;
  }
  return product;
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

struct Entry {
  TensorView view;
  int64_t begin = 0, end = 0;
};

Result<Entry> ParseEntry(const std::string& file, const std::string& name, const Json& json) {
  const auto bad = [&](const std::string& what) {
    return Status::InvalidInput(fmt::format("{}: tensor {}: {}", file, name, what));
  };
  if (!json.is_object()) return bad("its header entry is not an object");
  PQ_ASSIGN_OR_RETURN(const std::string dtype_name,
                      JsonString(json, "dtype", file + ": tensor " + name));
  const std::optional<DType> dtype = ParseDType(dtype_name);
  if (!dtype) return bad(fmt::format("unknown dtype {}", dtype_name));
  const auto is_integers = [&](const char* key) {
    return json.contains(key) && json[key].is_array() &&
           std::all_of(json[key].begin(), json[key].end(),
                       [](const Json& v) { return v.is_number_integer(); });
  };
  if (!is_integers("shape")) return bad("shape is not a list of integers");
  if (!is_integers("data_offsets") || json["data_offsets"].size() != 2) {
    return bad("data_offsets is not a pair of integers");
  }
  Entry entry;
  entry.view.name = name;
  entry.view.dtype = *dtype;
  entry.view.shape = json["shape"].get<std::vector<int64_t>>();
  entry.begin = json["data_offsets"][0].get<int64_t>();
  entry.end = json["data_offsets"][1].get<int64_t>();
  const std::optional<int64_t> elements = Elements(entry.view.shape);
  int64_t bytes = 0;
  if (!elements || __builtin_mul_overflow(*elements, DTypeBytes(*dtype), &bytes)) {
    return bad(fmt::format("shape {} is negative or too large", ShapeText(entry.view.shape)));
  }
  if (entry.begin < 0 || entry.end < entry.begin || entry.end - entry.begin != bytes) {
    return bad(fmt::format("data_offsets [{}, {}] hold {} bytes, expected {} for {} {}",
                           entry.begin, entry.end, entry.end - entry.begin, bytes, dtype_name,
                           ShapeText(entry.view.shape)));
  }
  return entry;
}

Status ParseMetadata(const std::string& file, const Json& json,
                     std::map<std::string, std::string>& metadata) {
  if (!json.is_object())
    return Status::InvalidInput(fmt::format("{}: __metadata__ is not an object", file));
  for (const auto& [key, value] : json.items()) {
    if (!value.is_string()) {
      return Status::InvalidInput(
          fmt::format("{}: __metadata__ \"{}\" is not a string", file, key));
    }
    metadata[key] = value.get<std::string>();
  }
  return {};
}

// Offsets, sorted, must tile the data exactly.
Status CheckTiling(const std::string& file, const std::vector<Entry>& entries, int64_t data_bytes) {
  int64_t expected = 0;
  for (const Entry& entry : entries) {
    if (entry.begin != expected) {
      return Status::InvalidInput(fmt::format("{}: tensor {} begins at byte {}, expected {}", file,
                                              entry.view.name, entry.begin, expected));
    }
    expected = entry.end;
  }
  if (expected != data_bytes) {
    return Status::InvalidInput(fmt::format(
        "{}: holds {} bytes of tensor data, its header describes {}", file, data_bytes, expected));
  }
  return {};
}

}  // namespace

int64_t TensorView::elements() const { return Elements(shape).value_or(0); }

int64_t TensorSpec::bytes() const { return Elements(shape).value_or(0) * DTypeBytes(dtype); }

Result<SafetensorsFile> SafetensorsFile::Open(const std::filesystem::path& path) {
  PQ_ASSIGN_OR_RETURN(MappedFile mapping, MappedFile::Open(path));
  const std::string file = path.string();
  const std::span<const std::byte> bytes = mapping.bytes();
  if (bytes.size() < kLengthBytes) {
    return Status::InvalidInput(
        fmt::format("{}: {} bytes, too short for a safetensors file", file, bytes.size()));
  }
  const uint64_t header_bytes = LittleEndian64(bytes.data());
  if (header_bytes > kLongestHeader || header_bytes > bytes.size() - kLengthBytes) {
    return Status::InvalidInput(fmt::format(
        "{}: header of {} bytes in a file of {} bytes (truncated, or not a safetensors file)", file,
        header_bytes, bytes.size()));
  }
  const std::string_view header(reinterpret_cast<const char*>(bytes.data()) + kLengthBytes,
                                header_bytes);
  if (header.empty() || header.front() != '{') {
    return Status::InvalidInput(fmt::format("{}: header does not begin with '{{'", file));
  }
  PQ_ASSIGN_OR_RETURN(const Json json, ParseJson(header, file));

  SafetensorsFile result(path, std::move(mapping));
  std::vector<Entry> entries;
  for (const auto& [name, value] : json.items()) {
    if (name == "__metadata__") {
      PQ_RETURN_IF_ERROR(ParseMetadata(file, value, result.metadata_));
      continue;
    }
    PQ_ASSIGN_OR_RETURN(Entry entry, ParseEntry(file, name, value));
    entries.push_back(std::move(entry));
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  const std::span<const std::byte> data = bytes.subspan(kLengthBytes + header_bytes);
  PQ_RETURN_IF_ERROR(CheckTiling(file, entries, static_cast<int64_t>(data.size())));
  for (Entry& entry : entries) {
    entry.view.bytes = data.subspan(static_cast<size_t>(entry.begin),
                                    static_cast<size_t>(entry.end - entry.begin));
    result.index_[entry.view.name] = result.tensors_.size();
    result.tensors_.push_back(std::move(entry.view));
  }
  return result;
}

const TensorView* SafetensorsFile::Find(const std::string& name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : &tensors_[found->second];
}

std::string SafetensorsHeader(const std::vector<TensorSpec>& specs,
                              const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  if (!metadata.empty()) json["__metadata__"] = metadata;
  int64_t offset = 0;
  for (const TensorSpec& spec : specs) {
    const int64_t end = offset + spec.bytes();
    json[spec.name] = {
        {"dtype", DTypeName(spec.dtype)}, {"shape", spec.shape}, {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text = json.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  std::string header(kLengthBytes, '\0');
  for (size_t i = 0; i < kLengthBytes; ++i)
    header[i] = static_cast<char>(text.size() >> (8 * i) & 0xff);
  return header + text;
}

Result<SafetensorsWriter> SafetensorsWriter::Create(
    FileSystem& fs, const std::filesystem::path& path, std::vector<TensorSpec> specs,
    const std::map<std::string, std::string>& metadata) {
  SafetensorsWriter writer;
  writer.path_ = path;
  for (const TensorSpec& spec : specs) writer.remaining_ += spec.bytes();
  PQ_ASSIGN_OR_RETURN(writer.file_, fs.Create(path));
  const std::string header = SafetensorsHeader(specs, metadata);
  PQ_RETURN_IF_ERROR(writer.file_->Append(std::as_bytes(std::span(header))));
  return writer;
}

Status SafetensorsWriter::Append(std::span<const std::byte> bytes) {
  remaining_ -= static_cast<int64_t>(bytes.size());
  if (remaining_ < 0) {
    return Status::System(
        fmt::format("{}: {} bytes more than its header describes", path_.string(), -remaining_));
  }
  return file_->Append(bytes);
}

Status SafetensorsWriter::Close() {
  if (remaining_ != 0) {
    return Status::System(
        fmt::format("{}: {} bytes fewer than its header describes", path_.string(), remaining_));
  }
  return file_->Close();
}

}  // namespace prismaquant

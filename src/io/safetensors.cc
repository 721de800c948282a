#include "io/safetensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <set>
#include <string_view>
#include <utility>

#include "base/json.h"

namespace prismaquant {
namespace {

constexpr uint64_t kLongestHeader = 100'000'000;
constexpr size_t kLengthBytes = 8;
constexpr char kMetadataKey[] = "__metadata__";

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

std::optional<int64_t> Bytes(DType dtype, const std::vector<int64_t>& shape) {
  const std::optional<int64_t> elements = Elements(shape);
  int64_t bytes = 0;
  if (!elements || __builtin_mul_overflow(*elements, DTypeBytes(dtype), &bytes))
    return std::nullopt;
  return bytes;
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

// JSON with unpaired UTF-8 replaced rather than thrown at.
std::string JsonText(const Json& value) {
  return value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

// A value of a header for an error message.
std::string Excerpt(const Json& json) {
  constexpr size_t kLongest = 60;
  std::string text = json.is_structured() && json.size() > kLongest
                         ? fmt::format("{} of {}", json.type_name(), json.size())
                         : JsonText(json);
  return text.size() > kLongest ? text.substr(0, kLongest) + "..." : text;
}

// A list of integers, each of which an int64_t holds.
bool IsIntegers(const Json& json) {
  return json.is_array() && std::all_of(json.begin(), json.end(), [](const Json& value) {
           return value.is_number_integer() &&
                  (!value.is_number_unsigned() ||
                   value.get<uint64_t>() <= uint64_t{std::numeric_limits<int64_t>::max()});
         });
}

struct Entry {
  TensorView view;
  int64_t begin = 0, end = 0;
};

Result<Entry> ParseEntry(const std::string& file, const std::string& name, const Json& json) {
  const auto bad = [&](const std::string& what) {
    return Status::InvalidInput(fmt::format("{}: tensor {}: {}", file, name, what));
  };
  if (!json.is_object()) return bad(fmt::format("is {}, expected an object", Excerpt(json)));
  for (const char* key : {"dtype", "shape", "data_offsets"}) {
    if (!json.contains(key)) return bad(fmt::format("{} is missing", key));
  }
  const Json &dtype = json["dtype"], &shape = json["shape"], &offsets = json["data_offsets"];
  const auto parsed =
      dtype.is_string() ? ParseDType(dtype.get_ref<const std::string&>()) : std::optional<DType>();
  if (!parsed) return bad(fmt::format("unknown dtype {}, expected one as BF16", Excerpt(dtype)));
  if (!IsIntegers(shape)) {
    return bad(fmt::format("shape is {}, expected a list of integers", Excerpt(shape)));
  }
  if (!IsIntegers(offsets) || offsets.size() != 2) {
    return bad(fmt::format("data_offsets is {}, expected two integers", Excerpt(offsets)));
  }
  Entry entry;
  entry.view.name = name;
  entry.view.dtype = *parsed;
  entry.view.shape = shape.get<std::vector<int64_t>>();
  entry.begin = offsets[0].get<int64_t>();
  entry.end = offsets[1].get<int64_t>();
  const std::optional<int64_t> bytes = Bytes(*parsed, entry.view.shape);
  if (!bytes) {
    return bad(fmt::format("shape {} is negative or too large", ShapeText(entry.view.shape)));
  }
  if (entry.begin < 0 || entry.end < entry.begin) {
    return bad(fmt::format("data_offsets {} do not ascend from 0", Excerpt(offsets)));
  }
  if (entry.end - entry.begin != *bytes) {
    return bad(fmt::format("data_offsets [{}, {}] hold {} bytes, expected {} for {} {}",
                           entry.begin, entry.end, entry.end - entry.begin, *bytes,
                           DTypeName(*parsed), ShapeText(entry.view.shape)));
  }
  return entry;
}

Status ParseMetadata(const std::string& file, const Json& json,
                     std::map<std::string, std::string>& metadata) {
  if (!json.is_object()) {
    return Status::InvalidInput(
        fmt::format("{}: __metadata__ is {}, expected an object", file, Excerpt(json)));
  }
  for (const auto& [key, value] : json.items()) {
    if (!value.is_string()) {
      return Status::InvalidInput(fmt::format("{}: __metadata__ \"{}\" is {}, expected a string",
                                              file, key, Excerpt(value)));
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

// The JSON between the length and the tensor data.
Result<std::string_view> HeaderText(const std::string& file, std::span<const std::byte> bytes) {
  if (bytes.size() < kLengthBytes) {
    return Status::InvalidInput(
        fmt::format("{}: {} bytes, too short for a safetensors file", file, bytes.size()));
  }
  const uint64_t size = LittleEndian64(bytes.data());
  if (size > kLongestHeader || size > bytes.size() - kLengthBytes) {
    return Status::InvalidInput(fmt::format(
        "{}: header of {} bytes in a file of {} bytes (truncated, or not a safetensors file)", file,
        size, bytes.size()));
  }
  const std::string_view header(reinterpret_cast<const char*>(bytes.data()) + kLengthBytes, size);
  if (header.empty() || header.front() != '{') {
    return Status::InvalidInput(fmt::format("{}: header does not begin with '{{'", file));
  }
  if (const size_t nul = header.find('\0'); nul != std::string_view::npos) {
    return Status::InvalidInput(
        fmt::format("{}: header holds a NUL at byte {}, expected JSON and spaces", file, nul));
  }
  return header;
}

// What SafetensorsFile::Open would reject about specs of a file to be written.
Status CheckSpecs(const std::string& file, const std::vector<TensorSpec>& specs) {
  std::set<std::string_view> names;
  int64_t total = 0;
  for (const TensorSpec& spec : specs) {
    if (spec.name == kMetadataKey || !names.insert(spec.name).second) {
      return Status::InvalidInput(fmt::format("{}: tensor {}: its name is {}, expected a new one",
                                              file, spec.name,
                                              spec.name == kMetadataKey ? "reserved" : "taken"));
    }
    const std::optional<int64_t> bytes = Bytes(spec.dtype, spec.shape);
    if (!bytes || __builtin_add_overflow(total, *bytes, &total)) {
      return Status::InvalidInput(fmt::format("{}: tensor {}: shape {} is negative or too large",
                                              file, spec.name, ShapeText(spec.shape)));
    }
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
  PQ_ASSIGN_OR_RETURN(const std::string_view header, HeaderText(file, bytes));
  PQ_ASSIGN_OR_RETURN(const Json json, ParseJson(header, file));

  SafetensorsFile result(path, std::move(mapping));
  std::vector<Entry> entries;
  for (const auto& [name, value] : json.items()) {
    if (name == kMetadataKey) {
      PQ_RETURN_IF_ERROR(ParseMetadata(file, value, result.metadata_));
      continue;
    }
    PQ_ASSIGN_OR_RETURN(Entry entry, ParseEntry(file, name, value));
    entries.push_back(std::move(entry));
  }
  std::stable_sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  const std::span<const std::byte> data = bytes.subspan(kLengthBytes + header.size());
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
  std::string text = "{";
  if (!metadata.empty()) text += fmt::format("\"__metadata__\":{}", JsonText(metadata));
  int64_t offset = 0;
  for (const TensorSpec& spec : specs) {
    const int64_t end = offset + spec.bytes();
    text += fmt::format("{}{}:{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[{},{}]}}",
                        text.size() > 1 ? "," : "", JsonText(spec.name), DTypeName(spec.dtype),
                        fmt::join(spec.shape, ","), offset, end);
    offset = end;
  }
  text += "}";
  text.append((8 - text.size() % 8) % 8, ' ');
  std::string header(kLengthBytes, '\0');
  for (size_t i = 0; i < kLengthBytes; ++i) {
    header[i] = static_cast<char>(text.size() >> (8 * i) & 0xff);
  }
  return header + text;
}

Result<SafetensorsWriter> SafetensorsWriter::Create(
    FileSystem& fs, const std::filesystem::path& path, const std::vector<TensorSpec>& specs,
    const std::map<std::string, std::string>& metadata) {
  PQ_RETURN_IF_ERROR(CheckSpecs(path.string(), specs));
  const std::string header = SafetensorsHeader(specs, metadata);
  if (header.size() - kLengthBytes > kLongestHeader) {
    return Status::InvalidInput(fmt::format("{}: a header of {} bytes, expected at most {}",
                                            path.string(), header.size() - kLengthBytes,
                                            kLongestHeader));
  }
  SafetensorsWriter writer;
  writer.path_ = path;
  for (const TensorSpec& spec : specs) writer.remaining_ += spec.bytes();
  PQ_ASSIGN_OR_RETURN(writer.file_, fs.Create(path));
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

#ifndef PRISMAQUANT_IO_DTYPE_H_
#define PRISMAQUANT_IO_DTYPE_H_

// DType: the element types of safetensors files, with their names and widths.

#include <cstdint>
#include <optional>
#include <string_view>

namespace prismaquant {

enum class DType {
  kBool,
  kU8,
  kI8,
  kF8E4M3,
  kF8E5M2,
  kF8E8M0,
  kU16,
  kI16,
  kF16,
  kBF16,
  kU32,
  kI32,
  kF32,
  kU64,
  kI64,
  kF64,
  kC64,
};

// The name in a safetensors header, as "BF16".
std::string_view DTypeName(DType dtype);
std::optional<DType> ParseDType(std::string_view name);
int64_t DTypeBytes(DType dtype);

}  // namespace prismaquant

#endif  // PRISMAQUANT_IO_DTYPE_H_

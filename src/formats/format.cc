#include "formats/format.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <array>
#include <optional>

#include "formats/extremes.h"
#include "formats/families.h"

namespace prismaquant {
namespace {

struct TypePair {
  DType dtype;
  at::ScalarType type;
};

constexpr std::array<TypePair, 15> kTypes = {{
    {DType::kBool, at::kBool},
    {DType::kU8, at::kByte},
    {DType::kI8, at::kChar},
    {DType::kF8E4M3, at::kFloat8_e4m3fn},
    {DType::kF8E5M2, at::kFloat8_e5m2},
    {DType::kU16, at::kUInt16},
    {DType::kI16, at::kShort},
    {DType::kF16, at::kHalf},
    {DType::kBF16, at::kBFloat16},
    {DType::kU32, at::kUInt32},
    {DType::kI32, at::kInt},
    {DType::kF32, at::kFloat},
    {DType::kI64, at::kLong},
    {DType::kF64, at::kDouble},
    {DType::kU64, at::kUInt64},
}};

std::string ShapeText(at::IntArrayRef shape) {
  return fmt::format("[{}]", fmt::join(shape.begin(), shape.end(), ", "));
}

Status CheckStatedShape(const at::Tensor& tensor, int64_t out, int64_t in) {
  if (at::equal(tensor, at::tensor({out, in}))) return {};
  const at::Tensor found = tensor.contiguous();
  return Status::InvalidInput(fmt::format(
      "weight_shape holds {}, expected [{}, {}]",
      ShapeText({found.const_data_ptr<int64_t>(), static_cast<size_t>(found.numel())}), out, in));
}

Status CheckValues(const std::string& suffix, const at::Tensor& tensor) {
  const auto bad = [&](const std::string& what) {
    return Status::InvalidInput(suffix + " " + what);
  };
  if (suffix == "weight_global_scale" || suffix == "input_global_scale") {
    if (!(tensor > 0).all().item<bool>() || !AllFinite(tensor)) {
      return bad("is not finite and positive");
    }
    return {};
  }
  if (tensor.scalar_type() == at::kFloat8_e4m3fn) {
    const at::Tensor bytes = tensor.view(at::kByte);
    if ((bytes.bitwise_and(0x7f) == 0x7f).any().item<bool>()) return bad("holds a NaN code (0x7f)");
    if (suffix == "weight_scale" && (bytes >= 0x80).any().item<bool>())
      return bad("holds a negative scale");
    return {};
  }
  if (suffix == "weight_scale" && tensor.scalar_type() == at::kByte) {
    if ((tensor == 255).any().item<bool>()) return bad("holds the NaN scale 255");
    return {};
  }
  if (!tensor.is_floating_point()) return {};
  if (!AllFinite(tensor)) return bad("is not finite");
  if (suffix == "weight_scale" && tensor.signbit().any().item<bool>()) {
    return bad("holds a negative scale");
  }
  return {};
}

// The stated shape says how many codes a word holds.
const Format* DetectInt(const at::Tensor& packed, const at::Tensor& shape) {
  if (packed.dim() != 2 || shape.numel() != 2) return nullptr;
  const auto in = shape.flatten()[1].item<int64_t>();
  if (in > 0 && packed.size(1) * 8 == in) return &Int4Format();
  if (in > 0 && packed.size(1) * 4 == in) return &Int8Format();
  return nullptr;
}

}  // namespace

int64_t Format::Bytes(int64_t out, int64_t in, DType source) const {
  int64_t bytes = 0;
  for (const TensorSpec& spec : Layout(out, in, source)) bytes += spec.bytes();
  return bytes;
}

Status CheckStored(const Format& format, const StoredTensors& stored, int64_t out, int64_t in,
                   DType source) {
  const std::vector<TensorSpec> layout = format.Layout(out, in, source);
  for (const TensorSpec& spec : layout) {
    const auto found = stored.find(spec.name);
    if (found == stored.end()) {
      return Status::InvalidInput(
          fmt::format("{} is missing, {} needs it", spec.name, format.name()));
    }
    const at::Tensor& tensor = found->second;
    if (tensor.sizes() != at::IntArrayRef(spec.shape) ||
        FromScalarType(tensor.scalar_type()) != spec.dtype) {
      return Status::InvalidInput(fmt::format("{} is {} {}, expected {} {} for {}", spec.name,
                                              DTypeName(FromScalarType(tensor.scalar_type())),
                                              ShapeText(tensor.sizes()), DTypeName(spec.dtype),
                                              ShapeText(spec.shape), format.name()));
    }
    PQ_RETURN_IF_ERROR(CheckValues(spec.name, tensor));
    if (spec.name == "weight_shape") PQ_RETURN_IF_ERROR(CheckStatedShape(tensor, out, in));
  }
  if (stored.size() != layout.size()) {
    return Status::InvalidInput(fmt::format("{} tensors are stored, {} has {}", stored.size(),
                                            format.name(), layout.size()));
  }
  return {};
}

const Format* FindFormat(std::string_view name) {
  for (const Format* format : AllFormats()) {
    if (format->name() == name) return format;
  }
  return nullptr;
}

std::span<const Format* const> AllFormats() {
  static const std::array<const Format*, 8> formats = {
      &Int4Format(), &Mxfp4Format(), &Nvfp4Format(), &Nvfp4A16Format(),
      &Fp8Format(),  &Int8Format(),  &Mxfp8Format(), &SourceFormat()};
  return formats;
}

const Format* DetectFormat(const StoredTensors& stored) {
  const auto type = [&](const char* suffix) -> std::optional<at::ScalarType> {
    const auto found = stored.find(suffix);
    return found == stored.end() ? std::nullopt : std::optional(found->second.scalar_type());
  };
  if (type("weight_packed") == at::kByte && type("weight_global_scale"))
    return type("input_global_scale") ? &Nvfp4Format() : &Nvfp4A16Format();
  if (type("weight_packed") == at::kByte && type("weight_scale") == at::kByte)
    return &Mxfp4Format();
  if (type("weight_packed") == at::kInt && type("weight_shape") == at::kLong)
    return DetectInt(stored.at("weight_packed"), stored.at("weight_shape"));
  if (type("weight") == at::kFloat8_e4m3fn && type("weight_scale") == at::kByte)
    return &Mxfp8Format();
  if (type("weight") == at::kFloat8_e4m3fn && type("weight_scale")) return &Fp8Format();
  if (stored.size() == 1 && type("weight") && c10::isFloatingType(*type("weight")) &&
      c10::elementSize(*type("weight")) > 1) {
    return &SourceFormat();
  }
  return nullptr;
}

at::Tensor TensorFromView(const TensorView& view) {
  return at::from_blob(const_cast<std::byte*>(view.bytes.data()), view.shape,
                       at::TensorOptions().dtype(ToScalarType(view.dtype)));
}

at::ScalarType ToScalarType(DType dtype) {
  for (const TypePair& pair : kTypes) {
    if (pair.dtype == dtype) return pair.type;
  }
  return at::kByte;
}

DType FromScalarType(at::ScalarType type) {
  for (const TypePair& pair : kTypes) {
    if (pair.type == type) return pair.dtype;
  }
  return DType::kU8;
}

Json QuantizationArgs(const SchemeArgs& args) {
  return {{"num_bits", args.bits},
          {"type", args.type},
          {"symmetric", true},
          {"strategy", args.strategy},
          {"group_size", args.group_size},
          {"dynamic", args.dynamic},
          {"block_structure", nullptr},
          {"actorder", nullptr},
          {"scale_dtype", args.scale_dtype},
          {"zp_dtype", nullptr},
          {"observer", args.observer},
          {"observer_kwargs", Json::object()}};
}

}  // namespace prismaquant

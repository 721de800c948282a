#include "export/verify.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <cstring>
#include <filesystem>
#include <set>
#include <vector>

#include "export/exporter.h"
#include "export/inventory.h"
#include "export/matching.h"
#include "formats/tensor_bytes.h"

namespace prismaquant {
namespace {

namespace stdfs = std::filesystem;

constexpr char kIndexFile[] = "model.safetensors.index.json";

using LinearMap = std::map<std::string, StoredLinear>;
using ModuleTensors = std::map<std::string, std::map<std::string, const TensorView*>>;

// Malformed input is a violation like any other.
Status AsUnmet(const Status& status) {
  return status.code() == StatusCode::kInvalidInput ? Status::Unmet(status.message()) : status;
}

bool IsQuantized(const Format& format) { return !format.compression_format().empty(); }

bool SameBytes(std::span<const std::byte> a, std::span<const std::byte> b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size()) == 0);
}

ModuleTensors GroupByModule(const Checkpoint& checkpoint) {
  ModuleTensors modules;
  for (const std::string& name : checkpoint.names()) {
    const auto [module, suffix] = SplitTensorName(name);
    modules[module][suffix] = checkpoint.Find(name);
  }
  return modules;
}

StoredTensors MapStored(const std::map<std::string, const TensorView*>& tensors) {
  StoredTensors stored;
  for (const auto& [suffix, view] : tensors) {
    if (suffix != "bias") stored[suffix] = TensorFromView(*view);
  }
  return stored;
}

std::string SuffixList(const StoredTensors& stored) {
  std::vector<std::string> suffixes;
  for (const auto& [suffix, tensor] : stored) {
    suffixes.push_back(
        fmt::format("{} {}", suffix, DTypeName(FromScalarType(tensor.scalar_type()))));
  }
  return fmt::format("{}", fmt::join(suffixes, ", "));
}

Result<const Format*> StoredFormat(const std::string& module, const StoredTensors& stored) {
  if (const Format* format = DetectFormat(stored)) return format;
  return Status::InvalidInput(
      fmt::format("{}: its tensors ({}) fit no known format", module, SuffixList(stored)));
}

// The shape of a Linear that no configuration states, from its tensors.
Result<StoredLinear> LinearFromTensors(const std::string& module, const StoredTensors& stored,
                                       DType dtype) {
  StoredLinear linear;
  PQ_ASSIGN_OR_RETURN(linear.format, StoredFormat(module, stored));
  const bool packed = stored.count("weight_packed") > 0;
  const at::Tensor& codes = stored.at(packed ? "weight_packed" : "weight");
  if (codes.dim() != 2) {
    return Status::InvalidInput(
        fmt::format("{}: its weight has rank {}, expected 2", module, codes.dim()));
  }
  linear.out = codes.size(0);
  linear.in = codes.size(1) * (packed ? 2 : 1);
  // Packed integers say their shape themselves.
  if (packed && codes.scalar_type() == at::kInt) {
    linear.in = stored.at("weight_shape").flatten()[1].item<int64_t>();
  }
  linear.dtype = IsQuantized(*linear.format) ? dtype : FromScalarType(codes.scalar_type());
  return linear;
}

Status CheckTensors(const Checkpoint& out, const LinearMap& linears, const ModuleTensors& modules) {
  for (const auto& [name, linear] : linears) {
    if (!linear.packed.tensor.empty()) continue;
    const Status status = CheckStored(*linear.format, MapStored(modules.at(name)), linear.out,
                                      linear.in, linear.dtype);
    if (!status.ok()) return Status::Unmet(fmt::format("{}: {}", name, status.message()));
    for (const auto& [suffix, view] : modules.at(name)) out.DontNeed({view->name});
  }
  return {};
}

Status CheckStrays(const LinearMap& linears, const ModuleTensors& modules) {
  const std::set<std::string> suffixes = {
      "weight_packed",      "weight_scale",      "weight_global_scale",
      "input_global_scale", "weight_zero_point", "weight_shape",
      "weight_g_idx",       "input_scale",       "input_zero_point"};
  for (const auto& [module, tensors] : modules) {
    if (linears.count(module) > 0) continue;
    for (const auto& [suffix, view] : tensors) {
      if (suffixes.count(suffix) > 0) {
        return Status::Unmet(
            fmt::format("tensor {} belongs to no quantized Linear of the model", view->name));
      }
    }
  }
  return {};
}

// All Linears of a group have this tensor, where they have it, bit for bit as the first one's.
Status CheckShared(const std::string& name, const std::string& first, const ModuleTensors& modules,
                   const char* suffix) {
  const auto& mine = modules.at(name);
  if (mine.count(suffix) == 0) return {};
  if (SameBytes(mine.at(suffix)->bytes, modules.at(first).at(suffix)->bytes)) return {};
  return Status::Unmet(
      fmt::format("{}: {} differs from that of {}, which vLLM fuses with it", name, suffix, first));
}

Status CheckFused(const LinearMap& linears, const ModuleTensors& modules) {
  // Groups -> their first Linear.
  std::map<std::string, std::string> unit, scale_group, input_group;
  for (const auto& [name, linear] : linears) {
    const std::string& leader = unit.emplace(linear.unit, name).first->second;
    const Format& expected = *linears.at(leader).format;
    if (linear.format != &expected) {
      return Status::Unmet(fmt::format("{}: is {}, but {}, which vLLM fuses with it, is {}", name,
                                       linear.format->name(), leader, expected.name()));
    }
    if (!linear.packed.tensor.empty()) continue;
    PQ_RETURN_IF_ERROR(CheckShared(name,
                                   scale_group.emplace(linear.scale_group, name).first->second,
                                   modules, "weight_global_scale"));
    PQ_RETURN_IF_ERROR(CheckShared(name,
                                   input_group.emplace(linear.input_group, name).first->second,
                                   modules, "input_global_scale"));
  }
  return {};
}

// vLLM's loader reads packed experts or experts one by one, not both in one part.
Status CheckExperts(const Model& model) {
  std::map<Part, const LinearInfo*> first;
  for (const LinearInfo& linear : model.linears()) {
    if (!linear.is_expert) continue;
    const LinearInfo& other = *first.emplace(linear.part, &linear).first->second;
    if (other.packed.tensor.empty() == linear.packed.tensor.empty()) continue;
    return Status::Unmet(
        fmt::format("{}: experts of some layers are packed, of others not, expected one way",
                    (linear.packed.tensor.empty() ? linear : other).name));
  }
  return {};
}

Status CheckConfigKeys(const Json& config, bool quantized) {
  if (config.is_null()) {
    return quantized
               ? Status::Unmet("config.json: no quantization_config, but tensors are quantized")
               : Status();
  }
  PQ_ASSIGN_OR_RETURN(const ConfigRules rules, ConfigRules::Parse(config, "config.json"));
  const auto expect = [&](const char* key, const std::string& value) -> Status {
    const Json found = config.contains(key) ? config[key] : Json();
    if (found == value) return {};
    return Status::Unmet(fmt::format("config.json: quantization_config.{} is {}, expected \"{}\"",
                                     key, found.dump(), value));
  };
  PQ_RETURN_IF_ERROR(expect("quant_method", "compressed-tensors"));
  PQ_RETURN_IF_ERROR(expect("quantization_status", "compressed"));
  std::set<std::string> formats;
  for (const ConfigGroup& group : rules.groups) {
    if (FormatOfGroup(group) == nullptr) {
      return Status::Unmet(fmt::format("config.json: the scheme of {} (format \"{}\") is unknown",
                                       group.name, group.format));
    }
    formats.insert(group.format);
  }
  if (formats.empty()) return Status::Unmet("config.json: quantization_config has no config group");
  return expect("format", formats.size() > 1 ? "mixed-precision" : *formats.begin());
}

Status CheckIndex(const stdfs::path& path, int64_t total) {
  PQ_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  PQ_ASSIGN_OR_RETURN(const Json index, ParseJson(text, path.string()));
  const Json metadata = index.contains("metadata") ? index["metadata"] : Json();
  PQ_ASSIGN_OR_RETURN(const int64_t stated, JsonInt(metadata, "total_size", kIndexFile));
  if (stated == total) return {};
  return Status::Unmet(fmt::format("{}: total_size is {}, expected {}", kIndexFile, stated, total));
}

Status CheckFiles(const Checkpoint& out) {
  int64_t total = 0;
  for (const std::string& name : out.names()) {
    total += static_cast<int64_t>(out.Find(name)->bytes.size());
  }
  std::error_code error;
  const stdfs::path index = out.folder() / kIndexFile;
  if (stdfs::exists(index, error)) PQ_RETURN_IF_ERROR(CheckIndex(index, total));
  int64_t file_bytes = 0;
  for (const auto& entry : stdfs::directory_iterator(out.folder(), error)) {
    if (entry.path().extension() != ".safetensors") continue;
    file_bytes += static_cast<int64_t>(entry.file_size(error));
  }
  if (file_bytes == out.file_bytes()) return {};
  return Status::Unmet(fmt::format(
      "{}: its *.safetensors files hold {} bytes, expected {}: files lie beside those of the model",
      out.folder().string(), file_bytes, out.file_bytes()));
}

Status CheckCopies(const Checkpoint& out, const Checkpoint& source) {
  Json config = out.config();
  config.erase("quantization_config");
  if (config != source.config()) {
    return Status::Unmet("config.json: differs from the source's by more than quantization_config");
  }
  std::map<std::string, std::string> files;
  PQ_ASSIGN_OR_RETURN(files, PassthroughFiles(source.folder()));
  for (const auto& [name, contents] : files) {
    const Result<std::string> copy = ReadFile(out.folder() / name);
    if (!copy.ok() || *copy != contents) {
      return Status::Unmet(fmt::format("{}: is {}, expected a copy of the source's", name,
                                       copy.ok() ? "different" : "missing"));
    }
  }
  return {};
}

// Both tensors' pages are given back as they are compared.
Result<bool> AreCopies(const Checkpoint& out_checkpoint, const TensorView& out,
                       const Checkpoint& source_checkpoint, const TensorView& source) {
  if (out.bytes.size() != source.bytes.size()) return false;
  bool same = true;
  size_t begin = 0;
  PQ_RETURN_IF_ERROR(out_checkpoint.ForEachPiece(out, [&](auto piece) -> Status {
    same = same && SameBytes(piece, source.bytes.subspan(begin, piece.size()));
    source_checkpoint.DontNeed(source, begin, piece.size());
    begin += piece.size();
    return {};
  }));
  return same;
}

Status CheckSameTensor(const Checkpoint& checkpoint, const TensorView& out, const Model& model,
                       const TensorView& source) {
  if (out.dtype != source.dtype || out.shape != source.shape) {
    return Status::Unmet(fmt::format("tensor {}: is {} [{}], expected {} [{}] as in the source",
                                     out.name, DTypeName(out.dtype), fmt::join(out.shape, ", "),
                                     DTypeName(source.dtype), fmt::join(source.shape, ", ")));
  }
  if (model.IsSmoothed(source.name)) {
    PQ_ASSIGN_OR_RETURN(const at::Tensor smoothed, model.LoadTensor(source.name));
    if (SameBytes(out.bytes, TensorBytes(smoothed.contiguous()))) return {};
    return Status::Unmet(fmt::format("tensor {}: differs from the source's smoothed as {} says",
                                     out.name, kRecordFile));
  }
  PQ_ASSIGN_OR_RETURN(const bool same, AreCopies(checkpoint, out, model.checkpoint(), source));
  if (same) return {};
  return Status::Unmet(
      fmt::format("tensor {}: differs from the source's, expected a copy", out.name));
}

// The quantized Linear that the tensor is a part of; null if it is to be a copy of the source's.
const StoredLinear* QuantizedOwner(const LinearMap& linears, const TensorName& name) {
  const auto found = linears.find(name.module);
  const bool owned =
      found != linears.end() && IsQuantized(*found->second.format) && name.suffix != "bias";
  return owned ? &found->second : nullptr;
}

// Where the source packs what a Linear has for itself here: Linear name -> its slice.
using SliceMap = std::map<std::string, const LinearInfo*>;

Status CheckSlice(const TensorView& out, const Model& model, const LinearInfo& linear) {
  PQ_ASSIGN_OR_RETURN(const at::Tensor slice, model.LoadWeight(linear));
  const bool same = out.dtype == linear.dtype &&
                    out.shape == std::vector<int64_t>{linear.out, linear.in} &&
                    SameBytes(out.bytes, TensorBytes(slice.contiguous()));
  return same ? Status()
              : Status::Unmet(fmt::format("tensor {}: differs from the source's slice of {}, "
                                          "expected a copy",
                                          out.name, linear.packed.tensor));
}

Status CheckTensorOrigin(const Checkpoint& out, const Model& model, const LinearMap& linears,
                         const SliceMap& slices, const std::string& name) {
  const Checkpoint& source = model.checkpoint();
  const TensorName parts = SplitTensorName(name);
  const StoredLinear* owner = QuantizedOwner(linears, parts);
  const auto slice = slices.find(parts.module);
  if (slice != slices.end() && owner == nullptr && parts.suffix == "weight") {
    return CheckSlice(*out.Find(name), model, *slice->second);
  }
  std::vector<int64_t> shape;
  if (slice != slices.end()) {
    shape = {slice->second->out, slice->second->in};
  } else {
    const TensorView* original = source.Find(owner != nullptr ? parts.module + ".weight" : name);
    if (original == nullptr) {
      return Status::Unmet(fmt::format("tensor {}: the source has none such", name));
    }
    if (owner == nullptr)
      PQ_RETURN_IF_ERROR(CheckSameTensor(out, *out.Find(name), model, *original));
    shape = original->shape;
    source.DontNeed({original->name});
  }
  if (owner != nullptr && shape != std::vector<int64_t>{owner->out, owner->in}) {
    return Status::Unmet(fmt::format("{}: is [{}, {}], expected [{}] as in the source",
                                     parts.module, owner->out, owner->in, fmt::join(shape, ", ")));
  }
  out.DontNeed({name});
  return {};
}

// Has the model of the source smoothed as the record beside the checkpoint says, if it does.
Status SmoothAsRecorded(const Checkpoint& out, Model& model) {
  std::error_code error;
  const stdfs::path path = out.folder() / kRecordFile;
  if (!stdfs::exists(path, error)) return {};
  PQ_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  PQ_ASSIGN_OR_RETURN(const Json record, ParseJson(text, path.string()));
  if (!record.is_object() || !record.contains(kSmoothingKey) || record[kSmoothingKey].is_null()) {
    return {};
  }
  PQ_ASSIGN_OR_RETURN(SmoothingExponents exponents,
                      ParseSmoothing(record[kSmoothingKey], path.string()));
  PQ_ASSIGN_OR_RETURN(auto smoothing, Smoothing::Make(model, std::move(exponents)));
  model.SetSmoothing(std::move(smoothing));
  return {};
}

Status CheckAgainstSource(const Checkpoint& out, const Checkpoint& source,
                          const LinearMap& linears) {
  PQ_ASSIGN_OR_RETURN(const std::unique_ptr<Model> model, Model::Open(source));
  PQ_RETURN_IF_ERROR(SmoothAsRecorded(out, *model));
  SliceMap slices;
  std::set<std::string> unpacked;  // tensors of the source whose slices stand alone here
  for (const LinearInfo& linear : model->linears()) {
    const std::string& packed = linear.packed.tensor;
    if (packed.empty() || out.Find(packed) != nullptr) continue;
    slices[linear.name] = &linear;
    unpacked.insert(packed);
  }
  for (const std::string& name : out.names()) {
    PQ_RETURN_IF_ERROR(CheckTensorOrigin(out, *model, linears, slices, name));
  }
  for (const std::string& name : source.names()) {
    const TensorName parts = SplitTensorName(name);
    const bool replaced = unpacked.count(name) > 0 ||
                          (parts.suffix == "weight" && QuantizedOwner(linears, parts) != nullptr);
    if (!replaced && out.Find(name) == nullptr) {
      return Status::Unmet(
          fmt::format("tensor {}: is missing, expected a copy of the source's", name));
    }
  }
  return CheckCopies(out, source);
}

Status Verify(const Checkpoint& out, const Checkpoint* source) {
  PQ_ASSIGN_OR_RETURN(const std::unique_ptr<Model> model, Model::Open(out));
  LinearMap linears;
  PQ_ASSIGN_OR_RETURN(linears, ReadStoredLinears(*model));
  const ModuleTensors modules = GroupByModule(out);
  PQ_RETURN_IF_ERROR(CheckTensors(out, linears, modules));
  PQ_RETURN_IF_ERROR(CheckStrays(linears, modules));
  PQ_RETURN_IF_ERROR(CheckExperts(*model));
  PQ_RETURN_IF_ERROR(CheckFused(linears, modules));

  std::map<std::string, const Format*> formats;
  bool quantized = false;
  for (const auto& [name, linear] : linears) {
    formats[name] = linear.format;
    quantized |= IsQuantized(*linear.format);
  }
  const Json config =
      out.config().contains("quantization_config") ? out.config()["quantization_config"] : Json();
  PQ_RETURN_IF_ERROR(CheckConfigKeys(config, quantized));
  PQ_RETURN_IF_ERROR(VerifyMatching(config, model->profile(), formats));
  PQ_RETURN_IF_ERROR(CheckFiles(out));
  return source == nullptr ? Status() : CheckAgainstSource(out, *source, linears);
}

}  // namespace

Result<std::map<std::string, StoredLinear>> ReadStoredLinears(const Model& model) {
  const ModuleTensors modules = GroupByModule(model.checkpoint());
  LinearMap linears;
  DType dtype = DType::kBF16;
  for (const LinearInfo& info : model.linears()) {
    StoredLinear linear{.format = &SourceFormat(),
                        .out = info.out,
                        .in = info.in,
                        .dtype = info.dtype,
                        .layer = info.part == Part::kText ? info.layer : -1,
                        .packed = info.packed,
                        .unit = info.unit,
                        .scale_group = info.scale_group,
                        .input_group = info.input_group};
    dtype = info.dtype;
    if (!info.packed.tensor.empty()) {
      linears[info.name] = linear;
      continue;
    }
    const auto found = modules.find(info.name);
    if (found == modules.end()) return Status::InvalidInput(info.name + ": has no tensors");
    PQ_ASSIGN_OR_RETURN(linear.format, StoredFormat(info.name, MapStored(found->second)));
    linears[info.name] = linear;
  }
  for (const std::string& name : OtherLinears(model)) {
    StoredLinear& linear = linears[name];
    PQ_ASSIGN_OR_RETURN(linear, LinearFromTensors(name, MapStored(modules.at(name)), dtype));
    linear.unit = linear.scale_group = linear.input_group = FusedName(model.profile(), name);
  }
  return linears;
}

Status VerifyCheckpoint(const Checkpoint& out, const Checkpoint* source) {
  return AsUnmet(Verify(out, source));
}

}  // namespace prismaquant

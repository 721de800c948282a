#include "export/verify.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <cstring>
#include <filesystem>
#include <set>
#include <vector>

#include "export/inventory.h"
#include "export/matching.h"

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
  const auto shape = stored.find("weight_shape");
  linear.out = codes.size(0);
  linear.in =
      shape != stored.end() ? shape->second[1].item<int64_t>() : codes.size(1) * (packed ? 2 : 1);
  linear.dtype = IsQuantized(*linear.format) ? dtype : FromScalarType(codes.scalar_type());
  return linear;
}

Status CheckTensors(const LinearMap& linears, const ModuleTensors& modules) {
  for (const auto& [name, linear] : linears) {
    const Status status = CheckStored(*linear.format, MapStored(modules.at(name)), linear.out,
                                      linear.in, linear.dtype);
    if (!status.ok()) return Status::Unmet(fmt::format("{}: {}", name, status.message()));
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

Status CheckFused(const LinearMap& linears, const ModuleTensors& modules, const Profile& profile) {
  std::map<std::string, std::string> leader;  // fused layer -> its first module
  for (const auto& [name, linear] : linears) {
    const auto [first, added] = leader.emplace(FusedName(profile, name), name);
    if (added) continue;
    const Format& expected = *linears.at(first->second).format;
    if (linear.format != &expected) {
      return Status::Unmet(fmt::format("{}: is {}, but {}, which vLLM fuses with it, is {}", name,
                                       linear.format->name(), first->second, expected.name()));
    }
    for (const char* suffix : {"weight_global_scale", "input_global_scale"}) {
      const auto& mine = modules.at(name);
      if (mine.count(suffix) == 0) continue;
      if (!SameBytes(mine.at(suffix)->bytes, modules.at(first->second).at(suffix)->bytes)) {
        return Status::Unmet(fmt::format("{}: {} differs from that of {}, which vLLM fuses with it",
                                         name, suffix, first->second));
      }
    }
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

Status CheckSameTensor(const TensorView& out, const TensorView& source) {
  if (out.dtype != source.dtype || out.shape != source.shape) {
    return Status::Unmet(fmt::format("tensor {}: is {} [{}], expected {} [{}] as in the source",
                                     out.name, DTypeName(out.dtype), fmt::join(out.shape, ", "),
                                     DTypeName(source.dtype), fmt::join(source.shape, ", ")));
  }
  if (SameBytes(out.bytes, source.bytes)) return {};
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

Status CheckTensorOrigin(const Checkpoint& out, const Checkpoint& source, const LinearMap& linears,
                         const std::string& name) {
  const TensorName parts = SplitTensorName(name);
  const StoredLinear* owner = QuantizedOwner(linears, parts);
  const TensorView* original = source.Find(owner != nullptr ? parts.module + ".weight" : name);
  if (original == nullptr) {
    return Status::Unmet(fmt::format("tensor {}: the source has none such", name));
  }
  if (owner == nullptr) PQ_RETURN_IF_ERROR(CheckSameTensor(*out.Find(name), *original));
  if (owner != nullptr && original->shape != std::vector<int64_t>{owner->out, owner->in}) {
    return Status::Unmet(fmt::format("{}: is [{}, {}], expected [{}] as in the source",
                                     parts.module, owner->out, owner->in,
                                     fmt::join(original->shape, ", ")));
  }
  out.DontNeed({name});
  source.DontNeed({original->name});
  return {};
}

Status CheckAgainstSource(const Checkpoint& out, const Checkpoint& source,
                          const LinearMap& linears) {
  for (const std::string& name : out.names()) {
    PQ_RETURN_IF_ERROR(CheckTensorOrigin(out, source, linears, name));
  }
  for (const std::string& name : source.names()) {
    const TensorName parts = SplitTensorName(name);
    const bool replaced = parts.suffix == "weight" && QuantizedOwner(linears, parts) != nullptr;
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
  PQ_RETURN_IF_ERROR(CheckTensors(linears, modules));
  PQ_RETURN_IF_ERROR(CheckStrays(linears, modules));
  PQ_RETURN_IF_ERROR(CheckFused(linears, modules, model->profile()));

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
    StoredLinear linear{nullptr, info.out, info.in, info.dtype, info.layer};
    const auto found = modules.find(info.name);
    if (found == modules.end()) return Status::InvalidInput(info.name + ": has no tensors");
    PQ_ASSIGN_OR_RETURN(linear.format, StoredFormat(info.name, MapStored(found->second)));
    linears[info.name] = linear;
    dtype = info.dtype;
  }
  for (const std::string& name : OtherLinears(model)) {
    PQ_ASSIGN_OR_RETURN(linears[name], LinearFromTensors(name, MapStored(modules.at(name)), dtype));
  }
  return linears;
}

Status VerifyCheckpoint(const Checkpoint& out, const Checkpoint* source) {
  return AsUnmet(Verify(out, source));
}

}  // namespace prismaquant

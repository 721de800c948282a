#include "evaluate/quantized_linears.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <array>

namespace prismaquant {
namespace {

// Suffixes of the tensors that formats store, and of those that no format of ours does but others'
// do, so that they are not overlooked.
constexpr std::array kSuffixes = {"weight",
                                  "weight_packed",
                                  "weight_scale",
                                  "weight_global_scale",
                                  "input_global_scale",
                                  "weight_shape",
                                  "weight_zero_point",
                                  "weight_g_idx",
                                  "input_scale",
                                  "input_zero_point"};

StoredTensors MapTensors(const Checkpoint& checkpoint, const LinearInfo& linear) {
  StoredTensors tensors;
  const PackedSlice& packed = linear.packed;
  if (!packed.tensor.empty()) {
    const at::Tensor experts = TensorFromView(*checkpoint.Find(packed.tensor));
    tensors["weight"] = experts[packed.expert].narrow(0, packed.row, linear.out);
    return tensors;
  }
  for (const char* suffix : kSuffixes) {
    const TensorView* view = checkpoint.Find(fmt::format("{}.{}", linear.name, suffix));
    if (view != nullptr) tensors[suffix] = TensorFromView(*view);
  }
  return tensors;
}

std::string SuffixList(const StoredTensors& tensors) {
  if (tensors.empty()) return "none found";
  std::string list;
  for (const auto& [suffix, tensor] : tensors) {
    list += fmt::format("{}{} {}", list.empty() ? "" : ", ", suffix,
                        DTypeName(FromScalarType(tensor.scalar_type())));
  }
  return list;
}

}  // namespace

Result<LinearTensors> FindLinearTensors(const Checkpoint& checkpoint, const LinearInfo& linear) {
  LinearTensors result;
  result.tensors = MapTensors(checkpoint, linear);
  result.format = DetectFormat(result.tensors);
  if (result.format == nullptr) {
    return Status::InvalidInput(fmt::format("{}: the tensors of {} ({}) are in no known format",
                                            checkpoint.folder().string(), linear.name,
                                            SuffixList(result.tensors)));
  }
  const Status checked =
      CheckStored(*result.format, result.tensors, linear.out, linear.in, linear.dtype);
  if (!checked.ok()) {
    return Status::InvalidInput(
        fmt::format("{}: {}: {}", checkpoint.folder().string(), linear.name, checked.message()));
  }
  return result;
}

Result<std::unique_ptr<QuantizedLinears>> QuantizedLinears::Load(const Model& model, int layer,
                                                                 const ComputeOptions& compute,
                                                                 const TensorsOf& tensors_of) {
  auto result = std::make_unique<QuantizedLinears>();
  for (const LinearInfo& linear : model.LayerLinears(layer)) {
    PQ_ASSIGN_OR_RETURN(LinearTensors stored, tensors_of(linear));
    PQ_ASSIGN_OR_RETURN(const at::Tensor bias, model.LoadBias(linear));
    Entry& entry = result->entries_[linear.name];
    entry.format = stored.format;
    entry.weight = stored.format->Decode(stored.tensors).to(compute.dtype);
    entry.bias = bias.defined() ? bias.to(compute.dtype) : bias;
    for (auto& [suffix, tensor] : stored.tensors) {
      if (suffix == "input_global_scale") entry.stored[suffix] = tensor;
    }
  }
  return result;
}

Result<std::unique_ptr<QuantizedLinears>> QuantizedLinears::Load(const Model& model, int layer,
                                                                 const ComputeOptions& compute) {
  return Load(model, layer, compute, [&](const LinearInfo& linear) {
    return FindLinearTensors(model.checkpoint(), linear);
  });
}

at::Tensor QuantizedLinears::Apply(const LinearInfo& linear, const at::Tensor& x) {
  const Entry& entry = entries_.at(linear.name);
  at::Tensor input = x;
  if (entry.format->quantizes_activations() && x.numel() > 0) {
    const auto scale = entry.stored.find("input_global_scale");
    const at::Tensor global = scale == entry.stored.end() ? at::Tensor() : scale->second;
    const bool same_scale =
        !global.defined() || (last_scale_.defined() && at::equal(global, last_scale_));
    if (last_format_ != entry.format || !same_scale || !last_input_.is_same(x)) {
      last_quantized_ = entry.format->QuantizeActivation(x, entry.stored);
      last_format_ = entry.format;
      last_input_ = x;
      last_scale_ = global;
    }
    input = last_quantized_;
  }
  return MultiplyLinear(input, entry.weight, entry.bias);
}

}  // namespace prismaquant

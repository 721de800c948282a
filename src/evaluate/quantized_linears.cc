#include "evaluate/quantized_linears.h"

#include <fmt/format.h>
#include <torch/torch.h>

namespace prismaquant {
namespace {

// Every tensor "<linear>.<suffix>" but the bias.
StoredTensors MapTensors(const Checkpoint& checkpoint, const std::string& linear) {
  const std::string prefix = linear + ".";
  StoredTensors tensors;
  for (const std::string& name : checkpoint.names()) {
    if (!name.starts_with(prefix) || name.find('.', prefix.size()) != std::string::npos) continue;
    const std::string suffix = name.substr(prefix.size());
    if (suffix != "bias") tensors[suffix] = TensorFromView(*checkpoint.Find(name));
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
  result.tensors = MapTensors(checkpoint, linear.name);
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
                                                                 const ComputeOptions& compute) {
  auto result = std::make_unique<QuantizedLinears>();
  for (const LinearInfo& linear : model.LayerLinears(layer)) {
    PQ_ASSIGN_OR_RETURN(LinearTensors stored, FindLinearTensors(model.checkpoint(), linear));
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

at::Tensor QuantizedLinears::Apply(const LinearInfo& linear, const at::Tensor& x) {
  const Entry& entry = entries_.at(linear.name);
  at::Tensor input = x;
  if (entry.format->quantizes_activations()) {
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
  return at::linear(input, entry.weight,
                    entry.bias.defined() ? std::optional<at::Tensor>(entry.bias) : std::nullopt);
}

}  // namespace prismaquant

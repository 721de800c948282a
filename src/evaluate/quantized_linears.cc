#include "evaluate/quantized_linears.h"

#include <fmt/format.h>
#include <torch/torch.h>

namespace prismaquant {
namespace {

constexpr const char* kSuffixes[] = {"weight", "weight_packed", "weight_scale", "weight_global_scale",
                                     "input_global_scale"};

bool SameTensor(const at::Tensor& a, const at::Tensor& b) {
  return a.defined() && b.defined() && a.const_data_ptr() == b.const_data_ptr() && a.sizes() == b.sizes();
}

}  // namespace

Result<LinearTensors> FindLinearTensors(const Checkpoint& checkpoint, const LinearInfo& linear) {
  LinearTensors result;
  for (const char* suffix : kSuffixes) {
    if (const TensorView* view = checkpoint.Find(linear.name + "." + suffix)) {
      result.tensors[suffix] = TensorFromView(*view);
    }
  }
  result.format = DetectFormat(result.tensors);
  if (result.format == nullptr) {
    std::string found;
    for (const auto& [suffix, tensor] : result.tensors) found += (found.empty() ? "" : ", ") + suffix;
    return Status::InvalidInput(fmt::format("{}: the tensors of {} ({}) are in no known format",
                                            checkpoint.folder().string(), linear.name,
                                            found.empty() ? "none found" : found));
  }
  PQ_RETURN_IF_ERROR(CheckStored(*result.format, result.tensors, linear.out, linear.in, linear.dtype));
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
    const bool same_scale = !global.defined() ||
                            (last_scale_.defined() && at::equal(global, last_scale_));
    if (last_format_ != entry.format || !same_scale || !SameTensor(x, last_input_)) {
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

#include "probe/layer_runners.h"

#include <torch/torch.h>

#include <algorithm>
#include <utility>

#include "formats/extremes.h"

namespace prismaquant {
namespace {

bool AreToCome(const std::vector<WeightErrors>& errors) {
  return std::any_of(errors.begin(), errors.end(), [](const WeightErrors& error) {
    return error.format != &SourceFormat() && !error.of_half[0].defined();
  });
}

}  // namespace

at::Tensor Multiply(const LayerWeights& weights, const std::string& linear, const at::Tensor& x) {
  return MultiplyLinear(x, weights.weight.at(linear), weights.bias.at(linear));
}

Result<LayerWeights> LayerWeights::Load(const Model& model, int layer,
                                        const ComputeOptions& compute) {
  LayerWeights weights;
  for (const LinearInfo& linear : model.LayerLinears(layer)) {
    PQ_ASSIGN_OR_RETURN(const at::Tensor weight, model.LoadWeight(linear));
    PQ_ASSIGN_OR_RETURN(const at::Tensor bias, model.LoadBias(linear));
    weights.stored[linear.name] = weight;
    weights.weight[linear.name] = weight.to(compute.dtype);
    weights.bias[linear.name] = bias.defined() ? bias.to(compute.dtype) : bias;
  }
  return weights;
}

at::Tensor MaximaRunner::Apply(const LinearInfo& linear, const at::Tensor& x) {
  if (x.numel() > 0) {
    double& amax = maxima_[linear.name];
    amax = std::max(amax, LargestMagnitude(x));
  }
  return Multiply(weights_, linear.name, x);
}

double MaximaRunner::maximum(const std::string& linear) const {
  const auto found = maxima_.find(linear);
  return found == maxima_.end() ? 0 : found->second;
}

ProbedRunner::ProbedRunner(const LayerWeights& weights, std::vector<LinearInfo> linears,
                           const std::map<std::string, SharedScales>& scales, LayerErrors errors,
                           int64_t sequences)
    : weights_(weights), linears_(std::move(linears)) {
  statistics_.reserve(linears_.size());
  for (const LinearInfo& linear : linears_) {
    const auto id = static_cast<int>(statistics_.size());
    index_[linear.name] = id;
    std::vector<WeightErrors>& of_linear = errors[linear.name];
    if (AreToCome(of_linear)) kept_.try_emplace(id);
    statistics_.emplace_back(linear, weights.stored.at(linear.name), scales.at(linear.name),
                             std::move(of_linear), sequences);
  }
}

at::Tensor ProbedRunner::Apply(const LinearInfo& linear, const at::Tensor& x) {
  if (x.numel() == 0) return Multiply(weights_, linear.name, x);
  return ApplyProbed(x, weights_.weight.at(linear.name), weights_.bias.at(linear.name),
                     index_.at(linear.name), *this, !linear.ends_layer);
}

void ProbedRunner::Observe(int id, const at::Tensor& x, const at::Tensor& g, const at::Tensor& dx) {
  const at::NoGradGuard no_grad;
  const auto kept = kept_.find(id);
  if (kept != kept_.end()) {
    kept->second.push_back({sequence_, x, g});
  } else {
    statistics_[static_cast<size_t>(id)].AddSequence(sequence_, x, g, dx, buffers_);
  }
}

void ProbedRunner::PriceKept(
    const std::function<std::vector<WeightErrors>(const LinearInfo&)>& errors_of) {
  const at::NoGradGuard no_grad;
  const void* first = nullptr;  // of the inputs that were joined last
  at::Tensor joined;
  for (; !kept_.empty(); kept_.erase(kept_.begin())) {
    const auto& [id, rows] = *kept_.begin();
    const LinearInfo& linear = linears_[static_cast<size_t>(id)];
    if (!rows.empty() && rows.front().x.const_data_ptr() != first) {
      std::vector<at::Tensor> inputs;
      for (const SequenceRows& of_sequence : rows) inputs.push_back(of_sequence.x);
      joined = at::cat(inputs);
      first = rows.front().x.const_data_ptr();
    }
    statistics_[static_cast<size_t>(id)].AddSequences(rows, joined, weights_.weight.at(linear.name),
                                                      errors_of(linear), buffers_);
  }
}

}  // namespace prismaquant

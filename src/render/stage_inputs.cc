#include "render/stage_inputs.h"

#include <torch/torch.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "formats/extremes.h"

namespace prismaquant {
namespace {

constexpr int64_t kSampledTokens = 4096;
// Of the inputs' relative error, what a larger headroom may add to it.
constexpr double kHeadroomLoss = 0.01;

bool HasInputScale(const Format& format) {
  for (const TensorSpec& tensor : format.Layout(1, 128, DType::kBF16)) {
    if (tensor.name == "input_global_scale") return true;
  }
  return false;
}

// Summed over the tokens, |Q(x) - x|^2 / |x|^2: a few tokens with huge inputs count no more than
// others.
double RelativeError(const std::vector<at::Tensor>& tokens, const Format& format, double range) {
  double sum = 0;
  for (const at::Tensor& x : tokens) {
    const at::Tensor wide = x.to(at::kFloat);
    const at::Tensor error = format.QuantizeActivation(wide, {.input_amax = range}) - wide;
    const at::Tensor largest =
        wide.abs().amax(1, true).clamp_min(std::numeric_limits<float>::min());
    const at::Tensor squares = (wide / largest).square().sum(1).clamp_min(1);
    sum += ((error / largest).square().sum(1) / squares).sum(at::kDouble).item<double>();
  }
  return sum;
}

}  // namespace

InputSet::InputSet(std::vector<at::Tensor> inputs) : inputs_(std::move(inputs)) {
  for (const at::Tensor& x : inputs_) {
    if (x.numel() == 0) continue;
    amax_ = std::max(amax_, LargestMagnitude(x));
    tokens_ += x.numel() / x.size(-1);
  }
}

const std::vector<at::Tensor>& InputSet::For(const Format& format, const SharedScales& scales) {
  if (!format.quantizes_activations()) return inputs_;
  std::vector<at::Tensor>& quantized = quantized_[&format];
  if (quantized.empty()) {
    for (const at::Tensor& x : inputs_) {
      quantized.push_back(x.numel() == 0 ? x : format.QuantizeActivation(x, scales));
    }
  }
  return quantized;
}

std::vector<at::Tensor> InputSet::EveryNth(int64_t step) const {
  std::vector<at::Tensor> tokens;
  for (const at::Tensor& x : inputs_) {
    if (x.numel() == 0) continue;
    const at::Tensor rows = x.reshape({-1, x.size(-1)});
    tokens.push_back(rows.slice(0, 0, rows.size(0), step));
  }
  return tokens;
}

bool InputSet::IsSame(const std::vector<at::Tensor>& inputs) const {
  return std::equal(inputs_.begin(), inputs_.end(), inputs.begin(), inputs.end(),
                    [](const at::Tensor& a, const at::Tensor& b) { return a.is_same(b); });
}

StageInputs::StageInputs(const std::vector<LinearInfo>& stage,
                         const std::vector<std::vector<at::Tensor>>& inputs) {
  for (size_t i = 0; i < stage.size(); ++i) {
    std::vector<at::Tensor> own;
    own.reserve(inputs.size());
    for (const std::vector<at::Tensor>& of_sequence : inputs) own.push_back(of_sequence[i]);
    if (!sets_.empty() && sets_.back()->IsSame(own)) {
      sets_.push_back(sets_.back());
    } else {
      sets_.push_back(std::make_shared<InputSet>(std::move(own)));
    }
    Group& group = groups_[stage[i].input_group];
    group.amax = std::max(group.amax, sets_.back()->amax());
    if (group.sets.empty() || group.sets.back() != sets_.back().get()) {
      group.sets.push_back(sets_.back().get());
    }
  }
}

double StageInputs::GroupRange(const std::string& input_group, const Format& format) {
  Group& group = groups_.at(input_group);
  const auto [found, is_new] = group.ranges.emplace(&format, group.amax);
  double& range = found->second;
  if (!is_new || group.amax == 0 || !HasInputScale(format)) return range;
  const std::vector<at::Tensor> tokens = group.Sample();
  const double least = RelativeError(tokens, format, group.amax);
  for (double headroom = kLargestHeadroom; headroom > 1; headroom /= 2) {
    const double wide = group.amax * headroom;
    if (wide > std::numeric_limits<float>::max()) continue;
    if (RelativeError(tokens, format, wide) > (1 + kHeadroomLoss) * least) continue;
    range = wide;
    break;
  }
  return range;
}

std::vector<at::Tensor> StageInputs::Group::Sample() const {
  int64_t all = 0;
  for (const InputSet* set : sets) all += set->tokens();
  const int64_t step = std::max(all / kSampledTokens, int64_t{1});
  std::vector<at::Tensor> sample;
  for (const InputSet* set : sets) {
    for (at::Tensor& x : set->EveryNth(step)) sample.push_back(std::move(x));
  }
  return sample;
}

}  // namespace prismaquant

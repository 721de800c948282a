#include "render/stage_inputs.h"

#include <torch/torch.h>

#include <algorithm>
#include <utility>

#include "formats/extremes.h"

namespace prismaquant {

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
    double& amax = maxima_[stage[i].input_group];
    amax = std::max(amax, sets_.back()->amax());
  }
}

}  // namespace prismaquant

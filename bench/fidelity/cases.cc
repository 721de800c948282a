#include "bench/fidelity/cases.h"

#include <torch/torch.h>

#include <algorithm>
#include <utility>

#include "probe/loss.h"

namespace prismaquant {
namespace {

// Apart from the streams of the labels.
constexpr uint64_t kDrawStream = uint64_t{1} << 62;

// What Linears of a layer share with the given one.
SharedScales ScalesOf(const SourceBody& body, const LinearInfo& linear,
                      const std::map<std::string, double>& input_amax) {
  SharedScales scales;
  for (const LinearInfo& other : body.model().LayerLinears(linear.layer)) {
    if (other.scale_group == linear.scale_group) {
      const at::Tensor& weight = body.weights(linear.layer).weight.at(other.name);
      scales.weight_amax = std::max(scales.weight_amax, weight.abs().max().item<double>());
    }
    if (other.input_group == linear.input_group) {
      scales.input_amax = std::max(scales.input_amax, input_amax.at(other.name));
    }
  }
  return scales;
}

}  // namespace

std::vector<LinearInfo> DrawLinears(const Model& model, int64_t count, uint64_t seed) {
  std::vector<std::pair<double, size_t>> order;
  for (size_t i = 0; i < model.linears().size(); ++i) {
    const LinearInfo& linear = model.linears()[i];
    if (linear.part != Part::kText || !linear.allocatable) continue;
    order.emplace_back(UniformAt(seed, kDrawStream, i), i);
  }
  std::sort(order.begin(), order.end());
  if (static_cast<int64_t>(order.size()) > count) order.resize(static_cast<size_t>(count));
  std::sort(order.begin(), order.end(),
            [](const auto& a, const auto& b) { return a.second < b.second; });
  std::vector<LinearInfo> linears;
  linears.reserve(order.size());
  for (const auto& [place, index] : order) linears.push_back(model.linears()[index]);
  return linears;
}

std::vector<FidelityCase> MakeCases(const SourceBody& body, const std::vector<LinearInfo>& linears,
                                    const std::map<std::string, double>& input_amax,
                                    const std::vector<const Format*>& formats) {
  std::vector<FidelityCase> cases;
  for (const LinearInfo& linear : linears) {
    FidelityCase& added = cases.emplace_back();
    added.linear = linear;
    added.scales = ScalesOf(body, linear, input_amax);
    for (const Format* format : formats) {
      if (format->Supports(linear.out, linear.in)) added.formats.push_back(format);
    }
  }
  return cases;
}

at::Tensor RoundedWeight(const SourceBody& body, const FidelityCase& fidelity_case,
                         const Format& format) {
  const LinearInfo& linear = fidelity_case.linear;
  const at::Tensor& weight = body.weights(linear.layer).weight.at(linear.name);
  return format.Decode(format.Encode(weight, fidelity_case.scales, linear.dtype));
}

}  // namespace prismaquant

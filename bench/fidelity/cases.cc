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

std::vector<FidelityCase> AllCases(const Model& model, bool units) {
  std::vector<FidelityCase> cases;
  std::map<std::string, size_t> places;
  for (const LinearInfo& linear : model.linears()) {
    if (linear.part != Part::kText || !linear.allocatable) continue;
    if (units && linear.is_expert) continue;
    const std::string& name = units ? linear.unit : linear.name;
    const auto [place, added] = places.try_emplace(name, cases.size());
    if (added) cases.push_back({.name = name});
    cases[place->second].linears.push_back(linear);
  }
  return cases;
}

}  // namespace

std::vector<FidelityCase> DrawCases(const Model& model, const DrawOptions& options) {
  std::vector<FidelityCase> cases = AllCases(model, options.units);
  std::vector<std::pair<double, size_t>> order;
  for (size_t i = 0; i < cases.size(); ++i) {
    order.emplace_back(UniformAt(options.seed, kDrawStream, i), i);
  }
  std::sort(order.begin(), order.end());
  order.resize(std::min(order.size(), static_cast<size_t>(options.count)));
  std::sort(order.begin(), order.end(),
            [](const auto& a, const auto& b) { return a.second < b.second; });
  std::vector<FidelityCase> drawn;
  drawn.reserve(order.size());
  for (const auto& [place, index] : order) drawn.push_back(std::move(cases[index]));
  return drawn;
}

void CompleteCases(const SourceBody& body, const std::map<std::string, double>& input_amax,
                   const std::vector<const Format*>& formats, std::vector<FidelityCase>& cases) {
  for (FidelityCase& one : cases) {
    one.scales = ScalesOf(body, one.linears.front(), input_amax);
    for (const Format* format : formats) {
      const bool fits = std::all_of(
          one.linears.begin(), one.linears.end(),
          [&](const LinearInfo& linear) { return format->Supports(linear.out, linear.in); });
      if (fits) one.formats.push_back(format);
    }
  }
}

at::Tensor RoundedWeight(const SourceBody& body, const FidelityCase& fidelity_case,
                         const LinearInfo& linear, const Format& format) {
  const at::Tensor& weight = body.weights(linear.layer).weight.at(linear.name);
  return format.Decode(format.Encode(weight, fidelity_case.scales, linear.dtype));
}

}  // namespace prismaquant

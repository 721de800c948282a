#include "probe/gptq_errors.h"

#include <torch/torch.h>

#include <utility>

#include "round/gptq.h"

namespace prismaquant {
namespace {

// The half that a rounding by the other one is judged by, or, if it saw no tokens, that other one.
const InputMoments& Judge(const std::array<InputMoments, 2>& moments, size_t half) {
  return moments[half].tokens() > 0 ? moments[half] : moments[1 - half];
}

}  // namespace

MomentsRunner::MomentsRunner(const LayerWeights& weights,
                             const std::map<std::string, SharedScales>& scales,
                             std::map<std::string, at::Tensor> token_weights,
                             std::span<const Format* const> formats)
    : weights_(weights),
      scales_(scales),
      token_weights_(std::move(token_weights)),
      formats_(formats.begin(), formats.end()) {}

MomentsRunner::Halves MomentsRunner::NoInputs(int64_t in) {
  return {Half{InputMoments(in), {}}, Half{InputMoments(in), {}}};
}

at::Tensor MomentsRunner::Apply(const LinearInfo& linear, const at::Tensor& x) {
  at::Tensor y = Multiply(weights_, linear.name, x);
  if (x.numel() == 0 || !linear.allocatable) return y;
  const at::Tensor rows = x.reshape({-1, linear.in});
  const auto found = token_weights_.find(linear.name);
  int64_t& seen = tokens_[linear.name];
  const at::Tensor weights =
      found == token_weights_.end() ? at::Tensor() : found->second.narrow(0, seen, rows.size(0));
  seen += rows.size(0);
  auto halves = halves_.find(linear.name);
  if (halves == halves_.end()) {
    halves = halves_.try_emplace(linear.name, NoInputs(linear.in)).first;
  }
  Half& half = halves->second[half_];
  half.moments.Add(rows, weights);
  activations_.SetInput(rows);
  for (const Format* format : formats_) {
    if (!format->quantizes_activations() || !format->Supports(linear.out, linear.in)) continue;
    at::Tensor squares = activations_.Error(*format, scales_.at(linear.name)).square();
    if (weights.defined()) squares = squares * weights.unsqueeze(1);
    at::Tensor& noise = half.noise[format];
    noise = noise.defined() ? noise + squares.sum(0) : squares.sum(0);
  }
  return y;
}

Result<WeightErrors> MomentsRunner::Round(const LinearInfo& linear, const Format& format,
                                          const Halves& halves) const {
  const auto moments_of = [&](const Half& half) {
    const auto noise = half.noise.find(&format);
    return noise == half.noise.end() ? half.moments : half.moments.WithNoise(noise->second);
  };
  const std::array<InputMoments, 2> moments = {moments_of(halves[0]), moments_of(halves[1])};
  const at::Tensor weight = weights_.stored.at(linear.name).to(at::kFloat);
  const at::ScalarType compute = weights_.weight.at(linear.name).scalar_type();
  const GptqOptions options{.products = ProductType(compute)};
  std::array<at::Tensor, 2> errors;
  for (size_t h = 0; h < 2; ++h) {
    PQ_ASSIGN_OR_RETURN(
        const GptqResult result,
        RenderGuarded(format, weight, weight,
                      FactorHessian(format, moments[1 - h].hessian(), options), Judge(moments, h),
                      scales_.at(linear.name), linear.dtype, options));
    errors[h] = result.decoded - weight;
  }
  return WeightErrors(format, errors[0], errors[1], ProductType(compute));
}

Result<LayerErrors> MomentsRunner::Errors(const std::vector<LinearInfo>& linears) const {
  LayerErrors errors;
  for (const LinearInfo& linear : linears) {
    if (!linear.allocatable) continue;
    const auto found = halves_.find(linear.name);
    const Halves halves = found == halves_.end() ? NoInputs(linear.in) : found->second;
    for (const Format* format : formats_) {
      if (!format->Supports(linear.out, linear.in)) continue;
      PQ_ASSIGN_OR_RETURN(WeightErrors rounded, Round(linear, *format, halves));
      errors[linear.name].push_back(std::move(rounded));
    }
  }
  return errors;
}

}  // namespace prismaquant

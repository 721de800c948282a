#include "probe/statistics.h"

#include <torch/torch.h>

#include <utility>

namespace prismaquant {
namespace {

// Products are summed along rows in float32 (pairwise, by ATen) and the row sums in float64.
double InnerProduct(const at::Tensor& a, const at::Tensor& b) {
  return (a * b).sum(-1).sum(at::kDouble).item<double>();
}

// Of the parts of a sum.
struct Parts {
  double sum = 0, squares = 0;
};
Parts PartsOf(const at::Tensor& parts) {
  const at::Tensor wide = parts.to(at::kDouble);
  return {.sum = wide.sum().item<double>(), .squares = wide.square().sum().item<double>()};
}

}  // namespace

const at::Tensor& ActivationErrors::SetInput(const at::Tensor& x) {
  const bool same = source_.defined() && source_.const_data_ptr() == x.const_data_ptr() &&
                    source_.sizes() == x.sizes();
  if (same) return x_;
  source_ = x;
  x_ = x.to(at::kFloat);
  errors_.clear();
  return x_;
}

const at::Tensor& ActivationErrors::Error(const Format& format, const SharedScales& scales) {
  at::Tensor& error = errors_[&format];
  if (!error.defined()) error = format.QuantizeActivation(x_, scales) - x_;
  return error;
}

double WeightErrors::MeanSquare() const {
  const auto mean_square = [](const at::Tensor& error) {
    return error.defined() ? InnerProduct(error, error) / static_cast<double>(error.numel()) : 0;
  };
  const double first = mean_square(of_half[0]);
  return cross_fitted() ? (first + mean_square(of_half[1])) / 2 : first;
}

std::vector<WeightErrors> NearestErrors(const LinearInfo& linear, const at::Tensor& weight,
                                        const SharedScales& scales,
                                        std::span<const Format* const> formats) {
  std::vector<WeightErrors> errors;
  if (!linear.allocatable) return errors;
  const at::Tensor weight_f32 = weight.to(at::kFloat);
  for (const Format* format : formats) {
    if (!format->Supports(linear.out, linear.in)) continue;
    WeightErrors& entry = errors.emplace_back();
    entry.format = format;
    if (format == &SourceFormat()) continue;
    const at::Tensor error =
        format->Decode(format->Encode(weight_f32, scales, linear.dtype)) - weight_f32;
    entry.of_half = {error, error};
  }
  return errors;
}

LinearStatistics::LinearStatistics(const LinearInfo& linear, const at::Tensor& weight,
                                   const SharedScales& scales, std::vector<WeightErrors> errors,
                                   int64_t sequences)
    : scales_(scales), errors_(std::move(errors)) {
  stats_.name = linear.name;
  stats_.layer = linear.layer;
  stats_.weight_amax = weight.abs().max().to(at::kDouble).item<double>();
  stats_.input_amax = scales.input_amax;
  sums_.assign(errors_.size(), Sums(sequences));
  in_sample_ = sums_;
}

void LinearStatistics::AddSequence(int64_t sequence, const at::Tensor& x, const at::Tensor& g,
                                   const at::Tensor& dx, ActivationErrors& activations) {
  const at::Tensor& x_f32 = activations.SetInput(x);
  const at::Tensor g_f32 = g.to(at::kFloat);
  const at::Tensor grad_squares = g_f32.square().sum(-1);
  token_weights_.push_back(grad_squares);
  stats_.tokens += g.size(0);
  stats_.grad_square += grad_squares.sum(at::kDouble).item<double>();
  stats_.fisher_trace += (grad_squares * x_f32.square().sum(-1)).sum(at::kDouble).item<double>();
  if (errors_.empty()) return;

  const at::Tensor weight_gradient = at::matmul(g_f32.t(), x_f32);
  const at::Tensor dx_f32 = dx.to(at::kFloat);
  const auto n = static_cast<size_t>(sequence);
  const size_t half = n % 2;
  for (size_t i = 0; i < errors_.size(); ++i) {
    const WeightErrors& error = errors_[i];
    const Parts inputs = error.format->quantizes_activations()
                             ? PartsOf((dx_f32 * activations.Error(*error.format, scales_)).sum(0))
                             : Parts();
    const auto put = [&](const at::Tensor& of_weight, Sums& sums) {
      const Parts rows =
          of_weight.defined() ? PartsOf((weight_gradient * of_weight).sum(-1)) : Parts();
      sums.directional[n] = rows.sum + inputs.sum;
      sums.squares[n] = rows.squares + inputs.squares;
    };
    put(error.of_half[half], sums_[i]);
    if (error.cross_fitted()) put(error.of_half[1 - half], in_sample_[i]);
  }
}

LinearStats LinearStatistics::Stats() const { return stats_; }

std::vector<LinearCost> LinearStatistics::Costs() const {
  std::vector<LinearCost> costs;
  for (size_t i = 0; i < errors_.size(); ++i) {
    const WeightErrors& error = errors_[i];
    LinearCost cost{.linear = stats_.name,
                    .format = std::string(error.format->name()),
                    .rounding = error.cross_fitted() ? Rounding::kGptq : Rounding::kNearest,
                    .weight_mse = error.MeanSquare(),
                    .directional = sums_[i].directional,
                    .squares = sums_[i].squares};
    costs.push_back(cost);
    if (!error.cross_fitted()) continue;
    cost.rounding = Rounding::kGptqInSample;
    cost.directional = in_sample_[i].directional;
    cost.squares = in_sample_[i].squares;
    costs.push_back(std::move(cost));
  }
  return costs;
}

at::Tensor LinearStatistics::TokenWeights() const {
  return token_weights_.empty() ? at::empty({0}) : at::cat(token_weights_);
}

}  // namespace prismaquant

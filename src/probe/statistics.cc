#include "probe/statistics.h"

#include <torch/torch.h>

namespace prismaquant {
namespace {

// Products are summed along rows in float32 (pairwise, by ATen) and the row sums in float64.
double InnerProduct(const at::Tensor& a, const at::Tensor& b) {
  return (a * b).sum(-1).sum(at::kDouble).item<double>();
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

LinearStatistics::LinearStatistics(const LinearInfo& linear, const at::Tensor& weight,
                                   const SharedScales& scales,
                                   std::span<const Format* const> formats, int64_t sequences)
    : scales_(scales) {
  stats_.name = linear.name;
  stats_.layer = linear.layer;
  const at::Tensor weight_f32 = weight.to(at::kFloat);
  stats_.weight_amax = weight_f32.abs().max().item<double>();
  stats_.input_amax = scales.input_amax;
  if (!linear.allocatable) return;
  for (const Format* format : formats) {
    if (!format->Supports(linear.out, linear.in)) continue;
    formats_.push_back(format);
    costs_.push_back({.linear = linear.name,
                      .format = std::string(format->name()),
                      .weight_mse = 0,
                      .directional = std::vector<double>(static_cast<size_t>(sequences), 0)});
    if (format == &SourceFormat()) {
      weight_errors_.emplace_back();
      continue;
    }
    const at::Tensor error =
        format->Decode(format->Encode(weight_f32, scales, linear.dtype)) - weight_f32;
    costs_.back().weight_mse = InnerProduct(error, error) / static_cast<double>(weight_f32.numel());
    weight_errors_.push_back(error);
  }
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
  if (formats_.empty()) return;

  const at::Tensor weight_gradient = at::matmul(g_f32.t(), x_f32);
  const at::Tensor dx_f32 = dx.to(at::kFloat);
  for (size_t i = 0; i < formats_.size(); ++i) {
    double s = 0;
    if (weight_errors_[i].defined()) s += InnerProduct(weight_gradient, weight_errors_[i]);
    if (formats_[i]->quantizes_activations())
      s += InnerProduct(dx_f32, activations.Error(*formats_[i], scales_));
    costs_[i].directional[static_cast<size_t>(sequence)] = s;
  }
}

LinearStats LinearStatistics::Stats() const { return stats_; }

std::vector<LinearCost> LinearStatistics::Costs() const { return costs_; }

at::Tensor LinearStatistics::TokenWeights() const {
  return token_weights_.empty() ? at::empty({0}) : at::cat(token_weights_);
}

}  // namespace prismaquant

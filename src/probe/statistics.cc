#include "probe/statistics.h"

#include <torch/torch.h>

#include <algorithm>
#include <utility>

#include "formats/extremes.h"
#include "kernels/row_products.h"

namespace prismaquant {
namespace {

// Rounded at a time, rows being rounded independently of each other: so many stay in the
// processor's caches.
constexpr int64_t kBlockWeights = 1 << 18;

// Of the parts of a sum.
struct Parts {
  double sum = 0, squares = 0;
};
Parts PartsOf(const at::Tensor& parts) {
  const at::Tensor wide = parts.to(at::kDouble);
  return {.sum = wide.sum().item<double>(), .squares = wide.square().sum().item<double>()};
}

// The parts of <g^T x, dW> by row, of each dW; of an undefined one, none.
std::vector<Parts> RowParts(const at::Tensor& x, const at::Tensor& g,
                            const std::vector<at::Tensor>& errors, StatisticsBuffers& buffers) {
  std::vector<at::Tensor> defined;
  for (const at::Tensor& error : errors) {
    if (error.defined()) defined.push_back(error);
  }
  std::vector<Parts> parts(errors.size());
  if (defined.empty()) return parts;
  const at::ScalarType products = ProductType(g.scalar_type());
  const at::Tensor gradient = buffers.WeightGradient(g.to(products), x.to(products));
  const at::Tensor rows = ops::RowProducts(gradient, defined);
  int64_t next = 0;
  for (size_t i = 0; i < errors.size(); ++i) {
    if (errors[i].defined()) parts[i] = PartsOf(rows[next++]);
  }
  return parts;
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

at::Tensor StatisticsBuffers::WeightGradient(const at::Tensor& g, const at::Tensor& x) {
  const int64_t out = g.size(1), in = x.size(1);
  const bool fits = gradient_.defined() && gradient_.scalar_type() == g.scalar_type() &&
                    gradient_.numel() >= out * in;
  if (!fits) gradient_ = at::empty({out * in}, g.options());
  at::Tensor gradient = gradient_.narrow(0, 0, out * in).view({out, in});
  at::mm_out(gradient, g.t(), x);
  return gradient;
}

WeightErrors::WeightErrors(const Format& of_format, const at::Tensor& first,
                           const at::Tensor& second, at::ScalarType products)
    : format(&of_format) {
  const auto mean_square_of = [](const at::Tensor& error) {
    return ops::InnerProduct(error, error) / static_cast<double>(error.numel());
  };
  of_half = {first.to(products), second.to(products)};
  mean_square = (mean_square_of(first) + mean_square_of(second)) / 2;
}

NearestError RoundToNearest(const Format& format, const at::Tensor& weight,
                            const SharedScales& scales, DType source, at::ScalarType products) {
  const int64_t out = weight.size(0), rows = std::max<int64_t>(kBlockWeights / weight.size(1), 1);
  NearestError result{.error = at::empty(weight.sizes(), products)};
  for (int64_t begin = 0; begin < out; begin += rows) {
    const int64_t count = std::min(rows, out - begin);
    const at::Tensor block = weight.narrow(0, begin, count).to(at::kFloat);
    const at::Tensor error = format.Decode(format.Encode(block, scales, source)).sub_(block);
    result.squares += ops::InnerProduct(error, error);
    result.error.narrow(0, begin, count).copy_(error);
  }
  return result;
}

std::vector<WeightErrors> ErrorsToCome(const LinearInfo& linear,
                                       std::span<const Format* const> formats) {
  std::vector<WeightErrors> errors;
  if (!linear.allocatable) return errors;
  for (const Format* format : formats) {
    if (format->Supports(linear.out, linear.in)) errors.emplace_back().format = format;
  }
  return errors;
}

std::vector<WeightErrors> NearestErrors(const LinearInfo& linear, const at::Tensor& weight,
                                        const SharedScales& scales,
                                        std::span<const Format* const> formats,
                                        at::ScalarType products) {
  std::vector<WeightErrors> errors = ErrorsToCome(linear, formats);
  for (WeightErrors& of_format : errors) {
    if (of_format.format == &SourceFormat()) continue;
    const NearestError found =
        RoundToNearest(*of_format.format, weight, scales, linear.dtype, products);
    of_format.of_half = {found.error, found.error};
    of_format.mean_square = found.squares / static_cast<double>(weight.numel());
  }
  return errors;
}

LinearStatistics::LinearStatistics(const LinearInfo& linear, const at::Tensor& weight,
                                   const SharedScales& scales, std::vector<WeightErrors> errors,
                                   int64_t sequences)
    : scales_(scales), errors_(std::move(errors)) {
  stats_.name = linear.name;
  stats_.layer = linear.layer;
  stats_.weight_amax = LargestMagnitude(weight);
  stats_.input_amax = scales.input_amax;
  sums_.assign(errors_.size(), Sums(sequences));
  in_sample_ = sums_;
  if (!linear.is_expert) outputs_.emplace();
}

void LinearStatistics::AddTokens(const at::Tensor& x_f32, const at::Tensor& g) {
  const at::Tensor g_f32 = g.to(at::kFloat);
  const at::Tensor grad_squares = g_f32.square().sum(-1);
  token_weights_.push_back(grad_squares);
  if (outputs_) outputs_->Add(g_f32, grad_squares);
  stats_.tokens += g.size(0);
  stats_.grad_square += grad_squares.sum(at::kDouble).item<double>();
  stats_.fisher_trace += (grad_squares * x_f32.square().sum(-1)).sum(at::kDouble).item<double>();
}

void LinearStatistics::AddSequence(int64_t sequence, const at::Tensor& x, const at::Tensor& g,
                                   const at::Tensor& dx, StatisticsBuffers& buffers) {
  AddTokens(buffers.activations.SetInput(x), g);
  if (errors_.empty()) return;

  const size_t half = static_cast<size_t>(sequence) % 2;
  std::vector<at::Tensor> weight_errors;  // a cross-fitted one's in sample behind the one to price
  for (const WeightErrors& error : errors_) {
    weight_errors.push_back(error.of_half[half]);
    if (error.cross_fitted()) weight_errors.push_back(error.of_half[1 - half]);
  }
  const std::vector<Parts> rows = RowParts(x, g, weight_errors, buffers);
  const at::Tensor dx_f32 = dx.to(at::kFloat);
  const auto n = static_cast<size_t>(sequence);
  size_t next = 0;
  for (size_t i = 0; i < errors_.size(); ++i) {
    const Format& format = *errors_[i].format;
    const Parts inputs = format.quantizes_activations()
                             ? PartsOf((dx_f32 * buffers.activations.Error(format, scales_)).sum(0))
                             : Parts();
    const auto put = [&](const Parts& of_rows, Sums& sums) {
      sums.directional[n] = of_rows.sum + inputs.sum;
      sums.squares[n] = of_rows.squares + inputs.squares;
    };
    put(rows[next++], sums_[i]);
    if (errors_[i].cross_fitted()) put(rows[next++], in_sample_[i]);
  }
}

void LinearStatistics::AddSequences(std::span<const SequenceRows> rows, const at::Tensor& x,
                                    const at::Tensor& weight,
                                    const std::vector<WeightErrors>& errors,
                                    StatisticsBuffers& buffers) {
  for (size_t i = 0; i < errors.size(); ++i) errors_[i].mean_square = errors[i].mean_square;
  if (rows.empty()) return;
  std::vector<at::Tensor> gradients;
  for (const SequenceRows& of_sequence : rows) gradients.push_back(of_sequence.g);
  const at::Tensor g = at::cat(gradients);
  const at::Tensor& x_f32 = buffers.activations.SetInput(x);
  AddTokens(x_f32, g);
  if (errors.empty()) return;

  // Ones where a token [.., tokens] belongs to a sequence [sequences, ..].
  const at::Tensor belongs = at::zeros({static_cast<int64_t>(rows.size()), g.size(0)});
  int64_t first = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    const int64_t tokens = gradients[i].size(0);
    belongs[static_cast<int64_t>(i)].narrow(0, first, tokens).fill_(1);
    first += tokens;
  }
  const auto add = [&](const at::Tensor& products, Sums& sums) {
    const at::Tensor parts = at::matmul(belongs, products).to(at::kDouble);
    const at::Tensor sum = parts.sum(1), squares = parts.square().sum(1);
    for (size_t i = 0; i < rows.size(); ++i) {
      const auto n = static_cast<size_t>(rows[i].sequence);
      sums.directional[n] += sum.const_data_ptr<double>()[i];
      sums.squares[n] += squares.const_data_ptr<double>()[i];
    }
  };
  const at::ScalarType type = ProductType(g.scalar_type());
  const at::Tensor g_f32 = g.to(at::kFloat), dx = at::matmul(g, weight).to(at::kFloat);
  for (size_t i = 0; i < errors.size(); ++i) {
    const Format& format = *errors[i].format;
    const at::Tensor& error = errors[i].of_half[0];
    if (error.defined()) add(at::matmul(x.to(type), error.t()).to(at::kFloat) * g_f32, sums_[i]);
    if (format.quantizes_activations()) {
      add(dx * buffers.activations.Error(format, scales_), sums_[i]);
    }
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
                    .weight_mse = error.mean_square,
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

at::Tensor LinearStatistics::OutputFactor() const {
  const at::Tensor factor = outputs_ ? outputs_->Factor() : at::Tensor();
  return factor.defined() ? factor.to(at::kBFloat16) : factor;
}

}  // namespace prismaquant

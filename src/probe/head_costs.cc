#include "probe/head_costs.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "base/progress.h"
#include "formats/extremes.h"
#include "probe/statistics.h"

namespace prismaquant {
namespace {

// Of `count` positions, with what the softmax at each of them needs.
struct Positions {
  at::Tensor x;                      // normed hidden states, float32 [count, hidden_size]
  at::Tensor labels, log_sums;       // [count]
  std::vector<int64_t> sequence_of;  // [count]
  int64_t represented = 0;           // positions that these stand for

  double Scale() const {
    return static_cast<double>(represented) / static_cast<double>(sequence_of.size());
  }
};

class HeadPricer {
 public:
  HeadPricer(const LinearInfo& linear, const at::Tensor& weight,
             std::span<const Format* const> formats, Positions positions, at::ScalarType products,
             int64_t sequences)
      : linear_(linear),
        weight_(weight),
        positions_(std::move(positions)),
        products_(products),
        sequences_(sequences) {
    scales_ = {.weight_amax = 0, .input_amax = LargestMagnitude(positions_.x)};
    for (const at::Tensor& rows : weight.split(kHeadSliceRows)) {
      scales_.weight_amax = std::max(scales_.weight_amax, LargestMagnitude(rows));
    }
    const auto count = static_cast<int64_t>(positions_.sequence_of.size());
    grad_squares_ = at::zeros({count}, at::kDouble);
    for (const Format* format : formats) {
      if (!format->Supports(linear.out, linear.in)) continue;
      Priced& priced = priced_.emplace_back();
      priced.format = format;
      priced.sums = at::zeros({count}, at::kDouble);
      if (format == &SourceFormat() || !format->quantizes_activations()) continue;
      const at::Tensor x = format->QuantizeActivation(positions_.x, scales_);
      priced.activation_error = x - positions_.x;
    }
  }

  HeadStatistics Run() {
    Progress progress("probe, lm_head", linear_.out, "rows");
    for (int64_t row = 0; row < linear_.out; row += kHeadSliceRows) {
      const int64_t rows = std::min(kHeadSliceRows, linear_.out - row);
      PriceSlice(row, weight_.narrow(0, row, rows));
      progress.Advance(rows);
    }
    const double scale = positions_.Scale();
    const at::Tensor energy = positions_.x.square().sum(-1).to(at::kDouble);
    HeadStatistics found;
    found.stats = {.name = linear_.name,
                   .layer = linear_.layer,
                   .weight_amax = scales_.weight_amax,
                   .input_amax = scales_.input_amax,
                   .fisher_trace = scale * (grad_squares_ * energy).sum().item<double>(),
                   .grad_square = scale * grad_squares_.sum().item<double>(),
                   .tokens = positions_.represented};
    for (const Priced& priced : priced_) found.costs.push_back(Cost(priced));
    return found;
  }

 private:
  struct Priced {
    const Format* format = nullptr;
    at::Tensor activation_error;  // float32 [positions, in]; undefined if there is none
    at::Tensor sums;              // s_f by position, float64
    double squared_error = 0;     // of the weight, summed
  };

  LinearCost Cost(const Priced& priced) const {
    LinearCost cost{
        .linear = linear_.name,
        .format = std::string(priced.format->name()),
        .weight_mse = priced.squared_error / static_cast<double>(linear_.out * linear_.in),
        .directional = std::vector<double>(static_cast<size_t>(sequences_), 0),
        .squares = std::vector<double>(static_cast<size_t>(sequences_), 0)};
    for (size_t i = 0; i < positions_.sequence_of.size(); ++i) {
      const double s = priced.sums.const_data_ptr<double>()[i];
      const auto n = static_cast<size_t>(positions_.sequence_of[i]);
      cost.directional[n] += std::sqrt(positions_.Scale()) * s;
      cost.squares[n] += positions_.Scale() * s * s;
    }
    return cost;
  }

  // Gradients at the rows [row, row + rows) of the output, float32 [positions, rows].
  at::Tensor Gradient(const at::Tensor& logits, int64_t row) const {
    at::Tensor g = (logits.to(at::kFloat) - positions_.log_sums.unsqueeze(1)).exp();
    const at::Tensor place = positions_.labels - row;
    const at::Tensor inside = at::logical_and(place >= 0, place < logits.size(1));
    const at::Tensor position = at::nonzero(inside).flatten();
    return g.index_put_({position, place.index_select(0, position)}, at::full({}, -1, g.options()),
                        /*accumulate=*/true);
  }

  // a b, and its inner product with the rows of c: float64 [positions].
  at::Tensor ProductWithRows(const at::Tensor& a, const at::Tensor& b, const at::Tensor& c) const {
    return (at::matmul(a, b) * c).sum(-1, false, at::kFloat).to(at::kDouble);
  }

  void PriceSlice(int64_t row, const at::Tensor& weight) {
    const at::Tensor rows = weight.to(products_);
    const at::Tensor logits = at::matmul(positions_.x.to(products_), rows.t());
    const at::Tensor gradient = Gradient(logits, row);
    grad_squares_ += gradient.square().sum(-1).to(at::kDouble);
    const at::Tensor g = gradient.to(products_);
    const at::Tensor passed_on = at::matmul(g, rows).to(at::kFloat);
    for (Priced& priced : priced_) {
      if (priced.format == &SourceFormat()) continue;
      const NearestError found =
          RoundToNearest(*priced.format, weight, scales_, linear_.dtype, products_);
      priced.squared_error += found.squares;
      at::Tensor x = positions_.x;
      if (priced.activation_error.defined()) {
        x = x + priced.activation_error;
        priced.sums += (passed_on * priced.activation_error).sum(-1).to(at::kDouble);
      }
      priced.sums += ProductWithRows(g, found.error, x);
    }
  }

  const LinearInfo& linear_;
  at::Tensor weight_;
  SharedScales scales_;
  Positions positions_;
  at::ScalarType products_;
  int64_t sequences_;
  at::Tensor grad_squares_;  // float64 [positions]
  std::vector<Priced> priced_;
};

// Of all positions of the windows with a loss, every k-th, k as small as kPricedPositions allows.
Positions PickPositions(const OutputHead& head, const Calibration& calibration,
                        const StoredSequences& hidden, const std::vector<SequenceLoss>& losses,
                        LabelRule rule) {
  Positions positions;
  for (int64_t n = 0; n < calibration.text.count(); ++n) {
    const LossSpan span = SpanOf(Part::kText, calibration, n, rule);
    positions.represented += span.end - span.begin;
  }
  const int64_t stride = (positions.represented + kPricedPositions - 1) / kPricedPositions;
  std::vector<at::Tensor> x, labels, log_sums;
  int64_t next = 0;  // picked, counted from the window's first position
  for (int64_t n = 0; n < calibration.text.count(); ++n) {
    const LossSpan span = SpanOf(Part::kText, calibration, n, rule);
    const SequenceLoss& loss = losses[static_cast<size_t>(n)];
    const int64_t count = span.end - span.begin;
    if (next < count) {
      const at::Tensor picked = at::arange(next, count, stride);
      x.push_back(head.Norm(hidden.of(n)[0].index_select(0, picked + span.begin)).to(at::kFloat));
      labels.push_back(loss.labels.index_select(0, picked));
      log_sums.push_back(loss.log_sums.index_select(0, picked));
      positions.sequence_of.insert(positions.sequence_of.end(), static_cast<size_t>(picked.numel()),
                                   n);
      next += picked.numel() * stride;
    }
    next -= count;
  }
  positions.x = at::cat(x);
  positions.labels = at::cat(labels);
  positions.log_sums = at::cat(log_sums);
  return positions;
}

}  // namespace

Result<HeadStatistics> PriceHead(const Model& model, const OutputHead& head,
                                 const Calibration& calibration, const StoredSequences& hidden,
                                 const std::vector<SequenceLoss>& losses,
                                 const ProbeOptions& options,
                                 std::span<const Format* const> formats) {
  const at::NoGradGuard no_grad;
  const LinearInfo linear = model.LayerLinears(model.FindPart(Part::kHead)->first).front();
  PQ_ASSIGN_OR_RETURN(const at::Tensor weight, model.LoadWeight(linear));
  return HeadPricer(linear, weight, formats,
                    PickPositions(head, calibration, hidden, losses, options.labels),
                    options.compute.dtype, calibration.count())
      .Run();
}

}  // namespace prismaquant

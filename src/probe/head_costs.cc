#include "probe/head_costs.h"

#include <torch/torch.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>

#include "base/progress.h"

namespace prismaquant {
namespace {

// Rows of the projection that are worked on at a time.
constexpr int64_t kSliceRows = 8192;

// One window: normed hidden states of the positions with a loss, float32 [positions, hidden_size],
// with what the softmax at each position needs.
struct Window {
  at::Tensor x, labels, log_sums;
};

class HeadPricer {
 public:
  HeadPricer(const LinearInfo& linear, const at::Tensor& weight,
             std::span<const Format* const> formats, std::vector<Window> windows, int64_t sequences)
      : linear_(linear), weight_(weight), windows_(std::move(windows)) {
    scales_.weight_amax = weight.abs().max().to(at::kDouble).item<double>();
    for (const Window& window : windows_) {
      scales_.input_amax = std::max(scales_.input_amax, window.x.abs().max().item<double>());
      grad_squares_.push_back(at::zeros({window.x.size(0)}, at::kDouble));
    }
    for (const Format* format : formats) {
      if (!format->Supports(linear.out, linear.in)) continue;
      formats_.push_back(format);
      costs_.push_back({.linear = linear.name,
                        .format = std::string(format->name()),
                        .directional = std::vector<double>(static_cast<size_t>(sequences), 0),
                        .squares = std::vector<double>(static_cast<size_t>(sequences), 0)});
      token_sums_.emplace_back();
      for (const at::Tensor& squares : grad_squares_) {
        token_sums_.back().push_back(at::zeros_like(squares));
      }
    }
  }

  HeadStatistics Run() {
    Progress progress("probe, lm_head", linear_.out, "rows");
    for (int64_t row = 0; row < linear_.out; row += kSliceRows) {
      const int64_t rows = std::min(kSliceRows, linear_.out - row);
      PriceSlice(row, weight_.narrow(0, row, rows).to(at::kFloat));
      progress.Advance(rows);
    }
    for (size_t i = 0; i < costs_.size(); ++i) {
      for (size_t n = 0; n < windows_.size(); ++n) {
        costs_[i].directional[n] = token_sums_[i][n].sum().item<double>();
        costs_[i].squares[n] = token_sums_[i][n].square().sum().item<double>();
      }
    }
    HeadStatistics found{.costs = std::move(costs_)};
    for (LinearCost& cost : found.costs) {
      cost.weight_mse /= static_cast<double>(linear_.out * linear_.in);
    }
    found.stats = {.name = linear_.name,
                   .layer = linear_.layer,
                   .weight_amax = scales_.weight_amax,
                   .input_amax = scales_.input_amax};
    for (size_t n = 0; n < windows_.size(); ++n) {
      const at::Tensor energy = windows_[n].x.square().sum(-1).to(at::kDouble);
      found.stats.tokens += windows_[n].x.size(0);
      found.stats.grad_square += grad_squares_[n].sum().item<double>();
      found.stats.fisher_trace += (grad_squares_[n] * energy).sum().item<double>();
    }
    return found;
  }

 private:
  // Gradients at the rows [row, row + rows) of the output.
  static at::Tensor Gradient(const Window& window, const at::Tensor& logits, int64_t row) {
    at::Tensor g = (logits - window.log_sums.unsqueeze(1)).exp();
    const at::Tensor place = window.labels - row;
    const at::Tensor inside = at::logical_and(place >= 0, place < logits.size(1));
    const at::Tensor position = at::nonzero(inside).flatten();
    return g.index_put_({position, place.index_select(0, position)}, at::full({}, -1, g.options()),
                        /*accumulate=*/true);
  }

  void PriceSlice(int64_t row, const at::Tensor& weight) {
    std::vector<at::Tensor> decoded;
    for (size_t i = 0; i < formats_.size(); ++i) {
      at::Tensor& rounded = decoded.emplace_back();
      if (formats_[i] == &SourceFormat()) continue;
      rounded = formats_[i]->Decode(formats_[i]->Encode(weight, scales_, linear_.dtype));
      costs_[i].weight_mse += (rounded - weight).square().sum(-1).sum(at::kDouble).item<double>();
    }
    for (size_t n = 0; n < windows_.size(); ++n) {
      const Window& window = windows_[n];
      const at::Tensor logits = at::matmul(window.x, weight.t());
      const at::Tensor g = Gradient(window, logits, row);
      grad_squares_[n] += g.square().sum(-1);
      for (size_t i = 0; i < formats_.size(); ++i) {
        if (!decoded[i].defined()) continue;
        const at::Tensor x = formats_[i]->QuantizeActivation(window.x, scales_);
        const at::Tensor change = at::matmul(x, decoded[i].t()) - logits;
        token_sums_[i][n] += (g * change).sum(-1);
      }
    }
  }

  const LinearInfo& linear_;
  at::Tensor weight_;
  SharedScales scales_;
  std::vector<Window> windows_;
  std::vector<at::Tensor> grad_squares_;  // per window and position
  std::vector<const Format*> formats_;
  std::vector<LinearCost> costs_;
  // s_nf by position, float64: per format and window. Positions have labels of their own, which
  // makes them the independent parts of s_nf.
  std::vector<std::vector<at::Tensor>> token_sums_;
};

}  // namespace

Result<HeadStatistics> PriceHead(const Model& model, const OutputHead& head,
                                 const Calibration& calibration, const StoredSequences& hidden,
                                 const std::vector<SequenceLoss>& losses,
                                 const ProbeOptions& options,
                                 std::span<const Format* const> formats) {
  const at::NoGradGuard no_grad;
  std::vector<Window> windows;
  for (int64_t n = 0; n < calibration.text.count(); ++n) {
    const LossSpan span = SpanOf(Part::kText, calibration, n, options.labels);
    const SequenceLoss& loss = losses[static_cast<size_t>(n)];
    const at::Tensor x = hidden.of(n)[0].narrow(0, span.begin, span.end - span.begin);
    windows.push_back({head.Norm(x).to(at::kFloat), loss.labels, loss.log_sums});
  }
  const LinearInfo linear = model.LayerLinears(model.FindPart(Part::kHead)->first).front();
  PQ_ASSIGN_OR_RETURN(const at::Tensor weight, model.LoadWeight(linear));
  return HeadPricer(linear, weight, formats, std::move(windows), calibration.count()).Run();
}

}  // namespace prismaquant

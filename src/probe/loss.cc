#include "probe/loss.h"

#include <torch/torch.h>

#include <algorithm>
#include <utility>

namespace prismaquant {
namespace {

constexpr int64_t kLargestBlock = 512;  // positions
// Set in the streams of the MTP head's labels.
constexpr uint64_t kMtpStreams = uint64_t{1} << 40;

uint64_t SplitMix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

// Positions whose logits have about `elements` elements, at most kLargestBlock.
int64_t BlockOf(int64_t elements, int64_t vocab_size) {
  return std::clamp<int64_t>(elements / vocab_size, 1, kLargestBlock);
}

// One token per row of probabilities [positions, vocabulary], by inversion of the cumulative
// distribution.
at::Tensor SampleLabels(const at::Tensor& probabilities, int64_t first, uint64_t stream,
                        uint64_t seed) {
  const int64_t positions = probabilities.size(0);
  at::Tensor uniform = at::empty({positions, 1}, at::kDouble);
  for (int64_t i = 0; i < positions; ++i) {
    uniform.data_ptr<double>()[i] = UniformAt(seed, stream, static_cast<uint64_t>(first + i));
  }
  const at::Tensor cumulative = probabilities.cumsum(-1, at::kDouble);
  const at::Tensor threshold = uniform * cumulative.select(-1, -1).unsqueeze(-1);
  return at::searchsorted(cumulative, threshold, /*out_int32=*/false, /*right=*/true)
      .flatten()
      .clamp_max(probabilities.size(-1) - 1);
}

// Collects a sequence's loss, block of positions by block.
class LossSum {
 public:
  LossSum(const std::vector<int32_t>& ids, const LossSpan& span, const ProbeOptions& options)
      : ids_(at::tensor(std::vector<int64_t>(ids.begin(), ids.end()))),
        span_(span),
        options_(options) {}

  // logits [positions, vocabulary] of the positions from `first` on; returns the loss's gradient at
  // them, softmax - onehot(label), in their dtype.
  at::Tensor Add(const at::Tensor& logits, int64_t first) {
    at::Tensor gradient = at::empty_like(logits);
    const int64_t block = BlockOf(kLogitBlockElements, logits.size(1));
    for (int64_t row = 0; row < logits.size(0); row += block) {
      const int64_t count = std::min(block, logits.size(0) - row);
      gradient.narrow(0, row, count)
          .copy_(AddBlock(logits.narrow(0, row, count).to(at::kFloat), first + row));
    }
    return gradient;
  }

  // All but the gradient at the hidden states.
  SequenceLoss Take() && {
    return {
        .gradient = {}, .loss = loss_, .labels = at::cat(labels_), .log_sums = at::cat(log_sums_)};
  }

 private:
  at::Tensor AddBlock(const at::Tensor& logits, int64_t first) {
    const at::Tensor log_sums = at::logsumexp(logits, {-1});
    at::Tensor gradient = (logits - log_sums.unsqueeze(1)).exp_();
    const at::Tensor labels = (options_.labels == LabelRule::kData
                                   ? ids_.narrow(0, first + span_.shift, logits.size(0))
                                   : SampleLabels(gradient, first, span_.stream, options_.seed));
    const at::Tensor places = labels.unsqueeze(1);
    loss_ += (log_sums - logits.gather(1, places).squeeze(1)).sum(at::kDouble).item<double>();
    labels_.push_back(labels);
    log_sums_.push_back(log_sums);
    return gradient.scatter_add_(1, places, at::full_like(places, -1, gradient.options()));
  }

  at::Tensor ids_;
  const LossSpan& span_;
  const ProbeOptions& options_;
  double loss_ = 0;
  std::vector<at::Tensor> labels_ = {at::empty({0}, at::kLong)};
  std::vector<at::Tensor> log_sums_ = {at::empty({0}, at::kFloat)};
};

}  // namespace

double UniformAt(uint64_t seed, uint64_t stream, uint64_t position) {
  const uint64_t bits = SplitMix64(SplitMix64(SplitMix64(seed) ^ stream) ^ position);
  return static_cast<double>(bits >> 11) * 0x1.0p-53;
}

LossSpan SpanOf(Part part, const Calibration& calibration, int64_t sequence, LabelRule labels) {
  const auto tokens = static_cast<int64_t>(calibration.ids(sequence).size());
  const auto stream = static_cast<uint64_t>(sequence);
  const bool sampled = labels == LabelRule::kSampled;
  if (part == Part::kMtp) {
    return {.end = sampled ? tokens - 1 : tokens - 2, .shift = 2, .stream = stream | kMtpStreams};
  }
  if (calibration.IsCaption(sequence)) {
    return {.begin = calibration.caption(sequence).first_label - 1,
            .end = tokens - 1,
            .stream = stream};
  }
  return {.end = sampled ? tokens : tokens - 1, .stream = stream};
}

SequenceLoss LossAndGradient(const OutputHead& head, const at::Tensor& hidden,
                             const std::vector<int32_t>& ids, const LossSpan& span,
                             const ProbeOptions& options) {
  LossSum sum(ids, span, options);
  at::Tensor gradient = at::zeros_like(hidden);
  const int64_t block = BlockOf(kLogitProductElements, head.vocab_size());
  for (int64_t first = span.begin; first < span.end; first += block) {
    const int64_t count = std::min(block, span.end - first);
    const at::Tensor x = hidden.narrow(0, first, count).detach().requires_grad_(true);
    const at::Tensor logits = head.Logits(x);
    const at::Tensor upstream = sum.Add(logits.detach(), first);
    gradient.narrow(0, first, count).copy_(torch::autograd::grad({logits}, {x}, {upstream})[0]);
  }
  SequenceLoss result = std::move(sum).Take();
  result.gradient = gradient;
  return result;
}

}  // namespace prismaquant

#include "probe/loss.h"

#include <torch/torch.h>

#include <algorithm>

namespace prismaquant {
namespace {

// Logits of one block hold at most this many float32 elements.
constexpr int64_t kBlockElements = 8'000'000;
// Set in the streams of the MTP head's labels.
constexpr uint64_t kMtpStreams = uint64_t{1} << 40;

uint64_t SplitMix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

// One token per row of log_probs [positions, vocabulary], by inversion of the cumulative
// distribution.
at::Tensor SampleLabels(const at::Tensor& log_probs, int64_t first, uint64_t stream,
                        uint64_t seed) {
  const int64_t positions = log_probs.size(0);
  at::Tensor uniform = at::empty({positions, 1}, at::kDouble);
  for (int64_t i = 0; i < positions; ++i) {
    uniform.data_ptr<double>()[i] = UniformAt(seed, stream, static_cast<uint64_t>(first + i));
  }
  const at::Tensor cumulative = log_probs.to(at::kDouble).exp().cumsum(-1);
  const at::Tensor threshold = uniform * cumulative.select(-1, -1).unsqueeze(-1);
  return cumulative.le(threshold).sum(-1).clamp_max(log_probs.size(-1) - 1);
}

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
  const at::Tensor targets = at::tensor(std::vector<int64_t>(ids.begin(), ids.end()));
  SequenceLoss result{.gradient = at::zeros_like(hidden)};
  std::vector<at::Tensor> all_labels = {at::empty({0}, at::kLong)};
  std::vector<at::Tensor> log_sums = {at::empty({0}, at::kFloat)};
  const int64_t block = std::clamp<int64_t>(kBlockElements / head.vocab_size(), 1, 512);
  for (int64_t first = span.begin; first < span.end; first += block) {
    const int64_t count = std::min(block, span.end - first);
    const at::Tensor x = hidden.narrow(0, first, count).detach().requires_grad_(true);
    const at::Tensor logits = head.Logits(x).to(at::kFloat);
    const at::Tensor log_probs = at::log_softmax(logits, -1);
    const at::Tensor labels =
        options.labels == LabelRule::kData
            ? targets.narrow(0, first + span.shift, count)
            : SampleLabels(log_probs.detach(), first, span.stream, options.seed);
    const at::Tensor loss = -log_probs.gather(1, labels.unsqueeze(1)).sum();
    result.gradient.narrow(0, first, count).copy_(torch::autograd::grad({loss}, {x})[0]);
    result.loss += loss.item<double>();
    all_labels.push_back(labels);
    log_sums.push_back(at::logsumexp(logits.detach(), {-1}));
  }
  result.labels = at::cat(all_labels);
  result.log_sums = at::cat(log_sums);
  return result;
}

}  // namespace prismaquant

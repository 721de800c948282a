#ifndef PRISMAQUANT_PROBE_LOSS_H_
#define PRISMAQUANT_PROBE_LOSS_H_

// The loss of one sequence and its gradient at the last layer's output: cross-entropy summed over
// positions, never averaged, in blocks of positions, so that few logits are held at a time.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "data/calibration.h"
#include "model/model.h"
#include "probe/probe.h"

namespace prismaquant {

// Elements of the logits that one product makes, and of those that are worked on in float32.
inline constexpr int64_t kLogitProductElements = 160'000'000, kLogitBlockElements = 4'000'000;

// Where a sequence has a loss.
struct LossSpan {
  int64_t begin = 0, end = 0;  // positions
  int64_t shift = 1;           // the text's own label of position t is ids[t + shift]
  uint64_t stream = 0;         // sampled labels depend on the seed, this number and the position
};

// `part`: kText (windows and captions) or kMtp (windows).
LossSpan SpanOf(Part part, const Calibration& calibration, int64_t sequence, LabelRule labels);

struct SequenceLoss {
  at::Tensor gradient;  // [tokens, hidden_size], compute dtype
  double loss = 0;      // nats, summed
  // Of the span's positions: the labels, int64, and the logarithm of the logits' summed
  // exponentials.
  at::Tensor labels, log_sums;
};

// hidden [tokens, hidden_size]; ids of the sequence.
SequenceLoss LossAndGradient(const OutputHead& head, const at::Tensor& hidden,
                             const std::vector<int32_t>& ids, const LossSpan& span,
                             const ProbeOptions& options);

// A uniform number in [0, 1) that is a pure function of its arguments (SplitMix64 of a counter).
double UniformAt(uint64_t seed, uint64_t stream, uint64_t position);

}  // namespace prismaquant

#endif  // PRISMAQUANT_PROBE_LOSS_H_

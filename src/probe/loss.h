#ifndef PRISMAQUANT_PROBE_LOSS_H_
#define PRISMAQUANT_PROBE_LOSS_H_

// The loss of one sequence and its gradient at the last layer's output: cross-entropy summed over
// the positions, never averaged, in blocks of tokens so that no [tokens, vocabulary] matrix is
// held.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "model/model.h"
#include "probe/probe.h"

namespace prismaquant {

struct SequenceLoss {
  at::Tensor gradient;  // [tokens, hidden_size], compute dtype
  double loss = 0;      // nats, summed
};

// hidden [tokens, hidden_size]; ids of the sequence; `sequence` numbers it within the calibration.
// With sampled labels the label of (sequence, position) depends on the seed and on these two
// numbers alone.
SequenceLoss LossAndGradient(const OutputHead& head, const at::Tensor& hidden,
                             const std::vector<int32_t>& ids, int64_t sequence,
                             const ProbeOptions& options);

// A uniform number in [0, 1) that is a pure function of its arguments (SplitMix64 of a counter).
double UniformAt(uint64_t seed, uint64_t sequence, uint64_t position);

}  // namespace prismaquant

#endif  // PRISMAQUANT_PROBE_LOSS_H_

#ifndef PRISMAQUANT_PROBE_STATISTICS_H_
#define PRISMAQUANT_PROBE_STATISTICS_H_

// LinearStatistics: what one backward pass tells about one Linear, for every format at once
// (docs/cost-models.md).
//
// directional: per calibration sequence n and format f with weight error dW = W_f - W and
// activation error
//   dx_f = Q_f(x) - x,   s_nf = < sum_t g_t x_t^T, dW > + sum_t < W^T g_t, dx_f >.
// fisher-trace: sum_t |g_t|^2 |x_t|^2.
//
// A sequence none of whose tokens reached the Linear has s_nf = 0. All sums are in float64 over
// blocks that are summed in float32. One thread feeds it, sequence by sequence.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "formats/format.h"
#include "model/model.h"
#include "store/run_store.h"

namespace prismaquant {

// The activation errors Q_f(x) - x of one stage input, shared by the Linears that read it. Keeps
// the last input.
class ActivationErrors {
 public:
  // Makes x [tokens, in] the input. Returns it in float32.
  const at::Tensor& SetInput(const at::Tensor& x);
  // The input's error in a format that quantizes activations and can hold the Linear that reads it.
  const at::Tensor& Error(const Format& format, const SharedScales& scales);

 private:
  at::Tensor source_, x_;
  std::map<const Format*, at::Tensor> errors_;
};

class LinearStatistics {
 public:
  // `weight` [out, in] as stored; `sequences`: how many there are. Formats that cannot hold the
  // weight are left out.
  LinearStatistics(const LinearInfo& linear, const at::Tensor& weight, const SharedScales& scales,
                   std::span<const Format* const> formats, int64_t sequences);

  // One sequence: x [tokens, in], g [tokens, out], dx [tokens, in].
  void AddSequence(int64_t sequence, const at::Tensor& x, const at::Tensor& g, const at::Tensor& dx,
                   ActivationErrors& activations);

  LinearStats Stats() const;
  std::vector<LinearCost> Costs() const;
  // |g_t|^2 for all tokens so far, float32 [tokens].
  at::Tensor TokenWeights() const;

 private:
  SharedScales scales_;
  LinearStats stats_;
  std::vector<const Format*> formats_;
  std::vector<at::Tensor> weight_errors_;  // float32 [out, in], per format
  std::vector<LinearCost> costs_;
  std::vector<at::Tensor> token_weights_;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_PROBE_STATISTICS_H_

#ifndef PRISMAQUANT_PROBE_GPTQ_ERRORS_H_
#define PRISMAQUANT_PROBE_GPTQ_ERRORS_H_

// What GPTQ would leave of each weight of a layer, so that the choice of formats knows which
// Linears it repairs well. GPTQ fits the very tokens that it sees, so each half of the sequences (n
// % 2) is rounded by the moments of the other half, which in turn judge whether GPTQ is used
// (docs/cost-models.md). One thread.

#include <array>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "formats/format.h"
#include "model/model.h"
#include "probe/layer_runners.h"
#include "round/input_moments.h"

namespace prismaquant {

// In a forward pass, sums the moments of every allocatable Linear of a layer by half.
class MomentsRunner : public LinearRunner {
 public:
  // `token_weights`: per Linear, of its tokens of all sequences in order; a Linear without them
  // weights all tokens alike. `formats` whose activation errors count.
  MomentsRunner(const LayerWeights& weights, const std::map<std::string, SharedScales>& scales,
                std::map<std::string, at::Tensor> token_weights,
                std::span<const Format* const> formats);

  void BeginSequence(int64_t sequence) { half_ = static_cast<size_t>(sequence % 2); }
  at::Tensor Apply(const LinearInfo& linear, const at::Tensor& x) override;

  // The errors of the layer's Linears in each of `formats`, which must have grids, that can hold
  // them.
  Result<LayerErrors> Errors(const std::vector<LinearInfo>& linears) const;

 private:
  // Of one Linear: the moments of its plain inputs, and what a format's rounding of them adds to
  // the Hessian's diagonal, sum_t w_t (Q_f(x_t) - x_t)^2 [in].
  struct Half {
    InputMoments moments;
    std::map<const Format*, at::Tensor> noise;
  };
  using Halves = std::array<Half, 2>;
  static Halves NoInputs(int64_t in);

  Result<WeightErrors> Round(const LinearInfo& linear, const Format& format,
                             const Halves& halves) const;

  const LayerWeights& weights_;
  const std::map<std::string, SharedScales>& scales_;
  std::map<std::string, at::Tensor> token_weights_;
  std::vector<const Format*> formats_;
  std::map<std::string, Halves> halves_;
  std::map<std::string, int64_t> tokens_;  // seen so far
  ActivationErrors activations_;
  size_t half_ = 0;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_PROBE_GPTQ_ERRORS_H_

#ifndef PRISMAQUANT_PROBE_STATISTICS_H_
#define PRISMAQUANT_PROBE_STATISTICS_H_

// LinearStatistics: what one backward pass tells about one Linear, for every format at once
// (docs/cost-models.md).
//
// directional: per calibration sequence n and format f with weight error dW = W_f - W and
// activation error
//   dx_f = Q_f(x) - x,   s_nf = < sum_t g_t x_t^T, dW > + sum_t < W^T g_t, dx_f >,
// and q_nf, the squares of the parts of this sum whose errors are independent of each other: those
// of the rows of dW and of the columns of dx_f, summed.
// fisher-trace: sum_t |g_t|^2 |x_t|^2.
//
// A weight that was rounded by inputs of the calibration is priced on sequences that it was not
// rounded by: sequence n belongs to half n % 2, and each half has the error that the other one's
// inputs led to (docs/cost-models.md).
//
// A sequence none of whose tokens reached the Linear has s_nf = 0. All sums are in float64 over
// blocks that are summed in float32. One thread feeds it, sequence by sequence or all at once.

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "formats/format.h"
#include "model/model.h"
#include "round/input_moments.h"
#include "round/output_hessian.h"
#include "store/run_store.h"

namespace prismaquant {

// The activation errors Q_f(x) - x of one stage input, shared by the Linears that read it. Keeps
// the last input.
class ActivationErrors {
 public:
  // Makes x [tokens, in] the input. Returns it in float32.
  const at::Tensor& SetInput(const at::Tensor& x);
  // The input's error in a format that quantizes activations and can hold the Linear that reads it;
  // `scales` are any reader's, since their input_amax is one.
  const at::Tensor& Error(const Format& format, const SharedScales& scales);

 private:
  at::Tensor source_, x_;
  std::map<const Format*, at::Tensor> errors_;
};

// What the Linears of a layer use one after the other.
class StatisticsBuffers {
 public:
  ActivationErrors activations;
  // g^T x of g [tokens, out] and x [tokens, in]; overwritten by the next call.
  at::Tensor WeightGradient(const at::Tensor& g, const at::Tensor& x);

 private:
  at::Tensor gradient_;  // flat, as large as the largest so far
};

// dW of one format.
struct WeightErrors {
  const Format* format = nullptr;
  // [out, in], in ProductType of the model's compute dtype, by the half of the sequences that it
  // prices; both the same tensor if no inputs were used, undefined if there is no error.
  std::array<at::Tensor, 2> of_half;
  double mean_square = 0;  // of the elements in float32, mean over the halves

  WeightErrors() = default;
  // Cross-fitted. first, second: float32 [out, in].
  WeightErrors(const Format& format, const at::Tensor& first, const at::Tensor& second,
               at::ScalarType products);
  bool cross_fitted() const { return of_half[0].defined() && !of_half[0].is_same(of_half[1]); }
};

struct NearestError {
  at::Tensor error;    // [out, in], in the dtype that was asked for
  double squares = 0;  // sum of those of the error in float32
};
// Of rounding `weight` [out, in], stored as `source`, to nearest.
NearestError RoundToNearest(const Format& format, const at::Tensor& weight,
                            const SharedScales& scales, DType source, at::ScalarType products);

// Of rounding to nearest, for every format that can hold the weight [out, in]; none for a Linear
// that is not to be allocated.
std::vector<WeightErrors> NearestErrors(const LinearInfo& linear, const at::Tensor& weight,
                                        const SharedScales& scales,
                                        std::span<const Format* const> formats,
                                        at::ScalarType products);
// The formats of NearestErrors, with errors that are yet to be made.
std::vector<WeightErrors> ErrorsToCome(const LinearInfo& linear,
                                       std::span<const Format* const> formats);

// What one sequence shows of a Linear: x [tokens, in], g [tokens, out].
struct SequenceRows {
  int64_t sequence = 0;
  at::Tensor x, g;
};

class LinearStatistics {
 public:
  // `weight` [out, in] as stored; `sequences`: how many there are. Prices what `errors` has.
  LinearStatistics(const LinearInfo& linear, const at::Tensor& weight, const SharedScales& scales,
                   std::vector<WeightErrors> errors, int64_t sequences);

  // One sequence: x [tokens, in], g [tokens, out], dx [tokens, in], in the compute dtype.
  void AddSequence(int64_t sequence, const at::Tensor& x, const at::Tensor& g, const at::Tensor& dx,
                   StatisticsBuffers& buffers);
  // All sequences of a Linear with ErrorsToCome at once, which is less work where each has few
  // tokens. errors: NearestErrors of the same formats, not kept; weight [out, in] in the compute
  // dtype; x as in `rows`, joined.
  void AddSequences(std::span<const SequenceRows> rows, const at::Tensor& x,
                    const at::Tensor& weight, const std::vector<WeightErrors>& errors,
                    StatisticsBuffers& buffers);

  LinearStats Stats() const;
  // Of cross-fitted errors, those in sample too.
  std::vector<LinearCost> Costs() const;
  // |g_t|^2 for all tokens so far, float32 [tokens].
  at::Tensor TokenWeights() const;
  // OutputSketch's, bfloat16; undefined for an expert, or without a gradient.
  at::Tensor OutputFactor() const;

 private:
  // |g_t|^2 per token.
  void AddTokens(const at::Tensor& x_f32, const at::Tensor& g);

  // Of one format and one way to round, per sequence.
  struct Sums {
    std::vector<double> directional, squares;
    explicit Sums(int64_t sequences)
        : directional(static_cast<size_t>(sequences), 0), squares(directional) {}
  };

  SharedScales scales_;
  LinearStats stats_;
  std::vector<WeightErrors> errors_;
  std::vector<Sums> sums_, in_sample_;  // as errors_
  std::vector<at::Tensor> token_weights_;
  std::optional<OutputSketch> outputs_;  // none of an expert
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_PROBE_STATISTICS_H_

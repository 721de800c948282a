#ifndef PRISMAQUANT_ROUND_GPTQ_H_
#define PRISMAQUANT_ROUND_GPTQ_H_

// GPTQ for one Linear (Frantar et al. 2022, docs/rendering.md): rounds the columns of W in order so
// that the output error tr(D H D^T), D = W_q - W, is small for the Hessian H = sum_t w_t x_t x_t^T
// of its inputs; with an output Hessian K too, so that tr(K D H D^T) is. Codes and scales are kept
// as they are stored; nothing is derived from decoded values. Pure functions; results depend on the
// number of threads only through the rounding of matrix products.

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "base/status.h"
#include "formats/format.h"
#include "round/factored_hessian.h"
#include "round/input_moments.h"
#include "round/output_hessian.h"

namespace prismaquant {

struct GptqOptions {
  double damping = 0.3;       // added to the diagonal, relative to its mean; not negative
  bool choose_scales = true;  // search each group's scale when the group is reached
  bool sweep = false;         // NVFP4: SweepScales afterwards
  // float32 or bfloat16: the dtype of the products by which rounded columns move those still to be
  // rounded. FactoredHessian is made for the same.
  at::ScalarType products = at::kFloat;
};

struct GptqResult {
  StoredTensors stored;
  at::Tensor decoded;      // float32 [out, in], what `stored` decodes to
  bool fell_back = false;  // round-to-nearest was kept: H is not finite, zero or could not be
                           // factored, or GPTQ was worse
  // RoundingError's output and weight relative to round-to-nearest's, on the judging inputs.
  double error_ratio = 1, weight_ratio = 1;
};

// hessian [in, in] float32, for rounding in `format`.
FactoredHessian FactorHessian(const Format& format, const at::Tensor& hessian,
                              const GptqOptions& options);

// weight float32 [out, in]; hessian: FactorHessian for the same format and options; rows: of `out`
// rows, or none. The format must have a grid.
Result<GptqResult> RenderGptq(const Format& format, const at::Tensor& weight,
                              const FactoredHessian& hessian, const SharedScales& shared,
                              DType source, const GptqOptions& options,
                              const RowFeedback& rows = {});

// W + a S, on the way to the unrounded weight whose outputs are nearest to the source's: S = E^T X
// (X^T X + d I)^-1 of the training inputs X and lacks E, with d the mean of the Hessian's diagonal,
// and a the share of it that is best on `held_out`, at most half. W itself, and a = 0, without
// lacks or held-out tokens.
struct CorrectedWeight {
  at::Tensor weight;
  double share = 0;
};
// hessian [in, in]: that of `train`.
CorrectedWeight Correct(const at::Tensor& weight, const at::Tensor& hessian, const InputRows& train,
                        const InputRows& held_out);

// GPTQ of `target`, the weight or a corrected one, by `train`; kept only if its output error by
// `judge` is finite and not above that of the weight rounded to nearest.
Result<GptqResult> RenderGuarded(const Format& format, const at::Tensor& weight,
                                 const at::Tensor& target, const FactoredHessian& train,
                                 const RoundingJudge& judge, const SharedScales& shared,
                                 DType source, const GptqOptions& options,
                                 const RowFeedback& rows = {});

}  // namespace prismaquant

#endif  // PRISMAQUANT_ROUND_GPTQ_H_

#ifndef PRISMAQUANT_RENDER_GPTQ_H_
#define PRISMAQUANT_RENDER_GPTQ_H_

// GPTQ for one Linear (Frantar et al. 2022, docs/rendering.md): rounds the columns of W in order so
// that the output error tr(D H D^T), D = W_q - W, is small for the Hessian H = sum_t w_t x_t x_t^T
// of its inputs. Codes and scales are kept as they are stored; nothing is derived from decoded
// values. Pure functions; results depend on the number of threads only through the rounding of
// matrix products.

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "base/status.h"
#include "formats/format.h"

namespace prismaquant {

// Sums x x^T over tokens in float32, block by block of tokens.
class HessianAccumulator {
 public:
  explicit HessianAccumulator(int64_t in);
  // x [tokens, in] in any float dtype; weights [tokens] or undefined (all ones).
  void Add(const at::Tensor& x, const at::Tensor& token_weights);
  // [in, in] float32, symmetric.
  const at::Tensor& Sum() const { return sum_; }
  int64_t tokens() const { return tokens_; }

 private:
  at::Tensor sum_;
  int64_t tokens_ = 0;
};

struct GptqOptions {
  double damping = 0.3;       // added to the diagonal, relative to its mean; not negative
  bool choose_scales = true;  // search each group's scale when the group is reached
};

struct GptqResult {
  StoredTensors stored;
  at::Tensor decoded;      // float32 [out, in], what `stored` decodes to
  bool fell_back = false;  // round-to-nearest was kept: H is not finite, zero or could not be
                           // factored, or GPTQ was worse
  double error_ratio = 1;  // output error relative to round-to-nearest's, on the judging inputs
};

// weight float32 [out, in], hessian [in, in]. The format must have a grid.
Result<GptqResult> RenderGptq(const Format& format, const at::Tensor& weight,
                              const at::Tensor& hessian, const SharedScales& shared, DType source,
                              const GptqOptions& options);

// GPTQ by `train`, kept only if its error on `held_out` (on `train` if undefined) is finite and not
// above that of round-to-nearest.
Result<GptqResult> RenderGuarded(const Format& format, const at::Tensor& weight,
                                 const at::Tensor& train, const at::Tensor& held_out,
                                 const SharedScales& shared, DType source,
                                 const GptqOptions& options);

// tr(D H D^T) with D = decoded - weight: the summed squared output error over the tokens of H.
double OutputError(const at::Tensor& decoded, const at::Tensor& weight, const at::Tensor& hessian);

}  // namespace prismaquant

#endif  // PRISMAQUANT_RENDER_GPTQ_H_

#ifndef PRISMAQUANT_PROBE_LINEAR_PROBE_H_
#define PRISMAQUANT_PROBE_LINEAR_PROBE_H_

// LinearProbe: a Linear that, in the backward pass, shows its observer what the sensitivity
// statistics are made of: the input x, the gradient g at the output, and dx = g W, the gradient
// that the Linear passes on. The weight gets no gradient of its own.

#include <ATen/core/Tensor.h>

namespace prismaquant {

class LinearObserver {
 public:
  virtual ~LinearObserver() = default;
  // x [tokens, in], g [tokens, out], dx [tokens, in], in the compute dtype. `id` is the one given
  // to ApplyProbed.
  virtual void Observe(int id, const at::Tensor& x, const at::Tensor& g, const at::Tensor& dx) = 0;
};

// x [.., in] -> x W^T (+ bias) [.., out]. `observer` must outlive the backward pass. An output that
// no gradient depends on need not be `needed`: zeros stand for the product then.
at::Tensor ApplyProbed(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                       int id, LinearObserver& observer, bool needed = true);

}  // namespace prismaquant

#endif  // PRISMAQUANT_PROBE_LINEAR_PROBE_H_

#include "model/attention.h"

#include <torch/torch.h>

#include <utility>

#include "model/blocks.h"

namespace prismaquant {
namespace {

class SoftmaxAttention : public Mixer {
 public:
  SoftmaxAttention(const ModelConfig& config, const AttentionVariant& variant, at::Tensor q_norm,
                   at::Tensor k_norm)
      : head_dim_(config.head_dim),
        eps_(config.rms_norm_eps),
        variant_(variant),
        q_norm_(std::move(q_norm)),
        k_norm_(std::move(k_norm)) {}

  at::Tensor Mix(const SequenceContext& context,
                 const std::vector<at::Tensor>& projections) const override {
    at::Tensor q = Heads(projections[0], variant_.gated_query ? 2 * head_dim_ : head_dim_);
    at::Tensor k = Heads(projections[1], head_dim_);
    const at::Tensor v = Heads(projections[2], head_dim_).transpose(1, 2);
    at::Tensor gate;
    if (variant_.gated_query) {
      gate = q.narrow(-1, head_dim_, head_dim_).reshape({q.size(0), q.size(1), -1});
      q = q.narrow(-1, 0, head_dim_);
    }
    if (variant_.norm_heads) {
      q = ApplyNorm(variant_.norm, q, q_norm_, eps_);
      k = ApplyNorm(variant_.norm, k, k_norm_, eps_);
    }
    const at::Tensor& cos = variant_.local_rotary ? context.local_cos : context.cos;
    const at::Tensor& sin = variant_.local_rotary ? context.local_sin : context.sin;
    const at::Tensor y = CausalAttention(ApplyRotary(q.transpose(1, 2), cos, sin),
                                         ApplyRotary(k.transpose(1, 2), cos, sin), v,
                                         variant_.scale, variant_.window);
    return gate.defined() ? y * gate.sigmoid() : y;
  }

 private:
  // [sequences, tokens, heads * dim] -> [sequences, tokens, heads, dim]
  static at::Tensor Heads(const at::Tensor& x, int64_t dim) { return x.unflatten(-1, {-1, dim}); }

  int64_t head_dim_;
  double eps_;
  AttentionVariant variant_;
  at::Tensor q_norm_, k_norm_;
};

}  // namespace

at::Tensor ApplyNorm(NormKind kind, const at::Tensor& x, const at::Tensor& weight, double eps) {
  return kind == NormKind::kPlain ? RmsNorm(x, weight, eps) : RmsNormPlusOne(x, weight, eps);
}

std::unique_ptr<Mixer> MakeAttention(const ModelConfig& config, const AttentionVariant& variant,
                                     at::Tensor q_norm, at::Tensor k_norm) {
  return std::make_unique<SoftmaxAttention>(config, variant, std::move(q_norm), std::move(k_norm));
}

}  // namespace prismaquant

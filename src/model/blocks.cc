#include "model/blocks.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>

namespace prismaquant {
namespace {

// x / rms(x) in the wide type.
at::Tensor Normalized(const at::Tensor& x, double eps) {
  const at::Tensor wide = x.to(WideType(x));
  return wide * at::rsqrt(wide.square().mean(-1, /*keepdim=*/true) + eps);
}

// Inverse frequencies float32 [rotary_dim / 2], as the reference computes them.
at::Tensor InverseFrequencies(int64_t rotary_dim, double theta) {
  const at::Tensor exponents =
      at::arange(0, rotary_dim, 2, at::kFloat) / static_cast<double>(rotary_dim);
  return 1.0 / at::pow(theta, exponents);
}

at::Tensor ScaledFrequencies(const ModelConfig& config) {
  const at::Tensor frequencies =
      InverseFrequencies(config.rotary_dim, config.rope_theta) / config.rope_factor;
  if (!config.rope_scaling) return frequencies;
  const Llama3RopeScaling& scaling = *config.rope_scaling;
  const auto context = static_cast<double>(scaling.original_max_position);
  const at::Tensor wavelength = 2 * M_PI / frequencies;
  const at::Tensor smooth = (context / wavelength - scaling.low_freq_factor) /
                            (scaling.high_freq_factor - scaling.low_freq_factor);
  const at::Tensor blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies;
  const at::Tensor is_long = wavelength > context / scaling.low_freq_factor;
  const at::Tensor is_short = wavelength < context / scaling.high_freq_factor;
  return at::where(is_long, frequencies / scaling.factor,
                   at::where(is_short, frequencies, blended));
}

}  // namespace

at::ScalarType WideType(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

at::Tensor RmsNorm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  return weight * Normalized(x, eps).to(x.scalar_type());
}

at::Tensor RmsNormPlusOne(const at::Tensor& x, const at::Tensor& weight, double eps) {
  return (Normalized(x, eps) * (1.0 + weight.to(WideType(x)))).to(x.scalar_type());
}

at::Tensor GatedRmsNorm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& gate,
                        double eps) {
  const at::Tensor normed = weight * Normalized(x, eps).to(x.scalar_type());
  return (normed * at::silu(gate.to(WideType(x)))).to(x.scalar_type());
}

SequenceContext RotaryContext(const ModelConfig& config, const at::Tensor& positions,
                              const ComputeOptions& options) {
  const at::Tensor places = positions.to(at::kFloat);
  const auto turn = [&](const at::Tensor& frequencies, at::Tensor& cos, at::Tensor& sin) {
    const at::Tensor half = at::outer(places[0], frequencies);
    const auto turn_by = [&](int64_t axis, int64_t count) {
      const at::Tensor own = at::outer(places[axis], frequencies);
      for (int64_t i = axis; i < std::min(3 * count, half.size(1)); i += 3) {
        half.select(1, i).copy_(own.select(1, i));
      }
    };
    turn_by(1, config.row_frequencies);
    turn_by(2, config.column_frequencies);
    const at::Tensor angles = at::cat({half, half}, -1).to(options.device);
    cos = angles.cos().to(options.dtype);
    sin = angles.sin().to(options.dtype);
  };
  SequenceContext context;
  turn(ScaledFrequencies(config), context.cos, context.sin);
  if (config.local_rope_theta > 0) {
    turn(InverseFrequencies(config.rotary_dim, config.local_rope_theta), context.local_cos,
         context.local_sin);
  }
  return context;
}

at::Tensor ApplyRotary(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  const int64_t dim = cos.size(-1);
  const at::Tensor rotated = x.narrow(-1, 0, dim);
  const at::Tensor first = rotated.narrow(-1, 0, dim / 2),
                   second = rotated.narrow(-1, dim / 2, dim / 2);
  const at::Tensor y = rotated * cos + at::cat({-second, first}, -1) * sin;
  if (dim == x.size(-1)) return y;
  return at::cat({y, x.narrow(-1, dim, x.size(-1) - dim)}, -1);
}

at::Tensor CausalAttention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           std::optional<double> scale, int64_t window) {
  const int64_t groups = q.size(1) / k.size(1), tokens = q.size(2);
  const at::Tensor keys = groups == 1 ? k : k.repeat_interleave(groups, 1);
  const at::Tensor values = groups == 1 ? v : v.repeat_interleave(groups, 1);
  std::optional<at::Tensor> mask;
  if (window > 0 && window < tokens) {
    mask = at::ones({tokens, tokens}, q.options().dtype(at::kBool)).tril().triu(1 - window);
  }
  const at::Tensor y = at::scaled_dot_product_attention(q, keys, values, mask, /*dropout_p=*/0.0,
                                                        /*is_causal=*/!mask, scale);
  return y.transpose(1, 2).reshape({q.size(0), tokens, q.size(1) * q.size(3)});
}

}  // namespace prismaquant

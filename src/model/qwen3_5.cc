#include <torch/torch.h>

#include <array>
#include <cmath>
#include <utility>

#include "model/blocks.h"
#include "model/gated_delta.h"
#include "model/transformer.h"

namespace prismaquant {
namespace {

struct DeltaNetParameters {
  at::Tensor conv;        // [channels, 1, kernel], compute dtype
  at::Tensor decay_rate;  // exp(A_log) [value_heads], wide
  at::Tensor dt_bias;     // [value_heads], wide
  at::Tensor norm;        // [value_dim], compute dtype
};

// Gated DeltaNet between {in_proj_qkv, in_proj_z, in_proj_b, in_proj_a} and out_proj.
class GatedDeltaNet : public Mixer {
 public:
  GatedDeltaNet(const ModelConfig& config, DeltaNetParameters parameters)
      : config_(config), parameters_(std::move(parameters)) {}

  at::Tensor Mix(const SequenceContext&,
                 const std::vector<at::Tensor>& projections) const override {
    const at::Tensor& b = projections[2];
    const at::ScalarType wide = WideType(b);
    const at::Tensor mixed = Convolve(projections[0]);
    const int64_t key_size = config_.linear_key_heads * config_.linear_key_dim;
    const int64_t value_size = config_.linear_value_heads * config_.linear_value_dim;
    const at::Tensor q = KeyHeads(mixed.narrow(-1, 0, key_size));
    const at::Tensor k = KeyHeads(mixed.narrow(-1, key_size, key_size));
    const at::Tensor v =
        Heads(mixed.narrow(-1, 2 * key_size, value_size), config_.linear_value_dim).to(wide);
    const at::Tensor beta = b.sigmoid().transpose(1, 2).to(wide);
    const at::Tensor g =
        (-parameters_.decay_rate * at::softplus(projections[3].to(wide) + parameters_.dt_bias))
            .transpose(1, 2);
    const double scale = 1.0 / std::sqrt(static_cast<double>(config_.linear_key_dim));
    const at::Tensor o =
        ChunkedGatedDelta(q * scale, k, v, g, beta).transpose(1, 2).to(b.scalar_type());
    const at::Tensor gate =
        projections[1].unflatten(-1, {config_.linear_value_heads, config_.linear_value_dim});
    return GatedRmsNorm(o, parameters_.norm, gate, config_.rms_norm_eps).flatten(-2);
  }

 private:
  // Causal depthwise convolution and SiLU over all channels, [sequences, tokens, channels].
  at::Tensor Convolve(const at::Tensor& x) const {
    const int64_t tokens = x.size(1);
    const at::Tensor padded =
        at::constant_pad_nd(x.transpose(1, 2), {config_.linear_conv_kernel - 1, 0});
    const std::array<int64_t, 1> one = {1}, none = {0};
    const at::Tensor y = at::conv1d(padded, parameters_.conv, /*bias=*/std::optional<at::Tensor>(),
                                    /*stride=*/at::IntArrayRef(one),
                                    /*padding=*/at::IntArrayRef(none),
                                    /*dilation=*/at::IntArrayRef(one), /*groups=*/x.size(2));
    return at::silu(y.narrow(2, 0, tokens)).transpose(1, 2);
  }
  // [sequences, tokens, heads * dim] -> [sequences, heads, tokens, dim]
  static at::Tensor Heads(const at::Tensor& x, int64_t dim) {
    return x.unflatten(-1, {-1, dim}).transpose(1, 2);
  }
  // Normalised, and repeated for the value heads that share the key head.
  at::Tensor KeyHeads(const at::Tensor& x) const {
    const at::Tensor heads = L2Norm(Heads(x, config_.linear_key_dim).to(WideType(x)));
    return heads.repeat_interleave(config_.linear_value_heads / config_.linear_key_heads, 1);
  }

  ModelConfig config_;
  DeltaNetParameters parameters_;
};

// Qwen3.5 / Qwen3.6 text body, dense or with experts: Gated DeltaNet layers with a gated
// full-attention layer in between.
class Qwen35 : public TransformerModel {
 protected:
  SkeletonVariant skeleton() const override { return {.norm = NormKind::kPlusOne}; }

  AttentionVariant attention(int layer) const override {
    AttentionVariant variant = TransformerModel::attention(layer);
    variant.norm_heads = true;
    variant.gated_query = true;
    return variant;
  }

  std::vector<std::vector<LinearShape>> MixerLinears(int layer) const override {
    if (!IsDeltaNet(layer)) return TransformerModel::MixerLinears(layer);
    const int64_t h = config_.hidden_size, heads = config_.linear_value_heads;
    const int64_t value_size = heads * config_.linear_value_dim;
    return {{{"linear_attn.in_proj_qkv", Channels(), h, false},
             {"linear_attn.in_proj_z", value_size, h, false},
             {"linear_attn.in_proj_b", heads, h, false},
             {"linear_attn.in_proj_a", heads, h, false}},
            {{"linear_attn.out_proj", h, value_size, false}}};
  }

  std::vector<ParameterShape> MixerParameters(int layer) const override {
    if (!IsDeltaNet(layer)) return TransformerModel::MixerParameters(layer);
    return {{"linear_attn.conv1d.weight", {Channels(), 1, config_.linear_conv_kernel}},
            {"linear_attn.A_log", {config_.linear_value_heads}},
            {"linear_attn.dt_bias", {config_.linear_value_heads}},
            {"linear_attn.norm.weight", {config_.linear_value_dim}}};
  }

  Result<std::unique_ptr<Mixer>> LoadMixer(int layer,
                                           const ComputeOptions& options) const override {
    if (!IsDeltaNet(layer)) return TransformerModel::LoadMixer(layer, options);
    const at::ScalarType wide = options.dtype == at::kDouble ? at::kDouble : at::kFloat;
    DeltaNetParameters p;
    PQ_ASSIGN_OR_RETURN(
        p.conv, Parameter(layer, "linear_attn.conv1d.weight", options.dtype, options.device));
    PQ_ASSIGN_OR_RETURN(const at::Tensor a_log,
                        Parameter(layer, "linear_attn.A_log", wide, options.device));
    PQ_ASSIGN_OR_RETURN(p.dt_bias, Parameter(layer, "linear_attn.dt_bias", wide, options.device));
    PQ_ASSIGN_OR_RETURN(p.norm,
                        Parameter(layer, "linear_attn.norm.weight", options.dtype, options.device));
    p.decay_rate = a_log.exp();
    return std::unique_ptr<Mixer>(std::make_unique<GatedDeltaNet>(config_, std::move(p)));
  }

  // The gated norm's weight is shared by all heads.
  SmoothingSite MixerOutputSite(int layer, const LinearStages& stages) const override {
    if (!IsDeltaNet(layer)) return TransformerModel::MixerOutputSite(layer, stages);
    const int64_t dim = config_.linear_value_dim;
    SmoothingSite site = NormSite(layer, "linear_attn.norm.weight", dim, stages[1]);
    site.plus_one = false;
    site.channel_of = at::arange(dim, at::kLong).repeat(config_.linear_value_heads);
    return site;
  }

 private:
  bool IsDeltaNet(int layer) const { return KindOf(layer) == LayerKind::kLinearAttention; }
  int64_t Channels() const {
    return 2 * config_.linear_key_heads * config_.linear_key_dim +
           config_.linear_value_heads * config_.linear_value_dim;
  }
};

}  // namespace

std::unique_ptr<TransformerModel> MakeQwen35() { return std::make_unique<Qwen35>(); }

}  // namespace prismaquant

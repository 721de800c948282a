#include "model/transformer.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <cmath>
#include <utility>

#include "model/blocks.h"
#include "model/checkpoint_tensors.h"

namespace prismaquant {
namespace {

std::string ShapeText(const std::vector<int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

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

at::Tensor Activate(MlpActivation activation, const at::Tensor& gate) {
  return activation == MlpActivation::kSilu ? at::silu(gate) : at::gelu(gate, "tanh");
}

// Names of a layer's norms, relative to the layer; null where it has none.
struct NormNames {
  const char *mixer_input, *mixer_output, *mlp_input, *mlp_output;
};

NormNames NamesOfNorms(bool post_norms) {
  if (!post_norms) {
    return {"input_layernorm.weight", nullptr, "post_attention_layernorm.weight", nullptr};
  }
  return {"input_layernorm.weight", "post_attention_layernorm.weight",
          "pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"};
}

// Weights of a layer's norms; undefined where it has none.
struct LayerNorms {
  at::Tensor mixer_input, mixer_output, mlp_input, mlp_output;
};

class PreNormLayer : public DecoderLayer {
 public:
  PreNormLayer(std::vector<std::vector<LinearInfo>> stages, std::unique_ptr<Mixer> mixer,
               const SkeletonVariant& skeleton, double eps, LayerNorms norms)
      : mixer_(std::move(mixer)), skeleton_(skeleton), eps_(eps), norms_(std::move(norms)) {
    stages_ = std::move(stages);
  }

  at::Tensor StageInput(int s, const SequenceContext&, LayerState& state) const override {
    if (s == 0) return Norm(state.hidden, norms_.mixer_input);
    if (s == 2) return Norm(state.hidden, norms_.mlp_input);
    return state.held.front();
  }

  void StageOutput(int s, const SequenceContext& context, std::vector<at::Tensor> outputs,
                   LayerState& state) const override {
    if (s == 0) {
      state.held = {mixer_->Mix(context, outputs)};
    } else if (s == 2) {
      state.held = {Activate(skeleton_.activation, outputs[0]) * outputs[1]};
    } else {
      state.hidden =
          state.hidden + Norm(outputs[0], s == 1 ? norms_.mixer_output : norms_.mlp_output);
      state.held.clear();
    }
  }

 private:
  at::Tensor Norm(const at::Tensor& x, const at::Tensor& weight) const {
    return weight.defined() ? ApplyNorm(skeleton_.norm, x, weight, eps_) : x;
  }

  std::unique_ptr<Mixer> mixer_;
  SkeletonVariant skeleton_;
  double eps_;
  LayerNorms norms_;
};

class NormedHead : public OutputHead {
 public:
  NormedHead(NormKind norm, double eps, at::Tensor norm_weight, at::Tensor weight)
      : norm_(norm), eps_(eps), norm_weight_(std::move(norm_weight)), weight_(std::move(weight)) {}
  at::Tensor Logits(const at::Tensor& hidden) const override {
    return at::linear(ApplyNorm(norm_, hidden, norm_weight_, eps_), weight_);
  }

  int64_t vocab_size() const override { return weight_.size(0); }

 private:
  NormKind norm_;
  double eps_;
  at::Tensor norm_weight_, weight_;
};

}  // namespace

at::Tensor ApplyNorm(NormKind kind, const at::Tensor& x, const at::Tensor& weight, double eps) {
  return kind == NormKind::kPlain ? RmsNorm(x, weight, eps) : RmsNormPlusOne(x, weight, eps);
}

std::unique_ptr<Mixer> MakeAttention(const ModelConfig& config, const AttentionVariant& variant,
                                     at::Tensor q_norm, at::Tensor k_norm) {
  return std::make_unique<SoftmaxAttention>(config, variant, std::move(q_norm), std::move(k_norm));
}

std::string TransformerModel::LayerPrefix(int layer) const {
  return fmt::format("{}layers.{}.", config_.body_prefix, layer);
}

AttentionVariant TransformerModel::attention(int layer) const {
  const bool slides = config_.layers[static_cast<size_t>(layer)] == LayerKind::kSlidingAttention;
  AttentionVariant variant;
  variant.norm = skeleton().norm;
  variant.input_bias = config_.attention_bias;
  variant.output_bias = config_.attention_bias;
  variant.window = slides ? config_.sliding_window : 0;
  variant.local_rotary = slides && config_.local_rope_theta > 0;
  return variant;
}

std::vector<std::vector<LinearShape>> TransformerModel::MixerLinears(int layer) const {
  const AttentionVariant variant = attention(layer);
  const int64_t h = config_.hidden_size, d = config_.head_dim;
  const int64_t q = config_.num_heads * d, kv = config_.num_kv_heads * d;
  return {{{"self_attn.q_proj", variant.gated_query ? 2 * q : q, h, variant.input_bias},
           {"self_attn.k_proj", kv, h, variant.input_bias},
           {"self_attn.v_proj", kv, h, variant.input_bias}},
          {{"self_attn.o_proj", h, q, variant.output_bias}}};
}

std::vector<ParameterShape> TransformerModel::MixerParameters(int layer) const {
  if (!attention(layer).norm_heads) return {};
  return {{"self_attn.q_norm.weight", {config_.head_dim}},
          {"self_attn.k_norm.weight", {config_.head_dim}}};
}

Result<std::unique_ptr<Mixer>> TransformerModel::LoadMixer(int layer,
                                                           const ComputeOptions& options) const {
  const AttentionVariant variant = attention(layer);
  at::Tensor q_norm, k_norm;
  if (variant.norm_heads) {
    PQ_ASSIGN_OR_RETURN(q_norm,
                        Parameter(layer, "self_attn.q_norm.weight", options.dtype, options.device));
    PQ_ASSIGN_OR_RETURN(k_norm,
                        Parameter(layer, "self_attn.k_norm.weight", options.dtype, options.device));
  }
  return MakeAttention(config_, variant, std::move(q_norm), std::move(k_norm));
}

Result<at::Tensor> TransformerModel::Parameter(int layer, const std::string& name,
                                               at::ScalarType dtype, at::Device device) const {
  return checkpoint_tensors::Load(*checkpoint_, LayerPrefix(layer) + name, dtype, device);
}

std::vector<std::vector<LinearShape>> TransformerModel::MlpLinears() const {
  const int64_t h = config_.hidden_size, m = config_.intermediate_size;
  return {{{"mlp.gate_proj", m, h, config_.mlp_bias}, {"mlp.up_proj", m, h, config_.mlp_bias}},
          {{"mlp.down_proj", h, m, config_.mlp_bias}}};
}

LinearInfo TransformerModel::Describe(int layer, int stage, const LinearShape& shape) const {
  LinearInfo info;
  info.name = LayerPrefix(layer) + shape.name;
  info.out = shape.out;
  info.in = shape.in;
  info.layer = layer;
  info.stage = stage;
  info.has_bias = shape.bias;
  info.unit = FusedName(*profile_, info.name);
  const std::string leaf = info.name.substr(info.name.rfind('.') + 1);
  for (const std::string_view name : profile_->unquantized) info.allocatable &= leaf != name;
  const TensorView* weight = checkpoint_->Find(info.name + ".weight");
  const TensorView* embedding = checkpoint_->Find(config_.body_prefix + "embed_tokens.weight");
  const bool plain = weight != nullptr && weight->dtype != DType::kF8E4M3;
  if (plain || embedding != nullptr) info.dtype = plain ? weight->dtype : embedding->dtype;
  return info;
}

std::vector<std::vector<LinearInfo>> TransformerModel::LayerStages(int layer) const {
  std::vector<std::vector<LinearShape>> shapes = MixerLinears(layer);
  for (std::vector<LinearShape>& stage : MlpLinears()) shapes.push_back(std::move(stage));
  std::vector<std::vector<LinearInfo>> stages(shapes.size());
  for (size_t s = 0; s < shapes.size(); ++s) {
    for (const LinearShape& shape : shapes[s]) {
      stages[s].push_back(Describe(layer, static_cast<int>(s), shape));
    }
  }
  return stages;
}

std::vector<ParameterShape> TransformerModel::LayerParameters(int layer) const {
  std::vector<ParameterShape> parameters = MixerParameters(layer);
  const NormNames names = NamesOfNorms(skeleton().post_norms);
  for (const char* name :
       {names.mixer_input, names.mixer_output, names.mlp_input, names.mlp_output}) {
    if (name != nullptr) parameters.push_back({name, {config_.hidden_size}});
  }
  return parameters;
}

Status TransformerModel::CheckShape(const std::string& tensor,
                                    const std::vector<int64_t>& shape) const {
  PQ_ASSIGN_OR_RETURN(const TensorView view, checkpoint_->Get(tensor));
  if (view.shape != shape) {
    return Status::InvalidInput(fmt::format(
        "{}: tensor {} has shape {}, expected {} by config.json", checkpoint_->folder().string(),
        tensor, ShapeText(view.shape), ShapeText(shape)));
  }
  if (view.dtype != DType::kBF16 && view.dtype != DType::kF16 && view.dtype != DType::kF32) {
    return Status::InvalidInput(fmt::format("{}: tensor {} is {}, expected BF16, F16 or F32",
                                            checkpoint_->folder().string(), tensor,
                                            DTypeName(view.dtype)));
  }
  return {};
}

Status TransformerModel::CheckLinear(const LinearInfo& linear) const {
  if (linear.has_bias) PQ_RETURN_IF_ERROR(CheckShape(linear.name + ".bias", {linear.out}));
  const bool quantized = checkpoint_->Find(linear.name + ".weight_packed") != nullptr ||
                         checkpoint_->Find(linear.name + ".weight_scale") != nullptr;
  return quantized ? Status() : CheckShape(linear.name + ".weight", {linear.out, linear.in});
}

Status TransformerModel::Initialize(const Checkpoint& checkpoint, ModelConfig config,
                                    const Profile& profile) {
  checkpoint_ = &checkpoint;
  config_ = std::move(config);
  profile_ = &profile;
  const std::vector<int64_t> table = {config_.vocab_size, config_.hidden_size};
  PQ_RETURN_IF_ERROR(CheckShape(config_.body_prefix + "embed_tokens.weight", table));
  PQ_RETURN_IF_ERROR(CheckShape(config_.body_prefix + "norm.weight", {config_.hidden_size}));
  if (!config_.tied_head) PQ_RETURN_IF_ERROR(CheckShape("lm_head.weight", table));
  for (int layer = 0; layer < config_.num_layers; ++layer) {
    for (const ParameterShape& parameter : LayerParameters(layer)) {
      PQ_RETURN_IF_ERROR(CheckShape(LayerPrefix(layer) + parameter.name, parameter.shape));
    }
    for (const std::vector<LinearInfo>& stage : LayerStages(layer)) {
      for (const LinearInfo& linear : stage) {
        PQ_RETURN_IF_ERROR(CheckLinear(linear));
        linears_.push_back(linear);
      }
    }
  }
  return {};
}

Result<std::unique_ptr<DecoderLayer>> TransformerModel::LoadLayer(
    int layer, const ComputeOptions& options) const {
  PQ_ASSIGN_OR_RETURN(std::unique_ptr<Mixer> mixer, LoadMixer(layer, options));
  const NormNames names = NamesOfNorms(skeleton().post_norms);
  LayerNorms norms;
  for (const auto& [name, weight] : {std::pair(names.mixer_input, &norms.mixer_input),
                                     std::pair(names.mixer_output, &norms.mixer_output),
                                     std::pair(names.mlp_input, &norms.mlp_input),
                                     std::pair(names.mlp_output, &norms.mlp_output)}) {
    if (name == nullptr) continue;
    PQ_ASSIGN_OR_RETURN(*weight, Parameter(layer, name, options.dtype, options.device));
  }
  return std::unique_ptr<DecoderLayer>(std::make_unique<PreNormLayer>(
      LayerStages(layer), std::move(mixer), skeleton(), config_.rms_norm_eps, std::move(norms)));
}

Result<std::unique_ptr<OutputHead>> TransformerModel::LoadHead(
    const ComputeOptions& options) const {
  const std::string weight_name =
      config_.tied_head ? config_.body_prefix + "embed_tokens.weight" : "lm_head.weight";
  PQ_ASSIGN_OR_RETURN(at::Tensor norm_weight,
                      checkpoint_tensors::Load(*checkpoint_, config_.body_prefix + "norm.weight",
                                               options.dtype, options.device));
  PQ_ASSIGN_OR_RETURN(at::Tensor weight, checkpoint_tensors::Load(*checkpoint_, weight_name,
                                                                  options.dtype, options.device));
  return std::unique_ptr<OutputHead>(std::make_unique<NormedHead>(
      skeleton().norm, config_.rms_norm_eps, std::move(norm_weight), std::move(weight)));
}

}  // namespace prismaquant

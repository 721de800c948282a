#include "model/transformer.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <string_view>
#include <utility>

#include "model/checkpoint_tensors.h"
#include "model/vision.h"

namespace prismaquant {
namespace {

constexpr char kHead[] = "lm_head";
constexpr char kMtpJoin[] = "mtp.fc";

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

}  // namespace

LayerKind TransformerModel::KindOf(int layer) const {
  return layer < config_.num_layers ? config_.layers[static_cast<size_t>(layer)]
                                    : LayerKind::kFullAttention;
}

AttentionVariant TransformerModel::attention(int layer) const {
  const bool slides = KindOf(layer) == LayerKind::kSlidingAttention;
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
  return LoadSmoothed(*checkpoint_, smoothing_.get(), LayerPrefix(layer) + name, dtype, device);
}

std::vector<std::vector<LinearShape>> TransformerModel::MlpLinears() const {
  const int64_t h = config_.hidden_size, m = config_.intermediate_size;
  return {{{"mlp.gate_proj", m, h, config_.mlp_bias}, {"mlp.up_proj", m, h, config_.mlp_bias}},
          {{"mlp.down_proj", h, m, config_.mlp_bias}}};
}

DType TransformerModel::StoredType(const std::string& tensor) const {
  return checkpoint_tensors::SourceType(*checkpoint_, tensor,
                                        config_.body_prefix + "embed_tokens.weight");
}

LinearInfo TransformerModel::Describe(int layer, int stage, const LinearShape& shape) const {
  LinearInfo info;
  info.name = (shape.name == kMtpJoin ? "" : LayerPrefix(layer)) + shape.name;
  info.out = shape.out;
  info.in = shape.in;
  info.part = PartOfLayer(layer);
  info.layer = layer;
  info.stage = stage;
  info.has_bias = shape.bias;
  info.unit = FusedName(*profile_, info.name);
  info.scale_group = info.unit;
  info.input_group = info.unit;
  const std::string leaf = info.name.substr(info.name.rfind('.') + 1);
  for (const std::string_view name : profile_->unquantized) info.allocatable &= leaf != name;
  info.dtype = StoredType(info.name + ".weight");
  return info;
}

LinearInfo TransformerModel::DescribeExpert(int layer, int stage, int64_t expert,
                                            const char* projection) const {
  const MixtureConfig& mixture = *config_.mixture;
  const bool down = projection == std::string_view("down_proj");
  const std::string all = LayerPrefix(layer) + "mlp.experts";
  LinearInfo info = Describe(layer, stage,
                             {.name = fmt::format("mlp.experts.{}.{}", expert, projection),
                              .out = down ? config_.hidden_size : mixture.expert_size,
                              .in = down ? mixture.expert_size : config_.hidden_size});
  info.unit = all;
  info.scale_group = fmt::format("{}.{}.{}", all, expert, down ? "w2" : "w13");
  info.input_group = all + (down ? ".w2" : ".w13");
  info.is_expert = true;
  const std::string packed = all + (down ? ".down_proj" : ".gate_up_proj");
  if (checkpoint_->Find(packed) == nullptr) return info;
  const bool up = projection == std::string_view("up_proj");
  info.packed = {.tensor = packed, .expert = expert, .row = up ? mixture.expert_size : 0};
  info.dtype = StoredType(packed);
  return info;
}

LinearInfo TransformerModel::DescribeHead() const {
  const PartLayers* part = FindPart(Part::kHead);
  LinearInfo info = Describe(part != nullptr ? part->first : num_layers(), 0,
                             {.name = kHead, .out = config_.vocab_size, .in = config_.hidden_size});
  info.allocatable = false;
  return info;
}

void TransformerModel::AppendMixture(int layer, LinearStages& stages) const {
  const MixtureConfig& mixture = *config_.mixture;
  const int64_t h = config_.hidden_size, s = mixture.shared_size;
  const auto first = static_cast<int>(stages.size());
  stages.resize(stages.size() + 3);
  const auto end = stages.end();
  std::vector<LinearInfo>&routing = *(end - 3), &inputs = *(end - 2), &outputs = *(end - 1);
  routing.push_back(Describe(layer, first, {"mlp.gate", mixture.experts, h}));
  for (int64_t e = 0; e < mixture.experts; ++e) {
    inputs.push_back(DescribeExpert(layer, first + 1, e, "gate_proj"));
    inputs.push_back(DescribeExpert(layer, first + 1, e, "up_proj"));
    outputs.push_back(DescribeExpert(layer, first + 2, e, "down_proj"));
  }
  if (s == 0) return;
  for (const char* name : {"mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"}) {
    routing.push_back(Describe(layer, first, {name, s, h}));
  }
  routing.push_back(Describe(layer, first, {"mlp.shared_expert_gate", 1, h}));
  inputs.push_back(Describe(layer, first + 1, {"mlp.shared_expert.down_proj", h, s}));
}

LinearStages TransformerModel::LayerStages(int layer) const {
  if (PartOfLayer(layer) == Part::kHead) return {{DescribeHead()}};
  std::vector<std::vector<LinearShape>> shapes;
  if (PartOfLayer(layer) == Part::kMtp) {
    shapes.push_back({{kMtpJoin, config_.hidden_size, 2 * config_.hidden_size}});
  }
  for (std::vector<LinearShape>& stage : MixerLinears(layer)) shapes.push_back(std::move(stage));
  if (!config_.mixture) {
    for (std::vector<LinearShape>& stage : MlpLinears()) shapes.push_back(std::move(stage));
  }
  LinearStages stages(shapes.size());
  for (size_t s = 0; s < shapes.size(); ++s) {
    for (const LinearShape& shape : shapes[s]) {
      stages[s].push_back(Describe(layer, static_cast<int>(s), shape));
    }
  }
  if (config_.mixture) {
    AppendMixture(layer, stages);
  } else {
    stages.back().front().ends_layer = !skeleton().post_norms;
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

SmoothingSite TransformerModel::NormSite(int layer, const char* norm, int64_t channels,
                                         const std::vector<LinearInfo>& readers) const {
  SmoothingSite site{.norm = {LayerPrefix(layer) + norm},
                     .plus_one = skeleton().norm == NormKind::kPlusOne,
                     .channels = channels};
  for (const LinearInfo& linear : readers) site.readers.push_back(linear.name);
  return site;
}

SmoothingSite TransformerModel::MixerOutputSite(int, const LinearStages& stages) const {
  const LinearInfo& v = stages[0][2];
  const int64_t d = config_.head_dim, shared = config_.num_heads / config_.num_kv_heads;
  const at::Tensor heads = at::arange(config_.num_heads, at::kLong).floor_divide(shared);
  return {.producer = v.name,
          .rows = v.out,
          .channels = v.out,
          .readers = {stages[1][0].name},
          .channel_of = (heads.unsqueeze(1) * d + at::arange(d, at::kLong)).flatten()};
}

std::vector<SmoothingSite> TransformerModel::SmoothingSites(int layer) const {
  const Part part = PartOfLayer(layer);
  if (part == Part::kVision) {
    return vision_->SmoothingSites(layer - FindPart(Part::kVision)->first);
  }
  if (part == Part::kHead) return {};
  LinearStages stages = LayerStages(layer);
  if (part == Part::kMtp) stages.erase(stages.begin());
  const NormNames names = NamesOfNorms(skeleton().post_norms);
  const int64_t h = config_.hidden_size;
  std::vector<SmoothingSite> sites = {NormSite(layer, names.mixer_input, h, stages[0]),
                                      MixerOutputSite(layer, stages)};
  SmoothingSite mlp = NormSite(layer, names.mlp_input, h, stages[2]);
  for (size_t s : {2, 3}) {
    for (const LinearInfo& linear : stages[s]) {
      const size_t leaf = linear.name.rfind('.') + 1;
      const bool down = linear.name.substr(leaf) == "down_proj";
      if (linear.is_expert && !down) mlp.readers.push_back(linear.name);
      if (linear.name.substr(leaf) != "up_proj") continue;
      sites.push_back({.producer = linear.name,
                       .rows = linear.out,
                       .channels = linear.out,
                       .readers = {linear.name.substr(0, leaf) + "down_proj"}});
    }
  }
  sites.push_back(std::move(mlp));
  return sites;
}

Status TransformerModel::CheckLinear(const LinearInfo& linear) const {
  if (linear.has_bias)
    PQ_RETURN_IF_ERROR(
        checkpoint_tensors::RequireShape(*checkpoint_, linear.name + ".bias", {linear.out}));
  if (!linear.packed.tensor.empty()) {
    const int64_t experts = config_.mixture->experts;
    const bool halves = linear.packed.tensor.ends_with("gate_up_proj");
    return checkpoint_tensors::RequireShape(
        *checkpoint_, linear.packed.tensor,
        {experts, halves ? 2 * linear.out : linear.out, linear.in});
  }
  return checkpoint_tensors::RequireWeight(*checkpoint_, linear.name, {linear.out, linear.in});
}

Status TransformerModel::CheckDecoderLayer(int layer) {
  for (const ParameterShape& parameter : LayerParameters(layer)) {
    PQ_RETURN_IF_ERROR(checkpoint_tensors::RequireShape(
        *checkpoint_, LayerPrefix(layer) + parameter.name, parameter.shape));
  }
  for (const std::vector<LinearInfo>& stage : LayerStages(layer)) {
    for (const LinearInfo& linear : stage) {
      PQ_RETURN_IF_ERROR(CheckLinear(linear));
      linears_.push_back(linear);
    }
  }
  return {};
}

Status TransformerModel::CheckMtp() {
  for (const char* name : {"norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"}) {
    PQ_RETURN_IF_ERROR(checkpoint_tensors::RequireShape(
        *checkpoint_, fmt::format("mtp.{}.weight", name), {config_.hidden_size}));
  }
  return CheckDecoderLayer(FindPart(Part::kMtp)->first);
}

Status TransformerModel::FindParts() {
  auto next = static_cast<int>(config_.num_layers);
  parts_ = {{Part::kText, 0, next}};
  const auto append = [&](Part part, int layers) {
    parts_.push_back({part, next, next + layers});
    next += layers;
  };
  if (!config_.tied_head) append(Part::kHead, 1);
  // A head of several layers has never been published; it is passed through.
  if (config_.mtp_layers == 1 && checkpoint_->Find("mtp.norm.weight") != nullptr) {
    append(Part::kMtp, 1);
  }
  if (profile_->vision && checkpoint_->Find(VisionTower::kPatchWeight) != nullptr) {
    PQ_ASSIGN_OR_RETURN(vision_, VisionTower::Open(*checkpoint_, next));
    append(Part::kVision, vision_->num_blocks());
  }
  return {};
}

Status TransformerModel::Initialize(const Checkpoint& checkpoint, ModelConfig config,
                                    const Profile& profile) {
  checkpoint_ = &checkpoint;
  config_ = std::move(config);
  profile_ = &profile;
  PQ_RETURN_IF_ERROR(FindParts());
  PQ_RETURN_IF_ERROR(checkpoint_tensors::RequireShape(*checkpoint_,
                                                      config_.body_prefix + "embed_tokens.weight",
                                                      {config_.vocab_size, config_.hidden_size}));
  PQ_RETURN_IF_ERROR(checkpoint_tensors::RequireShape(
      *checkpoint_, config_.body_prefix + "norm.weight", {config_.hidden_size}));
  for (int layer = 0; layer < config_.num_layers; ++layer) {
    PQ_RETURN_IF_ERROR(CheckDecoderLayer(layer));
  }
  if (FindPart(Part::kHead) != nullptr) {
    linears_.push_back(DescribeHead());
    PQ_RETURN_IF_ERROR(CheckLinear(linears_.back()));
  }
  if (FindPart(Part::kMtp) != nullptr) PQ_RETURN_IF_ERROR(CheckMtp());
  if (vision_ != nullptr) {
    linears_.insert(linears_.end(), vision_->linears().begin(), vision_->linears().end());
  }
  return {};
}

Result<SkeletonParts> TransformerModel::LoadSkeleton(int layer,
                                                     const ComputeOptions& options) const {
  SkeletonParts parts{.variant = skeleton(), .eps = config_.rms_norm_eps};
  PQ_ASSIGN_OR_RETURN(parts.mixer, LoadMixer(layer, options));
  parts.feed_forward = config_.mixture ? MakeMixture(*config_.mixture, parts.variant.activation)
                                       : MakeGatedMlp(parts.variant.activation);
  const NormNames names = NamesOfNorms(parts.variant.post_norms);
  LayerNorms& norms = parts.norms;
  for (const auto& [name, weight] : {std::pair(names.mixer_input, &norms.mixer_input),
                                     std::pair(names.mixer_output, &norms.mixer_output),
                                     std::pair(names.mlp_input, &norms.mlp_input),
                                     std::pair(names.mlp_output, &norms.mlp_output)}) {
    if (name == nullptr) continue;
    PQ_ASSIGN_OR_RETURN(*weight, Parameter(layer, name, options.dtype, options.device));
  }
  return parts;
}

Result<std::unique_ptr<DecoderLayer>> TransformerModel::LoadLayer(
    int layer, const ComputeOptions& options) const {
  const Part part = PartOfLayer(layer);
  if (part == Part::kVision) {
    return vision_->LoadBlock(layer - FindPart(Part::kVision)->first, options);
  }
  if (part == Part::kHead) {
    PQ_ASSIGN_OR_RETURN(HeadNorm norm, LoadFinalNorm(Part::kText, options));
    return MakeHeadLayer(LayerStages(layer), std::move(norm));
  }
  PQ_ASSIGN_OR_RETURN(SkeletonParts parts, LoadSkeleton(layer, options));
  return part == Part::kMtp ? MakeMtpLayer(LayerStages(layer), std::move(parts))
                            : MakeSkeleton(LayerStages(layer), std::move(parts));
}

Result<HeadNorm> TransformerModel::LoadFinalNorm(Part part, const ComputeOptions& options) const {
  HeadNorm norm{.kind = skeleton().norm, .eps = config_.rms_norm_eps, .weight = {}};
  const std::string name =
      part == Part::kMtp ? "mtp.norm.weight" : config_.body_prefix + "norm.weight";
  PQ_ASSIGN_OR_RETURN(norm.weight,
                      checkpoint_tensors::Load(*checkpoint_, name, options.dtype, options.device));
  return norm;
}

Result<at::Tensor> TransformerModel::FinalNorm(const at::Tensor& hidden,
                                               const ComputeOptions& options) const {
  PQ_ASSIGN_OR_RETURN(const HeadNorm norm, LoadFinalNorm(Part::kText, options));
  return norm.Apply(hidden);
}

Result<std::unique_ptr<OutputHead>> TransformerModel::LoadHead(
    Part part, const ComputeOptions& options, std::shared_ptr<LinearRunner> projection) const {
  PQ_ASSIGN_OR_RETURN(HeadNorm norm, LoadFinalNorm(part, options));
  if (projection != nullptr) {
    return MakeOutputHead(std::move(norm), DescribeHead(), std::move(projection));
  }
  const std::string name =
      config_.tied_head ? config_.body_prefix + "embed_tokens.weight" : "lm_head.weight";
  PQ_ASSIGN_OR_RETURN(at::Tensor weight,
                      checkpoint_tensors::Load(*checkpoint_, name, options.dtype, options.device));
  return MakeOutputHead(std::move(norm), std::move(weight));
}

}  // namespace prismaquant

#include "model/model.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include "formats/format.h"
#include "model/blocks.h"
#include "model/checkpoint_tensors.h"
#include "model/transformer.h"
#include "model/vision.h"

namespace prismaquant {
namespace {

std::unique_ptr<TransformerModel> MakeFamily(std::string_view family) {
  if (family == "gemma3") return MakeGemma3();
  if (family == "llama") return MakeLlama();
  if (family == "mistral") return MakeMistral();
  if (family == "qwen2") return MakeQwen2();
  if (family == "qwen3" || family == "qwen3_moe") return MakeQwen3();
  if (family == "qwen3_5") return MakeQwen35();
  return nullptr;
}

// The prefix under which the checkpoint holds the body; the newest spelling if it is under none.
std::string BodyPrefix(const Checkpoint& checkpoint, const Profile& profile) {
  for (const std::string_view prefix : profile.body_prefixes) {
    std::string name(prefix);
    if (checkpoint.Find(name + "embed_tokens.weight") != nullptr) return name;
  }
  return std::string(profile.body_prefixes.front());
}

}  // namespace

at::Tensor MultiplyLinear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  return at::linear(x, weight, bias.defined() ? std::optional<at::Tensor>(bias) : std::nullopt);
}

at::Tensor RunLayer(const DecoderLayer& layer, const SequenceContext& context,
                    const at::Tensor& hidden, LinearRunner& linears, at::Tensor* routing) {
  LayerState state{.hidden = hidden};
  for (int s = 0; s < layer.num_stages(); ++s) {
    const std::vector<at::Tensor> inputs = layer.StageInputs(s, context, state);
    std::vector<at::Tensor> outputs;
    outputs.reserve(inputs.size());
    for (size_t i = 0; i < inputs.size(); ++i) {
      outputs.push_back(linears.Apply(layer.stage(s)[i], inputs[i]));
    }
    layer.StageOutputs(s, context, std::move(outputs), state);
  }
  if (routing != nullptr) *routing = state.routing;
  return state.hidden;
}

Model::Model() = default;
Model::~Model() = default;

Result<std::unique_ptr<Model>> Model::Open(const Checkpoint& checkpoint) {
  PQ_ASSIGN_OR_RETURN(
      ModelConfig config,
      ModelConfig::Parse(checkpoint.config(), (checkpoint.folder() / "config.json").string()));
  const Profile* profile = FindProfile(config.architecture);
  config.body_prefix = BodyPrefix(checkpoint, *profile);
  std::unique_ptr<TransformerModel> model = MakeFamily(profile->family);
  if (model == nullptr) {
    return Status::InvalidInput(fmt::format("{}: the family {} has a profile and no model",
                                            checkpoint.folder().string(), profile->family));
  }
  PQ_RETURN_IF_ERROR(model->Initialize(checkpoint, std::move(config), *profile));
  return std::unique_ptr<Model>(std::move(model));
}

const PartLayers* Model::FindPart(Part part) const {
  for (const PartLayers& layers : parts_) {
    if (layers.part == part) return &layers;
  }
  return nullptr;
}

Part Model::PartOfLayer(int layer) const {
  for (const PartLayers& layers : parts_) {
    if (layer < layers.end) return layers.part;
  }
  return parts_.back().part;
}

std::string Model::LayerPrefix(int layer) const {
  switch (PartOfLayer(layer)) {
    case Part::kText:
      return fmt::format("{}layers.{}.", config_.body_prefix, layer);
    case Part::kMtp:
      return fmt::format("mtp.layers.{}.", layer - FindPart(Part::kMtp)->first);
    case Part::kVision:
      return vision_->BlockPrefix(layer - FindPart(Part::kVision)->first);
    case Part::kHead:
      break;
  }
  return "";
}

std::vector<LinearInfo> Model::LayerLinears(int layer) const {
  std::vector<LinearInfo> linears;
  for (const LinearInfo& linear : linears_) {
    if (linear.layer == layer) linears.push_back(linear);
  }
  return linears;
}

Result<at::Tensor> Model::Embed(const at::Tensor& ids, const ComputeOptions& options) const {
  const std::string name = config_.body_prefix + "embed_tokens.weight";
  PQ_ASSIGN_OR_RETURN(const TensorView view, checkpoint_->Get(name));
  const at::Tensor outside = at::logical_or(ids < 0, ids >= config_.vocab_size);
  if (outside.any().item<bool>()) {
    return Status::InvalidInput(fmt::format(
        "{}: token id {} is outside the vocabulary of {}", checkpoint_->folder().string(),
        ids.masked_select(outside)[0].item<int64_t>(), config_.vocab_size));
  }
  const at::Tensor rows = at::embedding(TensorFromView(view), ids);
  PQ_RETURN_IF_ERROR(checkpoint_tensors::RequireFinite(*checkpoint_, name, rows));
  // Around each row more of the table is mapped than is read.
  checkpoint_->DontNeed({name});
  const at::Tensor embedded = rows.to(options.device, options.dtype);
  if (embedding_scale() == 1) return embedded;
  return embedded * at::scalar_tensor(embedding_scale(), embedded.options());
}

Result<at::Tensor> Model::MtpInput(const at::Tensor& next_embeddings, const at::Tensor& normed,
                                   const ComputeOptions& options) const {
  const auto norm = [&](const char* name, const at::Tensor& x) -> Result<at::Tensor> {
    PQ_ASSIGN_OR_RETURN(
        const at::Tensor weight,
        checkpoint_tensors::Load(*checkpoint_, name, options.dtype, options.device));
    return RmsNormPlusOne(x, weight, config_.rms_norm_eps);
  };
  PQ_ASSIGN_OR_RETURN(const at::Tensor embedding,
                      norm("mtp.pre_fc_norm_embedding.weight", next_embeddings));
  PQ_ASSIGN_OR_RETURN(const at::Tensor hidden, norm("mtp.pre_fc_norm_hidden.weight", normed));
  return at::cat({embedding, hidden}, -1);
}

SequenceContext Model::Context(int64_t tokens, const ComputeOptions& options) const {
  return RotaryContext(config_, at::arange(tokens, at::kLong).expand({3, tokens}), options);
}

SequenceContext Model::Context(const at::Tensor& positions, const ComputeOptions& options) const {
  return RotaryContext(config_, positions, options);
}

void Model::SetSmoothing(std::shared_ptr<const Smoothing> smoothing) {
  smoothing_ = std::move(smoothing);
  if (vision_ != nullptr) vision_->SetSmoothing(smoothing_);
}

Result<at::Tensor> Model::LoadWeight(const LinearInfo& linear) const {
  const bool packed = !linear.packed.tensor.empty();
  const std::string tensor = packed ? linear.packed.tensor : linear.name + ".weight";
  PQ_ASSIGN_OR_RETURN(const TensorView view, checkpoint_->Get(tensor));
  at::Tensor weight = TensorFromView(view);
  if (packed) weight = weight[linear.packed.expert].narrow(0, linear.packed.row, linear.out);
  PQ_RETURN_IF_ERROR(checkpoint_tensors::RequireFinite(*checkpoint_, tensor, weight));
  if (!IsSmoothed(tensor)) return weight;
  weight = smoothing_->Weight(linear.name, weight);
  PQ_RETURN_IF_ERROR(
      checkpoint_tensors::RequireFinite(*checkpoint_, tensor + ", smoothed,", weight));
  return weight;
}

Result<at::Tensor> Model::LoadBias(const LinearInfo& linear) const {
  if (!linear.has_bias) return at::Tensor();
  const std::string tensor = linear.name + ".bias";
  PQ_ASSIGN_OR_RETURN(at::Tensor bias, checkpoint_tensors::Map(*checkpoint_, tensor));
  if (!IsSmoothed(tensor)) return bias;
  bias = smoothing_->Bias(linear.name, bias);
  PQ_RETURN_IF_ERROR(checkpoint_tensors::RequireFinite(*checkpoint_, tensor + ", smoothed,", bias));
  return bias;
}

Result<at::Tensor> Model::LoadTensor(const std::string& name) const {
  if (!IsSmoothed(name)) return checkpoint_tensors::Map(*checkpoint_, name);
  if (const at::Tensor* parameter = smoothing_->Parameter(name)) return *parameter;
  const std::vector<size_t>& owners = smoothing_->Owners(name);
  const LinearInfo& first = linears_[owners.front()];
  if (first.packed.tensor != name) {
    return name == first.name + ".bias" ? LoadBias(first) : LoadWeight(first);
  }
  PQ_ASSIGN_OR_RETURN(const TensorView view, checkpoint_->Get(name));
  at::Tensor packed = TensorFromView(view).clone();
  for (const size_t owner : owners) {
    const LinearInfo& linear = linears_[owner];
    PQ_ASSIGN_OR_RETURN(const at::Tensor slice, LoadWeight(linear));
    packed[linear.packed.expert].narrow(0, linear.packed.row, linear.out).copy_(slice);
  }
  return packed;
}

std::vector<std::string> Model::LayerTensors(int layer) const {
  std::vector<std::string> names;
  if (layer < 0 || layer >= num_layers()) return names;
  const bool head = PartOfLayer(layer) == Part::kHead;
  const std::string prefix = head ? "lm_head." : LayerPrefix(layer);
  for (const std::string& name : checkpoint_->names()) {
    if (name.starts_with(prefix)) names.push_back(name);
  }
  return names;
}

}  // namespace prismaquant

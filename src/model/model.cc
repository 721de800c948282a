#include "model/model.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include "formats/format.h"
#include "model/blocks.h"
#include "model/checkpoint_tensors.h"
#include "model/transformer.h"

namespace prismaquant {
namespace {

std::unique_ptr<TransformerModel> MakeFamily(std::string_view family) {
  if (family == "gemma3") return MakeGemma3();
  if (family == "llama") return MakeLlama();
  if (family == "mistral") return MakeMistral();
  if (family == "qwen2") return MakeQwen2();
  if (family == "qwen3") return MakeQwen3();
  return MakeQwen35();
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

at::Tensor RunLayer(const DecoderLayer& layer, const SequenceContext& context,
                    const at::Tensor& hidden, LinearRunner& linears) {
  LayerState state{.hidden = hidden, .held = {}};
  for (int s = 0; s < layer.num_stages(); ++s) {
    const at::Tensor x = layer.StageInput(s, context, state);
    std::vector<at::Tensor> outputs;
    for (const LinearInfo& linear : layer.stage(s)) outputs.push_back(linears.Apply(linear, x));
    layer.StageOutput(s, context, std::move(outputs), state);
  }
  return state.hidden;
}

Result<std::unique_ptr<Model>> Model::Open(const Checkpoint& checkpoint) {
  PQ_ASSIGN_OR_RETURN(
      ModelConfig config,
      ModelConfig::Parse(checkpoint.config(), (checkpoint.folder() / "config.json").string()));
  const Profile* profile = FindProfile(config.architecture);
  config.body_prefix = BodyPrefix(checkpoint, *profile);
  std::unique_ptr<TransformerModel> model = MakeFamily(profile->family);
  PQ_RETURN_IF_ERROR(model->Initialize(checkpoint, std::move(config), *profile));
  return std::unique_ptr<Model>(std::move(model));
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
  const at::Tensor embedded = rows.to(options.device, options.dtype);
  if (embedding_scale() == 1) return embedded;
  return embedded * at::scalar_tensor(embedding_scale(), embedded.options());
}

SequenceContext Model::Context(int64_t tokens, const ComputeOptions& options) const {
  return RotaryContext(config_, tokens, options);
}

Result<at::Tensor> Model::LoadWeight(const LinearInfo& linear) const {
  return checkpoint_tensors::Map(*checkpoint_, linear.name + ".weight");
}

Result<at::Tensor> Model::LoadBias(const LinearInfo& linear) const {
  if (!linear.has_bias) return at::Tensor();
  return checkpoint_tensors::Map(*checkpoint_, linear.name + ".bias");
}

std::vector<std::string> Model::LayerTensors(int layer) const {
  const std::string prefix = fmt::format("{}layers.{}.", config_.body_prefix, layer);
  std::vector<std::string> names;
  for (const std::string& name : checkpoint_->names()) {
    if (name.starts_with(prefix)) names.push_back(name);
  }
  return names;
}

}  // namespace prismaquant

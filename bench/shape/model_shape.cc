#include "bench/shape/model_shape.h"

#include <fmt/format.h>

#include <utility>

namespace prismaquant {
namespace {

constexpr int64_t kVocabulary = 248320, kHead = 256, kDeltaHead = 128, kFullInterval = 4,
                  kConvolution = 4;
constexpr int64_t kVisionDepth = 27, kVisionHidden = 1152, kVisionMlp = 4304, kVisionHeads = 16,
                  kPatch = 16, kFrames = 2, kColours = 3, kPositions = 2304, kMerge = 4;

class TensorList {
 public:
  TensorList(const ModelShape& shape, int64_t layers) : shape_(shape), layers_(layers) {}

  std::vector<ShapedTensor> Make() {
    const std::string body = "model.language_model.";
    Add(body + "embed_tokens.weight", {kVocabulary, shape_.hidden}, Fill::kSmall);
    for (int64_t layer = 0; layer < layers_; ++layer) {
      const std::string prefix = fmt::format("{}layers.{}.", body, layer);
      AddLayer(prefix, (layer + 1) % kFullInterval == 0);
    }
    Add(body + "norm.weight", {shape_.hidden}, Fill::kSmall);
    Add("lm_head.weight", {kVocabulary, shape_.hidden}, Fill::kProjection);
    AddVision();
    AddMtp();
    return std::move(tensors_);
  }

 private:
  void Add(const std::string& name, std::vector<int64_t> sizes, Fill fill) {
    tensors_.push_back({.spec = {name, DType::kBF16, std::move(sizes)}, .fill = fill});
  }
  void AddBiased(const std::string& name, int64_t out, int64_t in, Fill fill) {
    Add(name + ".weight", {out, in}, fill);
    Add(name + ".bias", {out}, Fill::kSmall);
  }

  void AddLayer(const std::string& prefix, bool full) {
    Add(prefix + "input_layernorm.weight", {shape_.hidden}, Fill::kSmall);
    if (full) {
      AddAttention(prefix + "self_attn.");
    } else {
      AddDeltaNet(prefix + "linear_attn.");
    }
    Add(prefix + "post_attention_layernorm.weight", {shape_.hidden}, Fill::kSmall);
    if (shape_.experts > 0) {
      AddExperts(prefix + "mlp.");
    } else {
      AddMlp(prefix + "mlp.");
    }
  }

  void AddAttention(const std::string& prefix) {
    const int64_t queries = shape_.heads * kHead, keys = shape_.kv_heads * kHead;
    Add(prefix + "q_proj.weight", {2 * queries, shape_.hidden}, Fill::kProjection);
    Add(prefix + "k_proj.weight", {keys, shape_.hidden}, Fill::kProjection);
    Add(prefix + "v_proj.weight", {keys, shape_.hidden}, Fill::kProjection);
    Add(prefix + "o_proj.weight", {shape_.hidden, queries}, Fill::kResidual);
    Add(prefix + "q_norm.weight", {kHead}, Fill::kSmall);
    Add(prefix + "k_norm.weight", {kHead}, Fill::kSmall);
  }

  void AddDeltaNet(const std::string& prefix) {
    const int64_t values = shape_.value_heads * kDeltaHead;
    const int64_t mixed = 2 * shape_.key_heads * kDeltaHead + values;
    Add(prefix + "A_log", {shape_.value_heads}, Fill::kSmall);
    Add(prefix + "dt_bias", {shape_.value_heads}, Fill::kSmall);
    Add(prefix + "conv1d.weight", {mixed, 1, kConvolution}, Fill::kProjection);
    Add(prefix + "in_proj_a.weight", {shape_.value_heads, shape_.hidden}, Fill::kProjection);
    Add(prefix + "in_proj_b.weight", {shape_.value_heads, shape_.hidden}, Fill::kProjection);
    Add(prefix + "in_proj_qkv.weight", {mixed, shape_.hidden}, Fill::kProjection);
    Add(prefix + "in_proj_z.weight", {values, shape_.hidden}, Fill::kProjection);
    Add(prefix + "norm.weight", {kDeltaHead}, Fill::kOnes);
    Add(prefix + "out_proj.weight", {shape_.hidden, values}, Fill::kResidual);
  }

  void AddMlp(const std::string& prefix) {
    Add(prefix + "gate_proj.weight", {shape_.intermediate, shape_.hidden}, Fill::kProjection);
    Add(prefix + "up_proj.weight", {shape_.intermediate, shape_.hidden}, Fill::kProjection);
    Add(prefix + "down_proj.weight", {shape_.hidden, shape_.intermediate}, Fill::kResidual);
  }

  void AddExperts(const std::string& prefix) {
    const int64_t width = shape_.intermediate;
    Add(prefix + "gate.weight", {shape_.experts, shape_.hidden}, Fill::kProjection);
    Add(prefix + "experts.gate_up_proj", {shape_.experts, 2 * width, shape_.hidden},
        Fill::kProjection);
    Add(prefix + "experts.down_proj", {shape_.experts, shape_.hidden, width}, Fill::kResidual);
    AddMlp(prefix + "shared_expert.");
    Add(prefix + "shared_expert_gate.weight", {1, shape_.hidden}, Fill::kProjection);
  }

  void AddVision() {
    const std::string prefix = "model.visual.";
    Add(prefix + "patch_embed.proj.weight", {kVisionHidden, kColours, kFrames, kPatch, kPatch},
        Fill::kProjection);
    Add(prefix + "patch_embed.proj.bias", {kVisionHidden}, Fill::kSmall);
    Add(prefix + "pos_embed.weight", {kPositions, kVisionHidden}, Fill::kSmall);
    for (int64_t block = 0; block < kVisionDepth; ++block) {
      AddBlock(fmt::format("{}blocks.{}.", prefix, block));
    }
    AddNorm(prefix + "merger.norm");
    AddBiased(prefix + "merger.linear_fc1", kMerge * kVisionHidden, kMerge * kVisionHidden,
              Fill::kProjection);
    AddBiased(prefix + "merger.linear_fc2", shape_.hidden, kMerge * kVisionHidden,
              Fill::kProjection);
  }

  void AddNorm(const std::string& name) {
    Add(name + ".weight", {kVisionHidden}, Fill::kOnes);
    Add(name + ".bias", {kVisionHidden}, Fill::kSmall);
  }

  void AddBlock(const std::string& prefix) {
    AddNorm(prefix + "norm1");
    AddBiased(prefix + "attn.qkv", 3 * kVisionHidden, kVisionHidden, Fill::kProjection);
    AddBiased(prefix + "attn.proj", kVisionHidden, kVisionHidden, Fill::kResidual);
    AddNorm(prefix + "norm2");
    AddBiased(prefix + "mlp.linear_fc1", kVisionMlp, kVisionHidden, Fill::kProjection);
    AddBiased(prefix + "mlp.linear_fc2", kVisionHidden, kVisionMlp, Fill::kResidual);
  }

  void AddMtp() {
    Add("mtp.fc.weight", {shape_.hidden, 2 * shape_.hidden}, Fill::kProjection);
    AddLayer("mtp.layers.0.", /*full=*/true);
    for (const char* norm : {"norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"}) {
      Add(fmt::format("mtp.{}.weight", norm), {shape_.hidden}, Fill::kSmall);
    }
  }

  const ModelShape& shape_;
  int64_t layers_;
  std::vector<ShapedTensor> tensors_;
};

}  // namespace

const std::vector<ModelShape>& PublishedShapes() {
  static const std::vector<ModelShape> shapes = {
      {.name = "27b",
       .layers = 64,
       .hidden = 5120,
       .heads = 24,
       .kv_heads = 4,
       .key_heads = 16,
       .value_heads = 48,
       .intermediate = 17408},
      {.name = "35b-a3b",
       .layers = 40,
       .hidden = 2048,
       .heads = 16,
       .kv_heads = 2,
       .key_heads = 16,
       .value_heads = 32,
       .intermediate = 512,
       .experts = 256,
       .experts_per_token = 8},
      {.name = "122b-a10b",
       .layers = 48,
       .hidden = 3072,
       .heads = 32,
       .kv_heads = 2,
       .key_heads = 16,
       .value_heads = 64,
       .intermediate = 1024,
       .experts = 256,
       .experts_per_token = 8},
  };
  return shapes;
}

std::vector<ShapedTensor> TensorsOf(const ModelShape& shape, int64_t layers) {
  return TensorList(shape, layers).Make();
}

Json ConfigOf(const ModelShape& shape, int64_t layers, Json example) {
  Json& text = example["text_config"];
  text["hidden_size"] = shape.hidden;
  text["num_hidden_layers"] = layers;
  text["num_attention_heads"] = shape.heads;
  text["num_key_value_heads"] = shape.kv_heads;
  text["head_dim"] = kHead;
  text["linear_num_key_heads"] = shape.key_heads;
  text["linear_num_value_heads"] = shape.value_heads;
  text["linear_key_head_dim"] = text["linear_value_head_dim"] = kDeltaHead;
  text["linear_conv_kernel_dim"] = kConvolution;
  text["vocab_size"] = kVocabulary;
  text["rope_parameters"]["mrope_section"] = {11, 11, 10};
  text["full_attention_interval"] = kFullInterval;
  text["layer_types"] = Json::array();
  for (int64_t layer = 0; layer < layers; ++layer) {
    const bool full = (layer + 1) % kFullInterval == 0;
    text["layer_types"].push_back(full ? "full_attention" : "linear_attention");
  }
  if (shape.experts > 0) {
    text["num_experts"] = shape.experts;
    text["num_experts_per_tok"] = shape.experts_per_token;
    text["moe_intermediate_size"] = text["shared_expert_intermediate_size"] = shape.intermediate;
  } else {
    text["intermediate_size"] = shape.intermediate;
  }
  Json& vision = example["vision_config"];
  vision["depth"] = kVisionDepth;
  vision["hidden_size"] = kVisionHidden;
  vision["intermediate_size"] = kVisionMlp;
  vision["num_heads"] = kVisionHeads;
  vision["num_position_embeddings"] = kPositions;
  vision["out_hidden_size"] = shape.hidden;
  return example;
}

}  // namespace prismaquant

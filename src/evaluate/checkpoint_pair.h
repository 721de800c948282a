#ifndef PRISMAQUANT_EVALUATE_CHECKPOINT_PAIR_H_
#define PRISMAQUANT_EVALUATE_CHECKPOINT_PAIR_H_

// For tests: a Llama checkpoint of two layers with biases and random weights, and copies of it
// whose Linears are stored in other formats or whose tensors a test has changed.

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "formats/format.h"
#include "formats/write_tensors.h"
#include "io/checkpoint.h"
#include "io/temporary_folder.h"
#include "model/model.h"

namespace prismaquant {

class CheckpointPair {
 public:
  using Tensors = std::map<std::string, at::Tensor>;
  struct Opened {
    std::unique_ptr<Checkpoint> checkpoint;
    std::unique_ptr<Model> model;
  };

  CheckpointPair() {
    at::set_num_threads(1);
    torch::manual_seed(1);
    Add("model.embed_tokens.weight", {40, 64});
    Add("model.norm.weight", {64});
    Add("lm_head.weight", {40, 64});
    for (const std::string layer : {"model.layers.0.", "model.layers.1."}) {
      Add(layer + "input_layernorm.weight", {64});
      Add(layer + "post_attention_layernorm.weight", {64});
      AddLinear(layer + "self_attn.q_proj", 64, 64, true);
      AddLinear(layer + "self_attn.k_proj", 32, 64, true);
      AddLinear(layer + "self_attn.v_proj", 32, 64, true);
      AddLinear(layer + "self_attn.o_proj", 64, 64, true);
      AddLinear(layer + "mlp.gate_proj", 96, 64, false);
      AddLinear(layer + "mlp.up_proj", 96, 64, false);
      AddLinear(layer + "mlp.down_proj", 64, 96, false);
    }
  }

  const Tensors& source() const { return source_; }
  static Json Config() {
    return {{"architectures", {"LlamaForCausalLM"}},
            {"vocab_size", 40},
            {"hidden_size", 64},
            {"num_hidden_layers", 2},
            {"intermediate_size", 96},
            {"num_attention_heads", 2},
            {"num_key_value_heads", 1},
            {"head_dim", 32},
            {"attention_bias", true},
            {"tie_word_embeddings", false}};
  }

  // The source with the weight of each listed Linear replaced by the tensors of its format.
  Tensors Quantized(const std::map<std::string, std::string>& formats,
                    const SharedScales& shared = {.weight_amax = 1.5, .input_amax = 6}) const {
    Tensors tensors = source_;
    for (const auto& [linear, format] : formats) {
      const at::Tensor weight = source_.at(linear + ".weight").to(at::kFloat);
      tensors.erase(linear + ".weight");
      for (const auto& [suffix, tensor] :
           FindFormat(format)->Encode(weight, shared, DType::kBF16)) {
        tensors[fmt::format("{}.{}", linear, suffix)] = tensor;
      }
    }
    return tensors;
  }

  // A checkpoint with these tensors, in a folder `name`.
  Opened Open(const std::string& name, const Tensors& tensors, const Json& config = Config()) {
    const Status written = WriteTensors(folder_ / name, tensors, config);
    EXPECT_TRUE(written.ok()) << written.message();
    Opened opened;
    opened.checkpoint = std::make_unique<Checkpoint>(*Checkpoint::Open(folder_ / name));
    Result<std::unique_ptr<Model>> model = Model::Open(*opened.checkpoint);
    EXPECT_TRUE(model.ok()) << model.status().message();
    if (model.ok()) opened.model = std::move(model).value();
    return opened;
  }

 private:
  void Add(const std::string& name, const std::vector<int64_t>& shape) {
    source_[name] = (torch::randn(shape) * 0.3).to(at::kBFloat16);
  }
  void AddLinear(const std::string& name, int64_t out, int64_t in, bool bias) {
    Add(name + ".weight", {out, in});
    if (bias) Add(name + ".bias", {out});
  }

  TemporaryFolder folder_;
  Tensors source_;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_EVALUATE_CHECKPOINT_PAIR_H_

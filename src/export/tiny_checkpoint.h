#ifndef PRISMAQUANT_EXPORT_TINY_CHECKPOINT_H_
#define PRISMAQUANT_EXPORT_TINY_CHECKPOINT_H_

// For tests: a hybrid (Gated DeltaNet and full attention) checkpoint of two layers with a vision
// tower's and an MTP head's tensors, random weights, written to a folder that is removed with the
// object; and its export in given formats, rounded to nearest.

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "export/exporter.h"
#include "formats/tensor_bytes.h"

namespace prismaquant {

class TinyCheckpoint {
 public:
  static constexpr char kLinearLayer[] = "model.language_model.layers.0.";
  static constexpr char kFullLayer[] = "model.language_model.layers.1.";

  TinyCheckpoint() : root_(std::filesystem::path(::testing::TempDir()) / UniqueName()) {
    std::filesystem::remove_all(root_);
    std::filesystem::create_directories(root_);
    torch::manual_seed(1);
    WriteSource();
    checkpoint_ = std::make_unique<Checkpoint>(Must(Checkpoint::Open(source())));
    model_ = Must(Model::Open(*checkpoint_));
  }
  ~TinyCheckpoint() {
    std::error_code ignored;
    std::filesystem::remove_all(root_, ignored);
  }

  std::filesystem::path source() const { return root_ / "source"; }
  std::filesystem::path out() const { return root_ / "out"; }
  const Checkpoint& checkpoint() const { return *checkpoint_; }
  const Model& model() const { return *model_; }

  // Layer 0's MLP in NVFP4 and its out_proj in FP8, layer 1's attention in MXFP8, the rest as in
  // the source.
  std::map<std::string, const Format*> MixedFormats() const {
    std::map<std::string, const Format*> formats;
    for (const LinearInfo& linear : model_->linears()) {
      const Format* format = &SourceFormat();
      if (linear.name.find("layers.0.mlp") != std::string::npos) format = FindFormat("nvfp4");
      if (linear.name.find("out_proj") != std::string::npos) format = FindFormat("fp8");
      if (linear.name.find("self_attn") != std::string::npos) format = FindFormat("mxfp8");
      formats[linear.name] = format;
    }
    return formats;
  }

  ExportPlan Plan(const std::map<std::string, const Format*>& formats) const {
    ExportPlan plan;
    plan.model = model_.get();
    plan.formats = formats;
    plan.rendered = [this, formats](const std::string& name) -> Result<StoredTensors> {
      for (const LinearInfo& linear : model_->linears()) {
        if (linear.name != name) continue;
        const at::Tensor weight = Must(model_->LoadWeight(linear)).to(at::kFloat);
        return formats.at(name)->Encode(weight, {.weight_amax = 4, .input_amax = 8}, linear.dtype);
      }
      return Status::InvalidInput("no Linear " + name);
    };
    plan.run_record = {{"schema", 1}};
    plan.card = "# Card\n";
    return plan;
  }

  template <typename T>
  static T Must(Result<T> result) {
    EXPECT_TRUE(result.ok()) << result.status().message();
    return std::move(result).value();
  }

 private:
  static std::string UniqueName() {
    const auto* test = ::testing::UnitTest::GetInstance()->current_test_info();
    return std::string("pq_") + test->test_suite_name() + "_" + test->name();
  }

  void Add(const std::string& name, std::vector<int64_t> shape, DType dtype = DType::kBF16) {
    const at::Tensor tensor = torch::randn(shape).to(ToScalarType(dtype));
    tensors_.push_back({{name, dtype, shape}, [tensor](const CheckpointWriter::Sink& sink) {
                          return sink(TensorBytes(tensor));
                        }});
  }

  void AddMlp(const std::string& layer) {
    Add(layer + "mlp.gate_proj.weight", {128, 64});
    Add(layer + "mlp.up_proj.weight", {128, 64});
    Add(layer + "mlp.down_proj.weight", {64, 128});
    Add(layer + "input_layernorm.weight", {64});
    Add(layer + "post_attention_layernorm.weight", {64});
  }

  void AddAttention(const std::string& layer) {
    Add(layer + "self_attn.q_proj.weight", {128, 64});
    Add(layer + "self_attn.k_proj.weight", {32, 64});
    Add(layer + "self_attn.v_proj.weight", {32, 64});
    Add(layer + "self_attn.o_proj.weight", {64, 64});
    Add(layer + "self_attn.q_norm.weight", {32});
    Add(layer + "self_attn.k_norm.weight", {32});
  }

  void WriteSource() {
    const std::string linear = std::string(kLinearLayer) + "linear_attn.";
    Add("lm_head.weight", {48, 64});
    Add("model.language_model.embed_tokens.weight", {48, 64});
    Add("model.language_model.norm.weight", {64});
    Add(linear + "A_log", {2}, DType::kF32);
    Add(linear + "dt_bias", {2});
    Add(linear + "conv1d.weight", {192, 1, 4});
    Add(linear + "norm.weight", {32}, DType::kF32);
    Add(linear + "in_proj_qkv.weight", {192, 64});
    Add(linear + "in_proj_z.weight", {64, 64});
    Add(linear + "in_proj_a.weight", {2, 64});
    Add(linear + "in_proj_b.weight", {2, 64});
    Add(linear + "out_proj.weight", {64, 64});
    AddMlp(kLinearLayer);
    AddAttention(kFullLayer);
    AddMlp(kFullLayer);
    Add("model.visual.pos_embed.weight", {16, 32});
    Add("model.visual.merger.linear_fc1.weight", {32, 32});
    Add("model.visual.merger.linear_fc1.bias", {32});
    Add("mtp.fc.weight", {64, 128});
    AddAttention("mtp.layers.0.");
    const Status written = CheckpointWriter::Write(
        FileSystem::Default(), source(), {.shard_bytes = 60'000, .overwrite = false, .check = {}},
        tensors_,
        {{"config.json", Config().dump()}, {"tokenizer.json", "{}"}, {"LICENSE", "Free\n"}});
    ASSERT_TRUE(written.ok()) << written.message();
  }

  static Json Config() {
    return {
        {"architectures", {"Qwen3_5ForConditionalGeneration"}},
        {"model_type", "qwen3_5"},
        {"tie_word_embeddings", false},
        {"text_config",
         {{"model_type", "qwen3_5_text"},
          {"hidden_size", 64},
          {"intermediate_size", 128},
          {"num_hidden_layers", 2},
          {"layer_types", {"linear_attention", "full_attention"}},
          {"num_attention_heads", 2},
          {"num_key_value_heads", 1},
          {"head_dim", 32},
          {"attn_output_gate", true},
          {"linear_num_key_heads", 2},
          {"linear_num_value_heads", 2},
          {"linear_key_head_dim", 32},
          {"linear_value_head_dim", 32},
          {"linear_conv_kernel_dim", 4},
          {"hidden_act", "silu"},
          {"attention_bias", false},
          {"rms_norm_eps", 1e-6},
          {"vocab_size", 48},
          {"tie_word_embeddings", false},
          {"max_position_embeddings", 128},
          {"rope_parameters",
           {{"rope_type", "default"}, {"rope_theta", 10000.0}, {"partial_rotary_factor", 0.25}}}}}};
  }

  std::filesystem::path root_;
  std::vector<CheckpointWriter::Tensor> tensors_;
  std::unique_ptr<Checkpoint> checkpoint_;
  std::unique_ptr<Model> model_;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_EXPORT_TINY_CHECKPOINT_H_

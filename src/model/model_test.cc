#include "model/model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <filesystem>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "formats/format.h"
#include "formats/tensor_bytes.h"
#include "model/plain_linears.h"

namespace prismaquant {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kGate[] = "model.layers.1.mlp.gate_proj.weight";

// A Qwen3 checkpoint of two layers in a folder of its own: tests spoil its configuration or its
// tensors, then open it.
class ModelTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto* test = ::testing::UnitTest::GetInstance()->current_test_info();
    folder_ =
        std::filesystem::path(::testing::TempDir()) / (std::string("pq_model_") + test->name());
    torch::manual_seed(1);
    Add("model.embed_tokens.weight", {48, 32});
    Add("model.norm.weight", {32});
    Add("lm_head.weight", {48, 32});
    for (const std::string layer : {"model.layers.0.", "model.layers.1."}) {
      Add(layer + "input_layernorm.weight", {32});
      Add(layer + "post_attention_layernorm.weight", {32});
      Add(layer + "self_attn.q_proj.weight", {64, 32});
      Add(layer + "self_attn.k_proj.weight", {32, 32});
      Add(layer + "self_attn.v_proj.weight", {32, 32});
      Add(layer + "self_attn.o_proj.weight", {32, 64});
      Add(layer + "self_attn.q_norm.weight", {16});
      Add(layer + "self_attn.k_norm.weight", {16});
      Add(layer + "mlp.gate_proj.weight", {40, 32});
      Add(layer + "mlp.up_proj.weight", {40, 32});
      Add(layer + "mlp.down_proj.weight", {32, 40});
    }
  }

  void TearDown() override {
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
  }

  void Add(const std::string& name, const std::vector<int64_t>& shape) {
    tensors_[name] = (torch::randn(shape) * 0.3).to(at::kBFloat16);
  }

  Status Open() {
    std::vector<CheckpointWriter::Tensor> plan;
    for (const auto& [name, tensor] : tensors_) {
      plan.push_back({{name, FromScalarType(tensor.scalar_type()), tensor.sizes().vec()},
                      [tensor = tensor](const CheckpointWriter::Sink& sink) {
                        return sink(TensorBytes(tensor));
                      }});
    }
    PQ_RETURN_IF_ERROR(CheckpointWriter::Write(
        FileSystem::Default(), folder_, {.shard_bytes = 1 << 20, .overwrite = true, .check = {}},
        plan, {{"config.json", config_.dump()}}));
    PQ_ASSIGN_OR_RETURN(Checkpoint checkpoint, Checkpoint::Open(folder_));
    checkpoint_ = std::make_unique<Checkpoint>(std::move(checkpoint));
    PQ_ASSIGN_OR_RETURN(model_, Model::Open(*checkpoint_));
    return {};
  }

  std::string OpenError() {
    const Status status = Open();
    EXPECT_EQ(status.code(), StatusCode::kInvalidInput);
    EXPECT_THAT(status.message(), HasSubstr(folder_.string()));
    return status.message();
  }

  Result<at::Tensor> Logits(at::ScalarType dtype = at::kFloat) {
    return ForwardLogits(*model_, Ids(), {.dtype = dtype});
  }
  static at::Tensor Ids() { return at::arange(14).reshape({2, 7}); }

  std::filesystem::path folder_;
  std::map<std::string, at::Tensor> tensors_;
  Json config_ = {{"architectures", {"Qwen3ForCausalLM"}},
                  {"vocab_size", 48},
                  {"hidden_size", 32},
                  {"num_hidden_layers", 2},
                  {"intermediate_size", 40},
                  {"num_attention_heads", 4},
                  {"num_key_value_heads", 2},
                  {"head_dim", 16},
                  {"tie_word_embeddings", false}};
  std::unique_ptr<Checkpoint> checkpoint_;
  std::unique_ptr<Model> model_;
};

TEST_F(ModelTest, InventoryListsLinearsInLayerAndStageOrder) {
  const Status opened = Open();
  ASSERT_TRUE(opened.ok()) << opened.message();
  ASSERT_EQ(model_->linears().size(), 15u);
  const LinearInfo& head = model_->linears().back();
  EXPECT_EQ(head.name, "lm_head");
  EXPECT_EQ(head.part, Part::kHead);
  EXPECT_EQ(head.layer, 2);
  EXPECT_FALSE(head.allocatable);
  EXPECT_EQ(model_->num_layers(), 3);
  const std::vector<LinearInfo> layer = model_->LayerLinears(1);
  std::vector<std::string> names;
  std::vector<int> stages;
  for (const LinearInfo& linear : layer) {
    names.push_back(linear.name.substr(linear.name.rfind('.') + 1));
    stages.push_back(linear.stage);
    EXPECT_EQ(linear.layer, 1);
    EXPECT_EQ(linear.dtype, DType::kBF16);
    EXPECT_TRUE(linear.allocatable);
    EXPECT_EQ(linear.ends_layer, names.back() == "down_proj");
  }
  EXPECT_THAT(names, ElementsAre("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                                 "down_proj"));
  EXPECT_THAT(stages, ElementsAre(0, 0, 0, 1, 2, 2, 3));
  EXPECT_EQ(layer[1].unit, "model.layers.1.self_attn.qkv_proj");
  EXPECT_EQ(layer[3].unit, layer[3].name);
  EXPECT_EQ(layer[3].out, 32);
  EXPECT_EQ(layer[3].in, 64);
  EXPECT_EQ(model_->LayerTensors(1).size(), 11u);
}

TEST_F(ModelTest, LogitsComeInTheComputeTypeAndAgree) {
  ASSERT_TRUE(Open().ok());
  const Result<at::Tensor> exact = Logits(at::kDouble);
  const Result<at::Tensor> single = Logits(at::kFloat);
  const Result<at::Tensor> half = Logits(at::kBFloat16);
  ASSERT_TRUE(exact.ok() && single.ok() && half.ok());
  EXPECT_EQ(half->scalar_type(), at::kBFloat16);
  EXPECT_EQ(exact->sizes(), (std::vector<int64_t>{2, 7, 48}));
  EXPECT_TRUE(at::allclose(*exact, single->to(at::kDouble), 1e-4, 1e-5));
  EXPECT_TRUE(at::allclose(*exact, half->to(at::kDouble), 0.1, 0.1));
}

TEST_F(ModelTest, SequencesOfABatchDoNotSeeEachOther) {
  ASSERT_TRUE(Open().ok());
  const Result<at::Tensor> both = Logits(at::kDouble);
  const Result<at::Tensor> second =
      ForwardLogits(*model_, Ids().narrow(0, 1, 1), {.dtype = at::kDouble});
  ASSERT_TRUE(both.ok() && second.ok());
  EXPECT_TRUE(at::allclose(both->narrow(0, 1, 1), *second, 1e-12, 1e-12));
}

TEST_F(ModelTest, ATiedHeadReadsTheEmbeddings) {
  tensors_["lm_head.weight"] = tensors_["model.embed_tokens.weight"].clone();
  ASSERT_TRUE(Open().ok());
  const Result<at::Tensor> untied = Logits();
  config_["tie_word_embeddings"] = true;
  tensors_.erase("lm_head.weight");
  ASSERT_TRUE(Open().ok());
  const Result<at::Tensor> tied = Logits();
  ASSERT_TRUE(untied.ok() && tied.ok());
  EXPECT_TRUE(at::equal(*untied, *tied));
}

TEST_F(ModelTest, AMissingTensorIsNamed) {
  for (const char* name : {"lm_head.weight", "model.norm.weight", "model.embed_tokens.weight",
                           "model.layers.0.self_attn.q_norm.weight", kGate}) {
    const at::Tensor kept = tensors_.extract(name).mapped();
    EXPECT_THAT(OpenError(), HasSubstr(name));
    tensors_[name] = kept;
  }
}

TEST_F(ModelTest, AWrongShapeIsNamedWithFoundAndExpected) {
  tensors_[kGate] = tensors_[kGate].narrow(0, 0, 39).contiguous();
  EXPECT_THAT(OpenError(), AllOf(HasSubstr(kGate), HasSubstr("[39, 32]"), HasSubstr("[40, 32]")));
}

TEST_F(ModelTest, AWrongNormShapeIsNamed) {
  const std::string name = "model.layers.0.self_attn.k_norm.weight";
  tensors_[name] = torch::ones({32}).to(at::kBFloat16);
  EXPECT_THAT(OpenError(), AllOf(HasSubstr(name), HasSubstr("[32]"), HasSubstr("[16]")));
}

TEST_F(ModelTest, AnIntegerWeightIsRefused) {
  tensors_[kGate] = torch::zeros({40, 32}, torch::dtype(at::kInt));
  EXPECT_THAT(OpenError(), AllOf(HasSubstr(kGate), HasSubstr("I32"), HasSubstr("BF16")));
}

TEST_F(ModelTest, AnAnnouncedBiasMustExist) {
  config_["attention_bias"] = true;
  EXPECT_THAT(OpenError(), HasSubstr("model.layers.0.self_attn.q_proj.bias"));
}

TEST_F(ModelTest, MoreLayersThanTensorsAreRefused) {
  config_["num_hidden_layers"] = 3;
  EXPECT_THAT(OpenError(), HasSubstr("model.layers.2."));
}

TEST_F(ModelTest, ValuesThatAreNotFiniteAreRefusedByTensor) {
  const std::vector<std::string> names = {kGate, "lm_head.weight", "model.norm.weight",
                                          "model.layers.0.self_attn.q_norm.weight",
                                          "model.layers.1.input_layernorm.weight"};
  for (const std::string& name : names) {
    for (const float value :
         {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
      const at::Tensor kept = tensors_[name].clone();
      tensors_[name].view({-1})[3] = value;
      ASSERT_TRUE(Open().ok());
      const Result<at::Tensor> logits = Logits();
      EXPECT_EQ(logits.status().code(), StatusCode::kInvalidInput);
      EXPECT_THAT(logits.status().message(), AllOf(HasSubstr(folder_.string()), HasSubstr(name)));
      tensors_[name] = kept;
    }
  }
}

TEST_F(ModelTest, EmbeddingsAreCheckedWhereTheyAreRead) {
  tensors_["model.embed_tokens.weight"][40][1] = std::numeric_limits<float>::quiet_NaN();
  ASSERT_TRUE(Open().ok());
  EXPECT_TRUE(Logits().ok());
  const Result<at::Tensor> embedded = model_->Embed(torch::tensor({{3, 40}}), {});
  EXPECT_THAT(embedded.status().message(), HasSubstr("model.embed_tokens.weight"));
}

TEST_F(ModelTest, IdsOutsideTheVocabularyAreNamed) {
  ASSERT_TRUE(Open().ok());
  EXPECT_THAT(model_->Embed(torch::tensor({{0, 48}}), {}).status().message(), HasSubstr("48"));
  EXPECT_THAT(model_->Embed(torch::tensor({{0, -7}}), {}).status().message(), HasSubstr("-7"));
}

// Of every site of the layer, other powers of two for each channel.
SmoothingExponents SomeExponents(const Model& model, int layer) {
  SmoothingExponents exponents;
  for (const SmoothingSite& site : model.SmoothingSites(layer)) {
    for (int64_t c = 0; c < site.channels; ++c) {
      exponents[site.key()].push_back(static_cast<int8_t>((c * 5 + layer) % 7 - 3));
    }
  }
  return exponents;
}

TEST_F(ModelTest, ASmoothedModelComputesTheSameFromOtherTensors) {
  ASSERT_TRUE(Open().ok());
  const at::Tensor logits = *Logits();
  const Result<at::Tensor> before = model_->LoadTensor("model.layers.1.self_attn.v_proj.weight");
  const SmoothingExponents exponents = SomeExponents(*model_, 1);
  EXPECT_EQ(exponents.size(), 4u);  // two norms, v and up
  auto smoothing = Smoothing::Make(*model_, exponents);
  ASSERT_TRUE(smoothing.ok()) << smoothing.status().message();
  model_->SetSmoothing(*smoothing);
  EXPECT_TRUE(at::equal(*Logits(), logits));
  // v takes the norm's factors into its columns and its own out of its rows.
  const at::Tensor after = *model_->LoadTensor("model.layers.1.self_attn.v_proj.weight");
  EXPECT_FALSE(at::equal(after, *before));
  const float row = std::exp2(-static_cast<float>((2 * 5 + 1) % 7 - 3));
  const float column = std::exp2(static_cast<float>((3 * 5 + 1) % 7 - 3));
  EXPECT_EQ(after[2][3].item<float>(), (*before)[2][3].item<float>() * row * column);
  EXPECT_TRUE(model_->smoothing()->Changes("model.layers.1.input_layernorm.weight"));
  EXPECT_FALSE(model_->smoothing()->Changes("model.layers.0.input_layernorm.weight"));
  EXPECT_FALSE(model_->smoothing()->Changes("lm_head.weight"));
}

TEST_F(ModelTest, SmoothingOfAnotherModelIsRefused) {
  ASSERT_TRUE(Open().ok());
  const auto unknown = Smoothing::Make(*model_, {{"model.layers.7.mlp.up_proj", {0}}});
  EXPECT_EQ(unknown.status().code(), StatusCode::kInvalidInput);
  EXPECT_THAT(unknown.status().message(), HasSubstr("model.layers.7.mlp.up_proj"));
  const auto narrow = Smoothing::Make(*model_, {{"model.layers.1.mlp.up_proj", {0, 1}}});
  EXPECT_THAT(narrow.status().message(), AllOf(HasSubstr("2 channels"), HasSubstr("expected 40")));
}

TEST_F(ModelTest, AWeightThatSmoothingDrivesOutOfItsDtypeIsRefused) {
  for (auto& [name, tensor] : tensors_) tensor = tensor.to(at::kHalf);
  tensors_[kGate].fill_(60000);
  ASSERT_TRUE(Open().ok());
  auto smoothing = Smoothing::Make(*model_, SomeExponents(*model_, 1));
  ASSERT_TRUE(smoothing.ok());
  model_->SetSmoothing(*smoothing);
  const Status status = model_->LoadTensor(kGate).status();
  EXPECT_EQ(status.code(), StatusCode::kInvalidInput);
  EXPECT_THAT(status.message(), AllOf(HasSubstr(kGate), HasSubstr("smoothed, holds")));
}

}  // namespace
}  // namespace prismaquant

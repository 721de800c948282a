#include "model/vision.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <filesystem>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "formats/format.h"
#include "formats/write_tensors.h"
#include "io/temporary_folder.h"
#include "model/vision_blocks.h"

namespace prismaquant {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kQkv[] = "model.visual.blocks.1.attn.qkv";
constexpr int kFirstLayer = 7;

// A tower of two blocks in a folder of its own: tests spoil its configuration or its tensors, then
// open it.
class VisionTowerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
    Add("patch_embed.proj.weight", {16, 3, 2, 4, 4});
    Add("patch_embed.proj.bias", {16});
    Add("pos_embed.weight", {9, 16});
    for (const std::string block : {"blocks.0.", "blocks.1."}) {
      AddNorm(block + "norm1");
      AddNorm(block + "norm2");
      AddLinear(block + "attn.qkv", 48, 16);
      AddLinear(block + "attn.proj", 16, 16);
      AddLinear(block + "mlp.linear_fc1", 24, 16);
      AddLinear(block + "mlp.linear_fc2", 16, 24);
    }
    AddNorm("merger.norm");
    AddLinear("merger.linear_fc1", 64, 64);
    AddLinear("merger.linear_fc2", 40, 64);
  }

  void Add(const std::string& name, const std::vector<int64_t>& shape) {
    tensors_["model.visual." + name] = (torch::randn(shape) * 0.3).to(at::kBFloat16);
  }
  void AddNorm(const std::string& name) {
    Add(name + ".weight", {16});
    Add(name + ".bias", {16});
  }
  void AddLinear(const std::string& name, int64_t out, int64_t in) {
    Add(name + ".weight", {out, in});
    Add(name + ".bias", {out});
  }

  Status Open() {
    PQ_RETURN_IF_ERROR(WriteTensors(Path(), tensors_, config_));
    PQ_ASSIGN_OR_RETURN(Checkpoint checkpoint, Checkpoint::Open(Path()));
    checkpoint_ = std::make_unique<Checkpoint>(std::move(checkpoint));
    PQ_ASSIGN_OR_RETURN(tower_, VisionTower::Open(*checkpoint_, kFirstLayer));
    return {};
  }
  std::string OpenError() {
    const Status status = Open();
    EXPECT_EQ(status.code(), StatusCode::kInvalidInput);
    EXPECT_THAT(status.message(), HasSubstr(Path().string()));
    return status.message();
  }
  std::string ConfigError(const char* key, const Json& value) {
    Json& vision = config_["vision_config"];
    const Json kept = vision;
    vision[key] = value;
    const std::string message = OpenError();
    EXPECT_THAT(message, AllOf(HasSubstr("config.json: vision_config"), HasSubstr(key)));
    vision = kept;
    return message;
  }
  std::filesystem::path Path() const { return folder_ / "tower"; }

  TemporaryFolder folder_;
  std::map<std::string, at::Tensor> tensors_;
  Json config_ = {{"text_config", {{"hidden_size", 40}}},
                  {"vision_config",
                   {{"depth", 2},
                    {"hidden_size", 16},
                    {"intermediate_size", 24},
                    {"num_heads", 2},
                    {"in_channels", 3},
                    {"patch_size", 4},
                    {"temporal_patch_size", 2},
                    {"spatial_merge_size", 2},
                    {"out_hidden_size", 40},
                    {"num_position_embeddings", 9},
                    {"hidden_act", "gelu_pytorch_tanh"},
                    {"deepstack_visual_indexes", Json::array()}}}};
  std::unique_ptr<Checkpoint> checkpoint_;
  std::unique_ptr<VisionTower> tower_;
};

TEST_F(VisionTowerTest, InventoryListsLinearsInBlockAndStageOrder) {
  const Status opened = Open();
  ASSERT_TRUE(opened.ok()) << opened.message();
  ASSERT_EQ(tower_->num_blocks(), 3);
  ASSERT_EQ(tower_->linears().size(), 10u);
  std::vector<std::string> names;
  std::vector<int> layers, stages;
  for (const LinearInfo& linear : tower_->linears()) {
    EXPECT_EQ(linear.unit, linear.name);
    EXPECT_TRUE(linear.has_bias && linear.allocatable);
    EXPECT_EQ(linear.dtype, DType::kBF16);
    if (linear.layer == kFirstLayer) continue;
    names.push_back(linear.name);
    layers.push_back(linear.layer);
    stages.push_back(linear.stage);
  }
  EXPECT_THAT(
      names,
      ElementsAre(kQkv, "model.visual.blocks.1.attn.proj", "model.visual.blocks.1.mlp.linear_fc1",
                  "model.visual.blocks.1.mlp.linear_fc2", "model.visual.merger.linear_fc1",
                  "model.visual.merger.linear_fc2"));
  EXPECT_THAT(layers, ElementsAre(8, 8, 8, 8, 9, 9));
  EXPECT_THAT(stages, ElementsAre(0, 1, 2, 3, 0, 1));
  EXPECT_EQ(tower_->BlockPrefix(1), "model.visual.blocks.1.");
  EXPECT_EQ(tower_->BlockLinears(2)[1].out, 40);
  EXPECT_EQ(tower_->BlockLinears(2)[1].in, 64);
}

TEST_F(VisionTowerTest, AMissingTensorIsNamed) {
  for (const std::string name : {"pos_embed.weight", "patch_embed.proj.bias", "blocks.0.norm2.bias",
                                 "blocks.1.attn.qkv.weight", "blocks.1.mlp.linear_fc2.bias",
                                 "merger.norm.weight", "merger.linear_fc1.weight"}) {
    const at::Tensor kept = tensors_.extract("model.visual." + name).mapped();
    EXPECT_THAT(OpenError(), HasSubstr(name));
    tensors_["model.visual." + name] = kept;
  }
}

TEST_F(VisionTowerTest, AWrongShapeOrTypeIsNamedWithFoundAndExpected) {
  const std::string weight = std::string(kQkv) + ".weight";
  tensors_[weight] = torch::zeros({48, 15}).to(at::kBFloat16);
  EXPECT_THAT(OpenError(), AllOf(HasSubstr(weight), HasSubstr("[48, 15]"), HasSubstr("[48, 16]")));
  tensors_[weight] = torch::zeros({48, 16}, torch::dtype(at::kInt));
  EXPECT_THAT(OpenError(), AllOf(HasSubstr(weight), HasSubstr("I32"), HasSubstr("BF16")));
}

TEST_F(VisionTowerTest, AQuantizedLinearOpensWithoutItsWeight) {
  tensors_.erase(std::string(kQkv) + ".weight");
  tensors_[std::string(kQkv) + ".weight_packed"] = torch::zeros({48, 8}, torch::dtype(at::kByte));
  const Status opened = Open();
  ASSERT_TRUE(opened.ok()) << opened.message();
  EXPECT_EQ(tower_->BlockLinears(1)[0].dtype, DType::kBF16);
  EXPECT_TRUE(tower_->LoadBlock(1, {}).ok());
}

TEST_F(VisionTowerTest, AnUnsupportedConfigurationIsRefusedByKey) {
  const std::vector<std::pair<const char*, Json>> settings = {
      {"hidden_act", "gelu"},
      {"deepstack_visual_indexes", {5, 11}},
      {"depth", 0},
      {"num_heads", 3},
      {"hidden_size", "16"},
      {"in_channels", 1},
      {"head_dim", 12},
      {"patch_size", nullptr},
      {"num_position_embeddings", 8},
      {"out_hidden_size", 41},
      {"rope_parameters", 5},
      {"rope_parameters", {{"rope_type", "default"}}},
      {"rope_parameters", {{"rope_theta", -1}}}};
  for (const auto& [key, value] : settings) ConfigError(key, value);
  EXPECT_THAT(ConfigError("hidden_act", "gelu"), HasSubstr("expected gelu_pytorch_tanh"));
  config_.erase("vision_config");
  EXPECT_THAT(OpenError(), HasSubstr("vision_config"));
}

TEST_F(VisionTowerTest, PatchesMustFitTheGrid) {
  ASSERT_TRUE(Open().ok());
  const at::Tensor patches = torch::randn({8, 96});
  EXPECT_EQ(tower_->Embed(patches, 2, 4, {})->sizes(), (std::vector<int64_t>{1, 8, 16}));
  for (const auto& [rows, columns] : {std::pair(1, 8), {0, 4}, {2, 5}, {2, 6}, {-2, -4}}) {
    const Status status = tower_->Embed(patches, rows, columns, {}).status();
    EXPECT_EQ(status.code(), StatusCode::kInvalidInput);
    EXPECT_THAT(status.message(), HasSubstr("expected"));
  }
  EXPECT_THAT(tower_->Embed(torch::randn({8, 48}), 2, 4, {}).status().message(),
              AllOf(HasSubstr("[8, 48]"), HasSubstr("[8, 96]")));
}

TEST_F(VisionTowerTest, ValuesThatAreNotFiniteAreRefusedByTensor) {
  const std::string norm = "model.visual.merger.norm.bias", table = "model.visual.pos_embed.weight";
  tensors_[norm][3] = std::numeric_limits<float>::quiet_NaN();
  tensors_[table][3][1] = std::numeric_limits<float>::infinity();
  ASSERT_TRUE(Open().ok());
  EXPECT_TRUE(tower_->LoadBlock(0, {}).ok());
  EXPECT_THAT(tower_->LoadBlock(2, {}).status().message(), HasSubstr(norm));
  EXPECT_THAT(tower_->Embed(torch::randn({8, 96}), 2, 4, {}).status().message(), HasSubstr(table));
}

TEST(VisionBlocks, PatchesAreOrderedBlockByBlock) {
  const PatchPositions places = MergeOrder(2, 4, 2);
  EXPECT_TRUE(at::equal(places.row, at::tensor(std::vector<int64_t>{0, 0, 1, 1, 0, 0, 1, 1})));
  EXPECT_TRUE(at::equal(places.column, at::tensor(std::vector<int64_t>{0, 1, 0, 1, 2, 3, 2, 3})));
}

TEST(VisionBlocks, ThePositionTableIsStretchedToTheCorners) {
  const at::Tensor table = at::tensor({0.0, 1.0, 10.0, 11.0}, at::kDouble).unsqueeze(-1);
  const at::Tensor square = InterpolatePositions(table, 2, 3, 3, 1).flatten();
  const at::Tensor expected = at::tensor({0.0, 0.5, 1.0, 5.0, 5.5, 6.0, 10.0, 10.5, 11.0});
  EXPECT_TRUE(at::allclose(square, expected.to(at::kDouble), 1e-12, 1e-12)) << square;
  const at::Tensor row = InterpolatePositions(table, 2, 1, 2, 1).flatten();
  EXPECT_TRUE(at::equal(row, at::tensor({0.0, 1.0}, at::kDouble))) << row;
}

}  // namespace
}  // namespace prismaquant

// Checkpoints of a mixture of experts: what becomes of packed tensors.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "export/exporter.h"
#include "export/summary.h"
#include "export/verify.h"
#include "io/temporary_folder.h"

namespace prismaquant {
namespace {

using ::testing::HasSubstr;
using FormatMap = std::map<std::string, const Format*>;

constexpr char kPacked[] = "model.language_model.layers.3.mlp.experts.gate_up_proj";
constexpr char kUp[] = "model.language_model.layers.3.mlp.experts.5.up_proj";

class ExpertsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const char* source = std::getenv("PRISMAQUANT_SOURCE_DIR");
    ASSERT_NE(source, nullptr) << "PRISMAQUANT_SOURCE_DIR is not set; ctest sets it";
    const std::filesystem::path folder =
        std::filesystem::path(source) / "examples" / "tiny-qwen3_5_moe";
    checkpoint_ = std::make_unique<Checkpoint>(Checkpoint::Open(folder).value());
    model_ = Model::Open(*checkpoint_).value();
    for (const LinearInfo& linear : model_->linears()) formats_[linear.name] = &SourceFormat();
  }
  // Gives the experts of a layer, named by its prefix, a format.
  void SetExperts(const std::string& prefix, const char* format) {
    for (const LinearInfo& linear : model_->linears()) {
      if (linear.unit == prefix + "mlp.experts") formats_[linear.name] = FindFormat(format);
    }
  }
  Status Export(double scale = 1) {
    std::map<std::string, const LinearInfo*> linears;
    for (const LinearInfo& linear : model_->linears()) linears[linear.name] = &linear;
    ExportPlan plan{.model = model_.get(), .formats = formats_};
    plan.rendered = [&, scale](const std::string& name) -> Result<StoredTensors> {
      PQ_ASSIGN_OR_RETURN(const at::Tensor weight, model_->LoadWeight(*linears.at(name)));
      const SharedScales shared{.weight_amax = name == kUp ? 2 * scale : 2, .input_amax = 3};
      return formats_.at(name)->Encode(weight.to(at::kFloat), shared, DType::kBF16);
    };
    plan.options.overwrite = true;
    return ExportCheckpoint(FileSystem::Default(), plan, out());
  }
  std::filesystem::path out() const { return folder_ / "out"; }
  const TensorView& Source(const std::string& name) const { return *checkpoint_->Find(name); }

  TemporaryFolder folder_;
  std::unique_ptr<Checkpoint> checkpoint_;
  std::unique_ptr<Model> model_;
  FormatMap formats_;
};

bool SameBytes(std::span<const std::byte> a, std::span<const std::byte> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size()) == 0;
}

TEST_F(ExpertsTest, TheInventoryHasEveryExpertWithItsSlice) {
  int64_t experts = 0;
  for (const LinearInfo& linear : model_->linears()) {
    if (!linear.is_expert) continue;
    ++experts;
    EXPECT_FALSE(linear.packed.tensor.empty());
    EXPECT_EQ(linear.unit, linear.name.substr(0, linear.name.find(".experts.")) + ".experts");
  }
  EXPECT_EQ(experts, 9 * 8 * 3);
  const at::Tensor packed = TensorFromView(Source(kPacked));
  for (const LinearInfo& linear : model_->linears()) {
    if (linear.name != kUp) continue;
    EXPECT_TRUE(model_->LoadWeight(linear)->equal(packed[5].narrow(0, 64, 64)));
    EXPECT_EQ(linear.scale_group, "model.language_model.layers.3.mlp.experts.5.w13");
    EXPECT_EQ(linear.input_group, "model.language_model.layers.3.mlp.experts.w13");
  }
}

TEST_F(ExpertsTest, OneQuantizedLayerUnpacksItsPartAndNoOther) {
  SetExperts("model.language_model.layers.0.", "nvfp4");
  const Status status = Export();
  ASSERT_TRUE(status.ok()) << status.message();
  const Checkpoint written = Checkpoint::Open(out()).value();
  EXPECT_EQ(written.Find(kPacked), nullptr);
  const at::Tensor up = TensorFromView(*written.Find(std::string(kUp) + ".weight"));
  EXPECT_TRUE(up.equal(TensorFromView(Source(kPacked))[5].narrow(0, 64, 64)));
  const std::string mtp = "mtp.layers.0.mlp.experts.down_proj";
  EXPECT_TRUE(SameBytes(written.Find(mtp)->bytes, Source(mtp).bytes));
  const auto reopened = Model::Open(written).value();
  EXPECT_EQ(reopened->linears().size(), model_->linears().size());
  const CheckpointSummary summary = Summarize(*reopened).value();
  EXPECT_EQ(summary.parameters, Summarize(*model_)->parameters);
  EXPECT_LT(summary.active_bytes, summary.linear_bytes);
  EXPECT_EQ(summary.parts.at(Part::kText).formats.at("nvfp4").linears, 24);
}

TEST_F(ExpertsTest, NothingIsUnpackedWithoutAQuantizedExpert) {
  formats_["model.language_model.layers.3.self_attn.o_proj"] = FindFormat("fp8");
  ASSERT_TRUE(Export().ok());
  const Checkpoint written = Checkpoint::Open(out()).value();
  EXPECT_TRUE(SameBytes(written.Find(kPacked)->bytes, Source(kPacked).bytes));
}

TEST_F(ExpertsTest, ExpertsOfALayerShareTheirFormat) {
  SetExperts("model.language_model.layers.3.", "nvfp4");
  formats_[kUp] = FindFormat("fp8");
  EXPECT_THAT(Export().message(), HasSubstr("model.language_model.layers.3.mlp.experts"));
}

TEST_F(ExpertsTest, GateAndUpOfAnExpertShareTheirGlobalScale) {
  SetExperts("model.language_model.layers.3.", "nvfp4");
  ASSERT_TRUE(Export().ok());
  EXPECT_THAT(Export(/*scale=*/2).message(), HasSubstr("weight_global_scale differs"));
}

}  // namespace
}  // namespace prismaquant

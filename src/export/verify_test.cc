#include "export/verify.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "export/tiny_checkpoint.h"

namespace prismaquant {
namespace {

using ::testing::HasSubstr;

constexpr char kIndex[] = "model.safetensors.index.json";

// A verified export in several shards whose files a test then damages.
class Verify : public ::testing::Test {
 protected:
  void SetUp() override {
    ExportPlan plan = tiny_.Plan(tiny_.MixedFormats());
    plan.options.shard_bytes = 60'000;
    const Status status = ExportCheckpoint(FileSystem::Default(), plan, tiny_.out());
    ASSERT_TRUE(status.ok()) << status.message();
  }

  // Message of the verification; empty if it passes.
  std::string Check(bool with_source) const {
    const Result<Checkpoint> out = Checkpoint::Open(tiny_.out());
    if (!out.ok()) return out.status().message();
    const Status status = VerifyCheckpoint(*out, with_source ? &tiny_.checkpoint() : nullptr);
    EXPECT_TRUE(status.ok() || status.code() == StatusCode::kUnmet);
    return status.message();
  }

  // Overwrites one byte of a tensor on disk.
  void Poke(const std::string& tensor, int64_t at, unsigned char value) const {
    const Checkpoint out = TinyCheckpoint::Must(Checkpoint::Open(tiny_.out()));
    const Json index = ReadJson(kIndex);
    const std::string shard = index["weight_map"][tensor];
    const SafetensorsFile file = TinyCheckpoint::Must(SafetensorsFile::Open(tiny_.out() / shard));
    const int64_t offset = file.Find(tensor)->bytes.data() - file.mapping().bytes().data() + at;
    std::fstream stream(tiny_.out() / shard, std::ios::in | std::ios::out | std::ios::binary);
    stream.seekp(offset);
    stream.put(static_cast<char>(value));
  }

  Json ReadJson(const std::string& file) const {
    return Json::parse(TinyCheckpoint::Must(ReadFile(tiny_.out() / file)));
  }
  void WriteJson(const std::string& file, const Json& json) const {
    std::ofstream(tiny_.out() / file) << json.dump();
  }

  // Rewrites the checkpoint with its tensors changed by `edit`.
  void Rewrite(const std::function<void(std::vector<CheckpointWriter::Tensor>&)>& edit) const {
    const auto out =
        std::make_shared<Checkpoint>(TinyCheckpoint::Must(Checkpoint::Open(tiny_.out())));
    std::vector<CheckpointWriter::Tensor> tensors;
    for (const std::string& name : out->names()) {
      const TensorView& view = *out->Find(name);
      tensors.push_back(
          {{name, view.dtype, view.shape},
           [out, &view](const CheckpointWriter::Sink& sink) { return sink(view.bytes); }});
    }
    edit(tensors);
    CheckpointWriter::Options options;
    options.overwrite = true;
    auto files = TinyCheckpoint::Must(PassthroughFiles(tiny_.out()));
    files["config.json"] = out->config().dump();
    ASSERT_TRUE(
        CheckpointWriter::Write(FileSystem::Default(), tiny_.out(), options, tensors, files).ok());
  }

  static void Erase(std::vector<CheckpointWriter::Tensor>& tensors, const std::string& name) {
    std::erase_if(tensors, [&](const auto& tensor) { return tensor.spec.name == name; });
  }

  const TinyCheckpoint tiny_;
  const std::string gate_ = std::string(TinyCheckpoint::kLinearLayer) + "mlp.gate_proj";
  const std::string q_ = std::string(TinyCheckpoint::kFullLayer) + "self_attn.q_proj";
};

TEST_F(Verify, AcceptsAnExportAndItsSource) {
  EXPECT_EQ(Check(true), "");
  EXPECT_EQ(Check(false), "");
  EXPECT_TRUE(VerifyCheckpoint(tiny_.checkpoint(), nullptr).ok());
}

TEST_F(Verify, ReadsTheStoredFormats) {
  const Checkpoint out = TinyCheckpoint::Must(Checkpoint::Open(tiny_.out()));
  const auto model = TinyCheckpoint::Must(Model::Open(out));
  const auto linears = TinyCheckpoint::Must(ReadStoredLinears(*model));
  for (const auto& [name, format] : tiny_.MixedFormats()) {
    EXPECT_EQ(linears.at(name).format, format) << name;
  }
  EXPECT_EQ(linears.at(gate_).in, 64);
  EXPECT_EQ(linears.at("mtp.fc").format, &SourceFormat());
  EXPECT_EQ(linears.at("mtp.fc").layer, -1);
  EXPECT_EQ(linears.count("model.visual.pos_embed"), 0);
}

TEST_F(Verify, ReadsTheShapeOfPackedIntegersElsewhere) {
  StoredTensors stored;
  Rewrite([&](auto& tensors) {
    Erase(tensors, "mtp.fc.weight");
    stored = FindFormat("int8")->Encode(at::randn({64, 128}), {}, DType::kBF16);
    for (const auto& [suffix, tensor] : stored) {
      tensors.push_back(
          {{"mtp.fc." + suffix, FromScalarType(tensor.scalar_type()), tensor.sizes().vec()},
           [&tensor = tensor](const CheckpointWriter::Sink& sink) {
             return sink(TensorBytes(tensor));
           }});
    }
  });
  const Checkpoint out = TinyCheckpoint::Must(Checkpoint::Open(tiny_.out()));
  const auto model = TinyCheckpoint::Must(Model::Open(out));
  const auto linears = TinyCheckpoint::Must(ReadStoredLinears(*model));
  const StoredLinear& linear = linears.at("mtp.fc");
  EXPECT_EQ(linear.format, FindFormat("int8"));
  EXPECT_EQ(linear.out, 64);
  EXPECT_EQ(linear.in, 128);
  EXPECT_THAT(Check(false), HasSubstr("mtp.fc: transformers gets scheme none"));
}

TEST_F(Verify, NegativeGroupScale) {
  Poke(gate_ + ".weight_scale", 3, 0x81);
  EXPECT_THAT(Check(false), HasSubstr(gate_ + ": weight_scale"));
}

TEST_F(Verify, NanCode) {
  Poke(q_ + ".weight", 0, 0x7f);
  EXPECT_THAT(Check(false), HasSubstr(q_ + ": weight holds a NaN"));
}

TEST_F(Verify, GlobalScalesOfFusedModules) {
  Poke(gate_ + ".weight_global_scale", 0, 1);
  const std::string failure = Check(false);
  EXPECT_THAT(failure, HasSubstr("weight_global_scale differs"));
  EXPECT_THAT(failure, HasSubstr("gate_proj"));
}

TEST_F(Verify, MissingTensorOfAFormat) {
  Rewrite([&](auto& tensors) { Erase(tensors, gate_ + ".weight_global_scale"); });
  EXPECT_THAT(Check(false), HasSubstr(gate_ + ": its tensors"));
}

TEST_F(Verify, Nvfp4WithoutInputScaleIsAnotherFormat) {
  Rewrite([&](auto& tensors) { Erase(tensors, gate_ + ".input_global_scale"); });
  const std::string failure = Check(false);
  EXPECT_THAT(failure, HasSubstr("up_proj: is nvfp4"));
  EXPECT_THAT(failure, HasSubstr("gate_proj, which vLLM fuses with it, is nvfp4a16"));
}

TEST_F(Verify, WeightBesidePackedWeight) {
  Rewrite([&](auto& tensors) {
    auto copy = tensors.front();
    copy.spec.name = gate_ + ".weight";
    tensors.push_back(copy);
  });
  EXPECT_THAT(Check(false), HasSubstr(gate_));
}

TEST_F(Verify, ScaleThatBelongsToNothing) {
  Rewrite([&](auto& tensors) {
    auto copy = tensors.front();
    copy.spec.name = "model.language_model.norm.weight_scale";
    tensors.push_back(copy);
  });
  EXPECT_THAT(Check(false), HasSubstr("model.language_model.norm.weight_scale"));
}

TEST_F(Verify, ConfigThatForgetsALinear) {
  Json config = ReadJson("config.json");
  Json& targets = config["quantization_config"]["config_groups"]["group_0"]["targets"];
  targets.erase(0);
  WriteJson("config.json", config);
  EXPECT_THAT(Check(false), HasSubstr("gets scheme none"));
}

TEST_F(Verify, ConfigWithoutOrWithWrongKeys) {
  const Json good = ReadJson("config.json");
  Json config = good;
  config["quantization_config"]["format"] = "nvfp4-pack-quantized";
  WriteJson("config.json", config);
  EXPECT_THAT(Check(false), HasSubstr("expected \"mixed-precision\""));
  config = good;
  config["quantization_config"]["quantization_status"] = "frozen";
  WriteJson("config.json", config);
  EXPECT_THAT(Check(false), HasSubstr("expected \"compressed\""));
  config.erase("quantization_config");
  WriteJson("config.json", config);
  EXPECT_THAT(Check(false), HasSubstr("no quantization_config"));
}

TEST_F(Verify, IndexTotal) {
  Json index = ReadJson(kIndex);
  index["metadata"]["total_size"] = 1;
  WriteJson(kIndex, index);
  EXPECT_THAT(Check(false), HasSubstr("total_size is 1, expected"));
}

TEST_F(Verify, StrayShard) {
  const std::string shard = ReadJson(kIndex)["weight_map"]["lm_head.weight"];
  std::filesystem::copy(tiny_.out() / shard, tiny_.out() / "old.safetensors");
  EXPECT_THAT(Check(false), HasSubstr("*.safetensors"));
}

TEST_F(Verify, ChangedCopyNeedsTheSourceToShow) {
  Poke("mtp.fc.weight", 0, 0x11);
  EXPECT_EQ(Check(false), "");
  EXPECT_THAT(Check(true), HasSubstr("tensor mtp.fc.weight: differs"));
}

TEST_F(Verify, LostAndAddedTensors) {
  Rewrite([&](auto& tensors) { Erase(tensors, "mtp.fc.weight"); });
  EXPECT_THAT(Check(true), HasSubstr("mtp.fc"));
  Rewrite([&](auto& tensors) {
    auto copy = tensors.front();
    copy.spec.name = "model.extra";
    tensors.push_back(copy);
  });
  EXPECT_THAT(Check(true), HasSubstr("model.extra"));
}

TEST_F(Verify, ChangedFilesAndConfig) {
  std::ofstream(tiny_.out() / "tokenizer.json") << "[]";
  EXPECT_THAT(Check(true), HasSubstr("tokenizer.json: is different"));
  std::filesystem::remove(tiny_.out() / "tokenizer.json");
  EXPECT_THAT(Check(true), HasSubstr("tokenizer.json: is missing"));
  Json config = ReadJson("config.json");
  config["image_token_id"] = 3;
  WriteJson("config.json", config);
  EXPECT_THAT(Check(true), HasSubstr("config.json"));
}

TEST(VerifyFormats, AcceptsEveryFormatWhereItFits) {
  for (const Format* format : AllFormats()) {
    const TinyCheckpoint tiny;
    std::map<std::string, const Format*> formats;
    for (const LinearInfo& linear : tiny.model().linears()) {
      const bool fits = linear.allocatable && format->Supports(linear.out, linear.in);
      formats[linear.name] = fits ? format : &SourceFormat();
    }
    EXPECT_EQ(formats.at(std::string(TinyCheckpoint::kFullLayer) + "mlp.down_proj"), format);
    Status status = ExportCheckpoint(FileSystem::Default(), tiny.Plan(formats), tiny.out());
    ASSERT_TRUE(status.ok()) << format->name() << ": " << status.message();
    const Checkpoint out = TinyCheckpoint::Must(Checkpoint::Open(tiny.out()));
    status = VerifyCheckpoint(out, &tiny.checkpoint());
    EXPECT_TRUE(status.ok()) << format->name() << ": " << status.message();
    const auto model = TinyCheckpoint::Must(Model::Open(out));
    const auto linears = TinyCheckpoint::Must(ReadStoredLinears(*model));
    for (const auto& [name, expected] : formats) {
      EXPECT_EQ(linears.at(name).format, expected) << name;
    }
  }
}

}  // namespace
}  // namespace prismaquant

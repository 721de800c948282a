#include "export/exporter.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "export/tiny_checkpoint.h"

namespace prismaquant {
namespace {

using ::testing::HasSubstr;

bool SameBytes(const TensorView& a, const TensorView& b) {
  return a.dtype == b.dtype && a.shape == b.shape &&
         std::memcmp(a.bytes.data(), b.bytes.data(), a.bytes.size()) == 0;
}

std::string Slurp(const std::filesystem::path& path) {
  return TinyCheckpoint::Must(ReadFile(path));
}

TEST(Exporter, ReplacesQuantizedWeightsInPlaceAndCopiesTheRest) {
  const TinyCheckpoint tiny;
  const ExportPlan plan = tiny.Plan(tiny.MixedFormats());
  const Status status = ExportCheckpoint(FileSystem::Default(), plan, tiny.out());
  ASSERT_TRUE(status.ok()) << status.message();
  const Checkpoint out = TinyCheckpoint::Must(Checkpoint::Open(tiny.out()));

  std::vector<std::string> expected;
  for (const std::string& name : tiny.checkpoint().names()) {
    const std::string module = name.substr(0, name.rfind('.'));
    const auto format = plan.formats.find(module);
    if (format == plan.formats.end() || format->second == &SourceFormat()) {
      expected.push_back(name);
      EXPECT_TRUE(SameBytes(*out.Find(name), *tiny.checkpoint().Find(name))) << name;
      continue;
    }
    const StoredTensors stored = TinyCheckpoint::Must(plan.rendered(module));
    for (const TensorSpec& spec : format->second->Layout(16, 32, DType::kBF16)) {
      const std::string tensor = module + "." + spec.name;
      expected.push_back(tensor);
      EXPECT_TRUE(at::equal(TensorFromView(*out.Find(tensor)).view(at::kByte),
                            stored.at(spec.name).view(at::kByte)))
          << tensor;
    }
  }
  EXPECT_EQ(out.names(), expected);
}

TEST(Exporter, ConfigGainsOnlyQuantizationConfig) {
  const TinyCheckpoint tiny;
  ASSERT_TRUE(
      ExportCheckpoint(FileSystem::Default(), tiny.Plan(tiny.MixedFormats()), tiny.out()).ok());
  Json config = Json::parse(Slurp(tiny.out() / "config.json"));
  EXPECT_EQ(config["quantization_config"]["format"], "mixed-precision");
  config.erase("quantization_config");
  EXPECT_EQ(config, tiny.checkpoint().config());
  EXPECT_EQ(Slurp(tiny.out() / "tokenizer.json"), "{}");
  EXPECT_EQ(Slurp(tiny.out() / "README.md"), "# Card\n");
  EXPECT_EQ(Json::parse(Slurp(tiny.out() / "prismaquant.json"))["schema"], 1);
}

TEST(Exporter, AllSourceFormatsIsAPlainCopy) {
  const TinyCheckpoint tiny;
  std::map<std::string, const Format*> formats = tiny.MixedFormats();
  for (auto& [name, format] : formats) format = &SourceFormat();
  ASSERT_TRUE(ExportCheckpoint(FileSystem::Default(), tiny.Plan(formats), tiny.out()).ok());
  const Checkpoint out = TinyCheckpoint::Must(Checkpoint::Open(tiny.out()));
  EXPECT_EQ(out.config(), tiny.checkpoint().config());
  EXPECT_EQ(out.names(), tiny.checkpoint().names());
}

TEST(Exporter, PlannedFileBytesAreTheWrittenBytes) {
  const TinyCheckpoint tiny;
  for (const int64_t shard_bytes : {int64_t{20'000}, int64_t{1'000'000}}) {
    ExportPlan plan = tiny.Plan(tiny.MixedFormats());
    plan.options.shard_bytes = shard_bytes;
    plan.options.overwrite = true;
    const int64_t planned =
        TinyCheckpoint::Must(PlannedFileBytes(tiny.model(), plan.formats, plan.options));
    ASSERT_TRUE(ExportCheckpoint(FileSystem::Default(), plan, tiny.out()).ok());
    int64_t written = 0;
    for (const auto& entry : std::filesystem::directory_iterator(tiny.out())) {
      if (entry.path().extension() == ".safetensors") written += entry.file_size();
    }
    EXPECT_EQ(planned, written);
  }
}

TEST(Exporter, RepeatsByteForByte) {
  const TinyCheckpoint tiny;
  ExportPlan plan = tiny.Plan(tiny.MixedFormats());
  ASSERT_TRUE(ExportCheckpoint(FileSystem::Default(), plan, tiny.out()).ok());
  std::map<std::string, std::string> first;
  for (const auto& entry : std::filesystem::directory_iterator(tiny.out())) {
    first[entry.path().filename()] = Slurp(entry.path());
  }
  plan.options.overwrite = true;
  ASSERT_TRUE(ExportCheckpoint(FileSystem::Default(), plan, tiny.out()).ok());
  for (const auto& [name, contents] : first) EXPECT_EQ(Slurp(tiny.out() / name), contents) << name;
}

TEST(Exporter, AsksForEveryQuantizedLinearOnce) {
  const TinyCheckpoint tiny;
  ExportPlan plan = tiny.Plan(tiny.MixedFormats());
  std::map<std::string, int> asked;
  plan.rendered = [&, inner = plan.rendered](const std::string& name) {
    ++asked[name];
    return inner(name);
  };
  ASSERT_TRUE(ExportCheckpoint(FileSystem::Default(), plan, tiny.out()).ok());
  for (const auto& [name, format] : plan.formats) {
    EXPECT_EQ(asked[name], format == &SourceFormat() ? 0 : 1) << name;
  }
}

// Nothing is left beside the source.
void ExpectNothingWritten(const TinyCheckpoint& tiny) {
  for (const auto& entry : std::filesystem::directory_iterator(tiny.source().parent_path())) {
    EXPECT_EQ(entry.path(), tiny.source());
  }
}

TEST(Exporter, WrongRenderedShapeNamesTheLinear) {
  const TinyCheckpoint tiny;
  ExportPlan plan = tiny.Plan(tiny.MixedFormats());
  plan.rendered = [inner = plan.rendered](const std::string& name) -> Result<StoredTensors> {
    Result<StoredTensors> stored = inner(name);
    if (name.ends_with("out_proj")) stored->erase("weight_scale");
    return stored;
  };
  const Status status = ExportCheckpoint(FileSystem::Default(), plan, tiny.out());
  EXPECT_EQ(status.code(), StatusCode::kInvalidInput);
  EXPECT_THAT(status.message(), HasSubstr("linear_attn.out_proj"));
  EXPECT_THAT(status.message(), HasSubstr("weight_scale"));
  ExpectNothingWritten(tiny);
}

TEST(Exporter, FusedModulesOfTwoFormatsAreRefused) {
  const TinyCheckpoint tiny;
  std::map<std::string, const Format*> formats = tiny.MixedFormats();
  formats[std::string(TinyCheckpoint::kLinearLayer) + "mlp.up_proj"] = FindFormat("fp8");
  const Status status = ExportCheckpoint(FileSystem::Default(), tiny.Plan(formats), tiny.out());
  EXPECT_EQ(status.code(), StatusCode::kUnmet);
  EXPECT_THAT(status.message(), HasSubstr("up_proj"));
  EXPECT_THAT(status.message(), HasSubstr("gate_proj"));
  ExpectNothingWritten(tiny);
}

TEST(Exporter, CallersCheckCanRefuse) {
  const TinyCheckpoint tiny;
  ExportPlan plan = tiny.Plan(tiny.MixedFormats());
  plan.options.check = [](const std::filesystem::path& folder) {
    return std::filesystem::exists(folder / "config.json") ? Status::Unmet("no") : Status();
  };
  EXPECT_EQ(ExportCheckpoint(FileSystem::Default(), plan, tiny.out()).message(), "no");
  ExpectNothingWritten(tiny);
}

TEST(Exporter, EveryLinearNeedsAFormat) {
  const TinyCheckpoint tiny;
  std::map<std::string, const Format*> formats = tiny.MixedFormats();
  const std::string missing = formats.begin()->first;
  formats.erase(missing);
  EXPECT_THAT(ExportCheckpoint(FileSystem::Default(), tiny.Plan(formats), tiny.out()).message(),
              HasSubstr(missing));
  formats[missing] = &SourceFormat();
  formats["model.no_such_linear"] = &SourceFormat();
  EXPECT_THAT(PlannedFileBytes(tiny.model(), formats, {}).status().message(),
              HasSubstr("model.no_such_linear"));
}

}  // namespace
}  // namespace prismaquant

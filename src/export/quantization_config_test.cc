#include "export/quantization_config.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

namespace prismaquant {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::Not;

constexpr char kLayer0[] = "model.language_model.layers.0.";
constexpr char kLayer10[] = "model.language_model.layers.10.";
constexpr char kLayer2[] = "model.language_model.layers.2.";

const Profile& Hybrid() { return *FindProfile("Qwen3_5ForConditionalGeneration"); }
const Profile& Llama() { return *FindProfile("LlamaForCausalLM"); }

std::vector<std::string> Strings(const Json& list) { return list.get<std::vector<std::string>>(); }

TEST(ModelOrder, ComparesLayerNumbersAsNumbers) {
  std::vector<std::string> names = {"m.10.a", "m.2.b", "m.2.a", "m.02.a", "m", "m.2"};
  std::sort(names.begin(), names.end(), ModelOrder());
  EXPECT_THAT(names, ElementsAre("m", "m.2", "m.02.a", "m.2.a", "m.2.b", "m.10.a"));
}

TEST(QuantizationConfig, NullWhenNothingIsQuantized) {
  EXPECT_TRUE(
      BuildQuantizationConfig(Llama(), {{"model.layers.0.mlp.down_proj", &SourceFormat()}}, {})
          .is_null());
  EXPECT_TRUE(BuildQuantizationConfig(Llama(), {}, {"lm_head"}).is_null());
}

TEST(QuantizationConfig, OneFormatIsTheTopLevelFormat) {
  const Json config = BuildQuantizationConfig(
      Llama(), {{"model.layers.0.mlp.down_proj", FindFormat("mxfp8")}}, {"lm_head"});
  EXPECT_EQ(config["quant_method"], "compressed-tensors");
  EXPECT_EQ(config["format"], "mxfp8-quantized");
  EXPECT_EQ(config["quantization_status"], "compressed");
  EXPECT_TRUE(config["kv_cache_scheme"].is_null());
  ASSERT_EQ(config["config_groups"].size(), 1);
  const Json& group = config["config_groups"]["group_0"];
  EXPECT_EQ(group["format"], "mxfp8-quantized");
  EXPECT_EQ(group["weights"]["scale_dtype"], "torch.uint8");
  EXPECT_THAT(Strings(group["targets"]), ElementsAre("model.layers.0.mlp.down_proj"));
  EXPECT_THAT(Strings(config["ignore"]), ElementsAre("lm_head", "re:.*lm_head$"));
}

TEST(QuantizationConfig, MixedFormatsGetOneGroupEachInModelOrder) {
  const Json config =
      BuildQuantizationConfig(Hybrid(),
                              {{std::string(kLayer10) + "mlp.down_proj", FindFormat("nvfp4")},
                               {std::string(kLayer2) + "mlp.down_proj", FindFormat("nvfp4")},
                               {std::string(kLayer0) + "mlp.down_proj", FindFormat("mxfp8")},
                               {std::string(kLayer0) + "linear_attn.in_proj_a", &SourceFormat()}},
                              {"mtp.fc", "model.visual.merger.linear_fc1", "lm_head"});
  EXPECT_EQ(config["format"], "mixed-precision");
  const Json& groups = config["config_groups"];
  ASSERT_EQ(groups.size(), 2);
  EXPECT_EQ(groups["group_0"]["format"], "nvfp4-pack-quantized");
  EXPECT_THAT(
      Strings(groups["group_0"]["targets"]),
      ElementsAre("model.language_model.layers.2.mlp.down_proj", "model.layers.2.mlp.down_proj",
                  "model.language_model.layers.10.mlp.down_proj", "model.layers.10.mlp.down_proj"));
  EXPECT_EQ(groups["group_1"]["format"], "mxfp8-quantized");
  EXPECT_THAT(Strings(config["ignore"]),
              ElementsAre("model.language_model.layers.0.linear_attn.in_proj_a",
                          "model.layers.0.linear_attn.in_proj_a", "model.visual.merger.linear_fc1",
                          "mtp.fc", "lm_head", "re:.*lm_head$"));
}

TEST(QuantizationConfig, AQuantizedOutputProjectionMatchesBothOfItsNames) {
  const Json config = BuildQuantizationConfig(Hybrid(), {{"lm_head", FindFormat("fp8")}}, {});
  EXPECT_THAT(Strings(config["config_groups"]["group_0"]["targets"]),
              ElementsAre("re:(?:.*[.])?lm_head$"));
  EXPECT_TRUE(config["ignore"].empty());
}

TEST(QuantizationConfig, ExpertsAreOnePatternPerPartAndFormat) {
  std::map<std::string, const Format*> formats;
  for (const auto& [layer, format] :
       {std::pair(kLayer0, "nvfp4"), std::pair(kLayer2, "fp8"), std::pair(kLayer10, "nvfp4")}) {
    for (const char* expert : {"0.gate_proj", "0.up_proj", "0.down_proj", "11.down_proj"}) {
      formats[fmt::format("{}mlp.experts.{}", layer, expert)] = FindFormat(format);
    }
  }
  formats["mtp.layers.0.mlp.experts.0.gate_proj"] = &SourceFormat();
  const Json config = BuildQuantizationConfig(Hybrid(), formats, {});
  const std::string prefixes =
      "(?:language_model\\.model\\.layers\\.|model\\.language_model\\.layers\\.|model\\.layers\\.)";
  const std::string rest = "\\.mlp\\.experts\\.[0-9]+\\.(?:gate|up|down)_proj$";
  EXPECT_THAT(Strings(config["config_groups"]["group_0"]["targets"]),
              ElementsAre("re:^" + prefixes + "(?:0|10)" + rest));
  EXPECT_THAT(Strings(config["config_groups"]["group_1"]["targets"]),
              ElementsAre("re:^" + prefixes + "(?:2)" + rest));
  EXPECT_EQ(Strings(config["ignore"]).front(), "re:^(?:mtp\\.layers\\.)(?:0)" + rest);
}

TEST(QuantizationConfig, FormatsStoredAlikeAreGroupsOfTheirOwn) {
  const auto config = [](const char* up, const char* down) {
    return BuildQuantizationConfig(Llama(),
                                   {{"model.layers.0.mlp.up_proj", FindFormat(up)},
                                    {"model.layers.0.mlp.down_proj", FindFormat(down)}},
                                   {});
  };
  const Json fours = config("nvfp4", "nvfp4a16");
  EXPECT_EQ(fours["format"], "nvfp4-pack-quantized");
  ASSERT_EQ(fours["config_groups"].size(), 2);
  const Json& quantizes = fours["config_groups"]["group_0"];
  const Json& weight_only = fours["config_groups"]["group_1"];
  EXPECT_EQ(quantizes["input_activations"]["dynamic"], "local");
  EXPECT_TRUE(weight_only["input_activations"].is_null());
  EXPECT_EQ(quantizes["weights"], weight_only["weights"]);
  EXPECT_EQ(config("int4", "int8")["format"], "pack-quantized");
  EXPECT_EQ(config("int4", "int8")["config_groups"].size(), 2);
  EXPECT_EQ(config("mxfp4", "nvfp4")["format"], "mixed-precision");
  EXPECT_EQ(config("int4", "nvfp4a16")["format"], "mixed-precision");
}

TEST(QuantizationConfig, SchemesHaveNoKeyThatReadersForbid) {
  const std::vector<std::string> allowed = {"targets", "weights", "input_activations",
                                            "output_activations", "format"};
  for (const Format* format : AllFormats()) {
    if (format->compression_format().empty()) continue;
    const Json config =
        BuildQuantizationConfig(Llama(), {{"model.layers.0.mlp.up_proj", format}}, {});
    for (const auto& [key, value] : config["config_groups"]["group_0"].items()) {
      EXPECT_THAT(allowed, Contains(key));
    }
    EXPECT_THAT(Strings(config["config_groups"]["group_0"]["targets"]), Not(Contains("Linear")));
  }
}

}  // namespace
}  // namespace prismaquant

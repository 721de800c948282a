#include "export/matching.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "export/quantization_config.h"

namespace prismaquant {
namespace {

using ::testing::HasSubstr;

constexpr char kMlp[] = "model.language_model.layers.0.mlp.";
constexpr char kDelta[] = "model.language_model.layers.0.linear_attn.";

const Profile& Hybrid() { return *FindProfile("Qwen3_5ForConditionalGeneration"); }

// The Linears of one layer and of the parts outside the body.
std::map<std::string, const Format*> Linears() {
  const std::string mlp = kMlp, delta = kDelta;
  return {{mlp + "gate_proj", FindFormat("nvfp4")},
          {mlp + "up_proj", FindFormat("nvfp4")},
          {mlp + "down_proj", FindFormat("mxfp8")},
          {delta + "in_proj_qkv", FindFormat("fp8")},
          {delta + "in_proj_z", FindFormat("fp8")},
          {delta + "in_proj_a", &SourceFormat()},
          {delta + "in_proj_b", &SourceFormat()},
          {delta + "out_proj", &SourceFormat()},
          {"model.visual.merger.linear_fc1", &SourceFormat()},
          {"mtp.layers.0.mlp.gate_proj", &SourceFormat()},
          {"mtp.layers.0.mlp.up_proj", &SourceFormat()},
          {"lm_head", &SourceFormat()}};
}

Json Config() { return BuildQuantizationConfig(Hybrid(), Linears(), {}); }

void Replace(Json& list, const std::string& from, const std::string& to) {
  for (Json& entry : list) {
    if (entry == from) entry = to;
  }
}

std::string Failure(const Json& config) {
  const Status status = VerifyMatching(config, Hybrid(), Linears());
  EXPECT_FALSE(status.ok());
  return status.message();
}

NameMatcher Matcher(const std::vector<std::vector<std::string>>& groups,
                    const std::vector<std::string>& ignore = {}) {
  ConfigRules rules;
  for (const auto& targets : groups) {
    rules.groups.push_back({"group_" + std::to_string(rules.groups.size()), "", {}, {}, targets});
  }
  rules.ignore = ignore;
  return std::move(NameMatcher::Create(rules)).value();
}

TEST(Matching, AcceptsTheConfigThatWeWrite) {
  const Status status = VerifyMatching(Config(), Hybrid(), Linears());
  EXPECT_TRUE(status.ok()) << status.message();
}

TEST(Matching, EverySchemeIsThatOfOneFormat) {
  for (const Format* format : AllFormats()) {
    const Json scheme = format->Scheme();
    if (scheme.is_null()) continue;
    const ConfigGroup group{"group_0",
                            std::string(format->compression_format()),
                            scheme["weights"],
                            scheme["input_activations"],
                            {}};
    EXPECT_EQ(FormatOfGroup(group), format) << format->name();
  }
}

TEST(Matching, TextOnlySpellingIsRequired) {
  Json config = Config();
  Json targets = Json::array();
  for (const Json& target : config["config_groups"]["group_0"]["targets"]) {
    if (target.get<std::string>().starts_with("model.language_model.")) targets.push_back(target);
  }
  config["config_groups"]["group_0"]["targets"] = targets;
  const std::string failure = Failure(config);
  EXPECT_THAT(failure, HasSubstr("transformers (text only)"));
  EXPECT_THAT(failure, HasSubstr("gets scheme none"));
  EXPECT_THAT(failure, HasSubstr("expected nvfp4"));
}

TEST(Matching, TargetInTheWrongGroup) {
  Json config = Config();
  Json& groups = config["config_groups"];
  std::swap(groups["group_0"]["targets"], groups["group_2"]["targets"]);
  EXPECT_THAT(Failure(config), HasSubstr("expected"));
}

TEST(Matching, IgnoreThatCoversATarget) {
  Json config = Config();
  config["ignore"].push_back("re:.*down_proj");
  EXPECT_THAT(
      Failure(config),
      HasSubstr(
          "down_proj: transformers gets scheme none from quantization_config, expected mxfp8"));
}

TEST(Matching, IgnoreThatCoversHalfAFusedLayer) {
  Json config = Config();
  config["ignore"].push_back("language_model.model.layers.0.mlp.up_proj");
  EXPECT_THAT(Failure(config), HasSubstr("1 of its 2 fused modules"));
}

TEST(Matching, ClassTargetReachesUnquantizedModules) {
  Json config = Config();
  config["config_groups"]["group_2"]["targets"].push_back("Linear");
  config["ignore"] = {"re:.*lm_head$"};
  EXPECT_THAT(Failure(config), HasSubstr("expected none"));
}

TEST(Matching, ClassTargetTakesFusedLayersInVllmAlone) {
  std::map<std::string, const Format*> linears;
  for (const auto& [name, format] : Linears()) {
    if (name.starts_with(kMlp)) linears[name] = format;
  }
  Json config = BuildQuantizationConfig(Hybrid(), linears, {});
  config["config_groups"]["group_1"]["targets"].push_back("Linear");
  const Status status = VerifyMatching(config, Hybrid(), linears);
  EXPECT_THAT(status.message(), HasSubstr("gate_up_proj: vLLM gets scheme mxfp8 from"));
}

// Experts of two layers and of the MTP head, and a quantized output projection.
std::map<std::string, const Format*> ExpertLinears() {
  std::map<std::string, const Format*> linears = {{"lm_head", FindFormat("fp8")}};
  for (const auto& [layer, format] :
       {std::pair("model.language_model.layers.0.", "nvfp4"),
        std::pair("model.language_model.layers.1.", "bf16"), std::pair("mtp.layers.0.", "fp8")}) {
    for (const char* expert : {"0.", "1."}) {
      for (const char* projection : {"gate_proj", "up_proj", "down_proj"}) {
        linears[std::string(layer) + "mlp.experts." + expert + projection] = FindFormat(format);
      }
    }
  }
  return linears;
}

TEST(Matching, ExpertsAndTheOutputProjectionAreFoundUnderEveryName) {
  const auto linears = ExpertLinears();
  const Json config = BuildQuantizationConfig(Hybrid(), linears, {});
  const Status status = VerifyMatching(config, Hybrid(), linears);
  EXPECT_TRUE(status.ok()) << status.message();
}

TEST(Matching, ExpertsOfOneLayerNeedOneFormat) {
  auto linears = ExpertLinears();
  linears["model.language_model.layers.0.mlp.experts.1.up_proj"] = FindFormat("fp8");
  const Json config = BuildQuantizationConfig(Hybrid(), linears, {});
  const Status status = VerifyMatching(config, Hybrid(), linears);
  EXPECT_THAT(status.message(), HasSubstr("model.language_model.layers.0.mlp.experts"));
}

TEST(Matching, ExpertPatternsMustReachEveryReader) {
  const auto linears = ExpertLinears();
  const auto failure = [&](const std::string& from, const std::string& to) {
    std::string text = BuildQuantizationConfig(Hybrid(), linears, {}).dump();
    const size_t place = text.find(from);
    EXPECT_NE(place, std::string::npos) << from;
    text.replace(place, from.size(), to);
    const Status status = VerifyMatching(Json::parse(text), Hybrid(), linears);
    EXPECT_FALSE(status.ok());
    return status.message();
  };
  EXPECT_THAT(failure("language_model", "other_model"), HasSubstr("gets scheme none"));
  EXPECT_THAT(failure("re:^(?:mtp", "re:^(?:mpt"), HasSubstr("mtp.layers.0.mlp.experts"));
  EXPECT_THAT(failure("re:(?:.*[.])?lm_head$", "lm_head"), HasSubstr("lm_head"));
  EXPECT_THAT(failure("gate|up|down", "gate|up"), HasSubstr("down_proj"));
}

TEST(Matching, PatternThatReachesAnotherPart) {
  Json config = Config();
  config["config_groups"]["group_0"]["targets"].push_back("re:.*layers[.]0[.]mlp[.](gate|up)_proj");
  config["ignore"] = {"re:.*lm_head$"};
  EXPECT_THAT(Failure(config), HasSubstr("mtp.layers.0.mlp."));
}

TEST(Matching, UnknownTarget) {
  Json config = Config();
  config["config_groups"]["group_0"]["targets"].push_back("model.layers.7.mlp.up_proj");
  EXPECT_THAT(Failure(config), HasSubstr("model.layers.7.mlp.up_proj"));
}

TEST(Matching, MisspelledTargetLeavesItsModuleBare) {
  Json config = Config();
  Replace(config["config_groups"]["group_1"]["targets"], std::string(kDelta) + "in_proj_z",
          std::string(kDelta) + "out_proj");
  EXPECT_THAT(Failure(config), HasSubstr("in_proj_z: transformers gets scheme none"));
}

TEST(Matching, WrongSchemeOfAGroup) {
  Json config = Config();
  config["config_groups"]["group_2"]["weights"]["scale_dtype"] = nullptr;
  EXPECT_THAT(Failure(config), HasSubstr("unknown scheme of group_2"));
  config = Config();
  config["config_groups"]["group_0"]["format"] = "mixed-precision";
  EXPECT_THAT(Failure(config), HasSubstr("unknown scheme of group_0"));
}

TEST(Matching, FusedModulesOfDifferentFormats) {
  std::map<std::string, const Format*> linears = Linears();
  linears[std::string(kDelta) + "in_proj_z"] = FindFormat("nvfp4");
  const Status status =
      VerifyMatching(BuildQuantizationConfig(Hybrid(), linears, {}), Hybrid(), linears);
  EXPECT_THAT(status.message(), HasSubstr("same fused layer"));
}

TEST(Matching, MalformedConfigs) {
  EXPECT_THAT(Failure(Json::object()), HasSubstr("config_groups"));
  Json config = Config();
  config["ignore"].push_back("re:(");
  EXPECT_THAT(Failure(config), HasSubstr("\"re:(\""));
  config["ignore"] = "lm_head";
  EXPECT_THAT(Failure(config), HasSubstr("not a list"));
}

TEST(NameMatcher, TransformersRanksNamesBeforePatternsBeforeClasses) {
  const NameMatcher matcher = Matcher({{"Linear"}, {"re:.*b"}, {"re:.*a.*b", "a.c"}, {"a.b"}});
  EXPECT_EQ(matcher.TransformersGroup("a.b", "Linear"), 3);
  EXPECT_EQ(matcher.TransformersGroup("a.x.b", "Linear"), 2);  // "re:.*a.*b" < "re:.*b"
  EXPECT_EQ(matcher.TransformersGroup("x.b", "Linear"), 1);
  EXPECT_EQ(matcher.TransformersGroup("x", "Linear"), 0);
  EXPECT_EQ(matcher.TransformersGroup("x", "Embedding"), NameMatcher::kNone);
}

TEST(NameMatcher, TransformersTakesTheLastGroupThatRepeatsATarget) {
  const NameMatcher matcher = Matcher({{"a.b"}, {"a.b"}});
  EXPECT_EQ(matcher.TransformersGroup("a.b", "Linear"), 1);
  EXPECT_EQ(matcher.VllmGroup("a.b", {}, "RowParallelLinear").value(), 0);
}

TEST(NameMatcher, PatternsAreAnchoredAtTheStartOnly) {
  const NameMatcher matcher = Matcher({{"re:layers[.]1"}}, {"re:mtp"});
  EXPECT_EQ(matcher.TransformersGroup("layers.10.x", "Linear"), 0);
  EXPECT_EQ(matcher.TransformersGroup("model.layers.1", "Linear"), NameMatcher::kNone);
}

TEST(NameMatcher, VllmLooksAtShardsAfterNameAndClass) {
  const std::vector<std::string> shards = {"m.q", "m.k"};
  EXPECT_EQ(Matcher({{"m.q", "m.k"}}).VllmGroup("m.qk", shards, "QKVParallelLinear").value(), 0);
  EXPECT_EQ(Matcher({{"m.q"}}).VllmGroup("m.qk", shards, "QKVParallelLinear").value(),
            NameMatcher::kNone);
  EXPECT_EQ(Matcher({{"m.q"}, {"m.k"}}).VllmGroup("m.qk", shards, "QKVParallelLinear").value(), 0);
  EXPECT_EQ(
      Matcher({{"m.q", "m.k"}, {"linear"}}).VllmGroup("m.qk", shards, "QKVParallelLinear").value(),
      1);
  EXPECT_EQ(Matcher({{"Linear"}}).VllmGroup("lm_head", {}, "ParallelLMHead").value(),
            NameMatcher::kNone);
}

TEST(NameMatcher, VllmIgnoresFusedLayersByTheirShards) {
  const std::vector<std::string> shards = {"m.q", "m.k"};
  EXPECT_EQ(Matcher({{"m.q", "m.k"}}, {"m.q", "m.k"}).VllmGroup("m.qk", shards, "X").value(),
            NameMatcher::kNone);
  EXPECT_FALSE(Matcher({{"m.q", "m.k"}}, {"m.k"}).VllmGroup("m.qk", shards, "X").ok());
  EXPECT_EQ(Matcher({{"m.o"}}, {"re:.*o"}).VllmGroup("m.o", {}, "X").value(), NameMatcher::kNone);
}

}  // namespace
}  // namespace prismaquant

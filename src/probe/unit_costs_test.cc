#include "probe/unit_costs.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "formats/format.h"
#include "io/temporary_folder.h"
#include "probe/tiny_checkpoint.h"

namespace prismaquant {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int64_t kPositions = 8;
constexpr LossTokens kTokens{.text = kPositions, .windows = 2};
constexpr char kAttention[] = "model.layers.0.self_attn.";

// A store with made-up numbers: s_n of the i-th Linear are i + 1 and -2 in every format, q_n are i
// + 1 and 3, its squared error is the format's position and its Fisher trace 16 (i + 1).
class UnitCostsTest : public ::testing::Test {
 protected:
  void Fill(RunStore& store, const std::set<std::string>& missing = {}) const {
    std::vector<LinearStats> stats;
    std::vector<LinearCost> costs;
    for (const LinearInfo& linear : tiny_.model().linears()) {
      const double number = static_cast<double>(stats.size()) + 1;
      stats.push_back({.name = linear.name,
                       .layer = linear.layer,
                       .weight_amax = 2,
                       .input_amax = 3,
                       .fisher_trace = 16 * number,
                       .tokens = 10});
      for (const Format* format : AllFormats()) {
        const std::string name(format->name());
        const double mse = Position(name);
        if (!missing.contains(linear.name + " " + name))
          costs.push_back({linear.name, name, Rounding::kNearest, mse, {number, -2}, {number, 3}});
      }
    }
    ASSERT_TRUE(store.Commit("backward", 0, stats, costs).ok());
  }
  static double Position(const std::string& name) {
    const auto formats = AllFormats();
    return static_cast<double>(std::find(formats.begin(), formats.end(), FindFormat(name)) -
                               formats.begin());
  }
  RunStore Store() const { return RunStore::Open(FileSystem::Default(), folder_ / "work").value(); }
  std::vector<UnitCosts> Build(RunStore& store, const UnitCostOptions& options) const {
    Result<std::vector<UnitCosts>> units = BuildUnitCosts(tiny_.model(), store, kTokens, options);
    EXPECT_TRUE(units.ok()) << units.status().message();
    return units.ok() ? *units : std::vector<UnitCosts>();
  }
  static std::set<std::string> Names(const UnitCosts& unit) {
    std::set<std::string> names;
    for (const UnitFormat& format : unit.formats) names.insert(format.format);
    return names;
  }

  TinyCheckpoint tiny_;
  TemporaryFolder folder_;
};

TEST_F(UnitCostsTest, UnitsAreTheFusedSetsInModelOrder) {
  const std::vector<UnitCosts> units = UnitsWithoutCosts(tiny_.model(), {.any_kernel = true});
  ASSERT_EQ(units.size(), 8U);
  const std::string attention = kAttention, mlp = "model.layers.0.mlp.";
  EXPECT_THAT(units[0].linears,
              ElementsAre(attention + "q_proj", attention + "k_proj", attention + "v_proj"));
  EXPECT_THAT(units[1].linears, ElementsAre(attention + "o_proj"));
  EXPECT_THAT(units[2].linears, ElementsAre(mlp + "gate_proj", mlp + "up_proj"));
  EXPECT_THAT(units[3].linears, ElementsAre(mlp + "down_proj"));
  EXPECT_THAT(units[7].linears, ElementsAre("model.layers.1.mlp.down_proj"));
  EXPECT_EQ(units[0].weights, 128 * 64);
  for (const UnitFormat& format : units[0].formats) {
    EXPECT_EQ(format.cost, 0);
    const Format& f = *FindFormat(format.format);
    EXPECT_EQ(format.bytes, f.Bytes(64, 64, DType::kBF16) + 2 * f.Bytes(32, 64, DType::kBF16));
    EXPECT_EQ(format.payload_bytes,
              f.PayloadBytes(64, 64, DType::kBF16) + 2 * f.PayloadBytes(32, 64, DType::kBF16));
  }
}

TEST_F(UnitCostsTest, Mxfp8NeedsAFusedOutputOfWholeTiles) {
  for (const UnitCosts& unit : UnitsWithoutCosts(tiny_.model(), {})) {
    EXPECT_EQ(Names(unit).contains("mxfp8"), unit.linears.size() == 3) << unit.name;
    EXPECT_TRUE(Names(unit).contains("nvfp4")) << unit.name;
  }
  for (const UnitCosts& unit : UnitsWithoutCosts(tiny_.model(), {.any_kernel = true})) {
    EXPECT_TRUE(Names(unit).contains("mxfp8")) << unit.name;
    EXPECT_TRUE(Names(unit).contains("bf16")) << unit.name;
  }
}

TEST_F(UnitCostsTest, MembersSquaresAreSummed) {
  RunStore store = Store();
  Fill(store);
  const std::vector<UnitCosts> units = Build(store, {.rules = {.any_kernel = true}});
  ASSERT_EQ(units.size(), 8U);
  for (const UnitFormat& format : units[0].formats)
    EXPECT_DOUBLE_EQ(format.cost, (6.0 + 9.0) / 2 / kPositions);
  for (const UnitFormat& format : units[1].formats)
    EXPECT_DOUBLE_EQ(format.cost, (4.0 + 3.0) / 2 / kPositions);
}

TEST_F(UnitCostsTest, FisherTraceSumsTraceTimesSquaredError) {
  RunStore store = Store();
  Fill(store);
  const std::vector<UnitCosts> units =
      Build(store, {.cost = CostModel::kFisherTrace, .rules = {.any_kernel = true}});
  ASSERT_EQ(units.size(), 8U);
  for (const auto& [unit, members] : {std::pair(units[0], 1 + 2 + 3), std::pair(units[1], 4)}) {
    EXPECT_TRUE(Names(unit).contains("fp8"));
    for (const UnitFormat& format : unit.formats) {
      EXPECT_DOUBLE_EQ(format.cost, 16.0 * members / kPositions * Position(format.format) / 2)
          << format.format;
    }
  }
}

TEST_F(UnitCostsTest, JointLossHasTheCrossTerms) {
  RunStore store = Store();
  Fill(store);
  const std::string attention = kAttention;
  const std::map<std::string, std::string> choices = {{attention + "q_proj", "nvfp4"},
                                                      {attention + "o_proj", "fp8"}};
  EXPECT_DOUBLE_EQ(JointLoss(tiny_.model(), store, kTokens, choices)->text,
                   (5.0 * 5 + 4.0 * 4) / 2 / kPositions);
  EXPECT_EQ(JointLoss(tiny_.model(), store, kTokens, {})->text, 0);
}

TEST_F(UnitCostsTest, CostsOfGptqStandInForThoseOfRoundingToNearest) {
  RunStore store = Store();
  Fill(store);
  const UnitCostOptions options{.rounding = Rounding::kGptq,
                                .rules = {.any_kernel = true, .formats = {"fp8", "bf16"}}};
  const Status missing = BuildUnitCosts(tiny_.model(), store, kTokens, options).status();
  EXPECT_THAT(missing.message(), HasSubstr("--formats fp8 --cost-render gptq"));
  std::vector<LinearCost> costs;
  for (const LinearInfo& linear : tiny_.model().linears()) {
    costs.push_back({linear.name, "fp8", Rounding::kGptq, 0, {1, 1}, {0.5, 0.25}});
  }
  ASSERT_TRUE(store.Commit("backward/1", 0, {}, costs).ok());
  const std::vector<UnitCosts> units = Build(store, options);
  for (const UnitFormat& format : units[1].formats) {
    EXPECT_DOUBLE_EQ(format.cost, (format.format == "fp8" ? 0.75 : 7.0) / 2 / kPositions);
  }
  const std::string linear = units[1].linears.front();
  EXPECT_DOUBLE_EQ(
      JointLoss(tiny_.model(), store, kTokens, {{linear, "fp8"}}, Rounding::kGptq)->text,
      1.0 / kPositions);
}

TEST_F(UnitCostsTest, AMissingCostIsNamed) {
  const std::string linear = std::string(kAttention) + "k_proj";
  RunStore store = Store();
  Fill(store, {linear + " fp8"});
  for (const CostModel cost : {CostModel::kDirectional, CostModel::kFisherTrace}) {
    const Status status = BuildUnitCosts(tiny_.model(), store, kTokens, {.cost = cost}).status();
    EXPECT_EQ(status.code(), StatusCode::kInvalidInput);
    EXPECT_THAT(status.message(), AllOf(HasSubstr(linear), HasSubstr("fp8")));
  }
  EXPECT_EQ(JointLoss(tiny_.model(), store, kTokens, {{linear, "fp8"}}).status().code(),
            StatusCode::kInvalidInput);
  EXPECT_TRUE(JointLoss(tiny_.model(), store, kTokens, {{linear, "nvfp4"}}).ok());
}

TEST_F(UnitCostsTest, TheJsonHoldsEveryLinearAndFormat) {
  RunStore store = Store();
  Fill(store);
  const Json json = ProbeToJson(tiny_.model(), store, kTokens).value();
  EXPECT_EQ(json["tokens"], kPositions);
  ASSERT_EQ(json["linears"].size(), tiny_.model().linears().size());
  const Json& value = json["linears"][std::string(kAttention) + "v_proj"];
  EXPECT_EQ(value["out"], 32);
  EXPECT_EQ(value["in"], 64);
  EXPECT_EQ(value["fisher_trace"], 16.0 * 3 / kPositions);
  ASSERT_EQ(value["costs"].size(), AllFormats().size());
  EXPECT_EQ(value["costs"]["fp8"]["directional"], (3.0 + 3.0) / 2 / kPositions);
  EXPECT_EQ(value["costs"]["fp8"]["bytes"], FindFormat("fp8")->Bytes(32, 64, DType::kBF16));
}

}  // namespace
}  // namespace prismaquant

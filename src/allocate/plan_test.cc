#include "allocate/plan.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>

#include "allocate/qwen3_6_27b.h"

namespace prismaquant {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kFixedBytes = 1000;

// Two units of 16 weights and one of 8 that only bf16 can hold. Each quantized Linear has 8 bytes
// that bpp does not count.
std::vector<UnitCosts> MakeUnits() {
  const auto formats = [](int64_t weights, double loss) {
    return std::vector<UnitFormat>{{"nvfp4", weights / 2 + 8, weights / 2, loss, {.text = loss}},
                                   {"fp8", weights, weights, loss / 10, {.text = loss / 10}},
                                   {"bf16", 2 * weights, 2 * weights, 0}};
  };
  return {{"l.0.qkv_proj", {"l.0.q_proj", "l.0.k_proj"}, 16, formats(16, 1.0)},
          {"l.1.down_proj", {"l.1.down_proj"}, 16, formats(16, 3.0)},
          {"l.2.odd", {"l.2.odd"}, 8, {{"bf16", 16, 16, 0}}}};
}

PlanRules Rules() { return {.formats = {"nvfp4", "fp8", "bf16"}, .pin = {}, .forbid = {}}; }

Planner MakePlanner(const PlanRules& rules = Rules()) {
  Result<Planner> planner = Planner::Make(MakeUnits(), rules, kFixedBytes);
  EXPECT_TRUE(planner.ok()) << planner.status().message();
  return std::move(planner).value();
}

Budget Bpp(double bpp) { return {.kind = Budget::Kind::kBpp, .bpp = bpp, .file_bytes = 0}; }

TEST(Planner, BppCountsPayloadOfUnitsWithAChoice) {
  const Result<PlannedAllocation> plan = MakePlanner().Plan(Bpp(6));
  ASSERT_TRUE(plan.ok()) << plan.status().message();
  EXPECT_EQ(plan->choices.at("l.1.down_proj"), "fp8");
  EXPECT_EQ(plan->choices.at("l.0.q_proj"), "nvfp4");
  EXPECT_EQ(plan->choices.at("l.0.k_proj"), "nvfp4");
  EXPECT_EQ(plan->choices.at("l.2.odd"), "bf16");
  EXPECT_DOUBLE_EQ(plan->bpp, 6.0);
  EXPECT_EQ(plan->slack, 0);
  EXPECT_EQ(plan->bytes, 16 + 16 + 16);
  EXPECT_EQ(plan->file_bytes, kFixedBytes + 48);
  EXPECT_DOUBLE_EQ(plan->cost, 1.3);
  EXPECT_DOUBLE_EQ(plan->lower_bound, 1.3);
  EXPECT_EQ(plan->counts.at("nvfp4"), 2);
}

TEST(Planner, BppIsNeverAboveTheBudget) {
  const Planner planner = MakePlanner();
  for (double bpp = 4; bpp < 17; bpp += 0.37) {
    const Result<PlannedAllocation> plan = planner.Plan(Bpp(bpp));
    ASSERT_TRUE(plan.ok());
    EXPECT_LE(plan->bpp, bpp);
    EXPECT_GE(plan->slack, 0);
  }
}

TEST(Planner, SizeCountsEveryByteOfTheCheckpoint) {
  const Planner planner = MakePlanner();
  const Budget budget{.kind = Budget::Kind::kFileBytes, .bpp = 0, .file_bytes = kFixedBytes + 63};
  const Result<PlannedAllocation> plan = planner.Plan(budget);
  ASSERT_TRUE(plan.ok());
  EXPECT_LE(plan->file_bytes, budget.file_bytes);
  EXPECT_EQ(plan->slack, budget.file_bytes - plan->file_bytes);
  EXPECT_EQ(plan->choices.at("l.1.down_proj"), "fp8");
}

TEST(Planner, AnInfeasibleBudgetNamesOneThatWorks) {
  const Planner planner = MakePlanner();
  const Status refused = planner.Plan(Bpp(3.9)).status();
  EXPECT_EQ(refused.code(), StatusCode::kUnmet);
  EXPECT_EQ(refused.message(), "--bpp 3.9 cannot be met: the smallest feasible is 4");
  EXPECT_TRUE(planner.Plan(Bpp(4.0)).ok());
  EXPECT_DOUBLE_EQ(planner.SmallestBpp(), 4.0);

  const int64_t smallest = kFixedBytes + 16 + 16 + 16;
  Budget size{.kind = Budget::Kind::kFileBytes, .bpp = 0, .file_bytes = smallest - 1};
  EXPECT_THAT(planner.Plan(size).status().message(), HasSubstr(std::to_string(smallest)));
  size.file_bytes = smallest;
  EXPECT_TRUE(planner.Plan(size).ok());
}

// One Linear whose formats hold these payloads; 7 more bytes each that bpp does not count.
UnitCosts MakeUnit(const std::string& name, int64_t weights,
                   const std::vector<std::pair<int64_t, double>>& payloads) {
  UnitCosts unit{.name = name, .linears = {name}, .weights = weights, .formats = {}};
  const std::vector<std::string> names = Rules().formats;
  for (const auto& [payload, cost] : payloads)
    unit.formats.push_back({names[unit.formats.size()], payload + 7, payload, cost});
  return unit;
}

TEST(Planner, TheBudgetThatARefusalNamesIsTheLeastThatWorks) {
  std::mt19937 random(3);
  for (int round = 0; round < 500; ++round) {
    std::vector<UnitCosts> units;
    for (int u = 0; u < 3; ++u) {
      const auto weights = static_cast<int64_t>(1 + random() % 1'000'000);
      units.push_back(
          MakeUnit(fmt::format("u{}", u), weights, {{weights * 5 / 9, 1.0}, {weights, 0.1}}));
    }
    const Planner planner = Planner::Make(units, Rules(), kFixedBytes).value();
    const std::string message = planner.Plan(Bpp(0.5)).status().message();
    const double named = std::stod(message.substr(message.rfind(' ')));
    EXPECT_EQ(named, planner.SmallestBpp()) << message;
    const Result<PlannedAllocation> plan = planner.Plan(Bpp(named));
    ASSERT_TRUE(plan.ok()) << message << ", then " << plan.status().message();
    EXPECT_EQ(plan->bpp, named);
    EXPECT_FALSE(planner.Plan(Bpp(std::nextafter(named, 0))).ok());
  }
}

TEST(Planner, ADecimalBudgetIsSpentToTheLastByte) {
  // 4.35 * 800 / 8 is 435, in doubles 434.99...
  const std::vector<UnitCosts> units = {MakeUnit("u", 800, {{400, 2.0}, {434, 1.5}, {435, 1.0}})};
  const Planner planner = Planner::Make(units, Rules(), kFixedBytes).value();
  EXPECT_EQ(planner.Plan(Bpp(4.35))->cost, 1.0);
  EXPECT_EQ(planner.Plan(Bpp(4.35))->slack, 0);
  EXPECT_EQ(planner.Plan(Bpp(4.3499999))->cost, 1.5);
}

Budget Device(int64_t bytes) {
  Budget budget{.kind = Budget::Kind::kDevice};
  budget.device = {.bytes = bytes, .context = 9, .kv_cache_bytes = 500, .state_bytes = 70};
  return budget;
}

TEST(Planner, DeviceMemoryHoldsWeightsCacheAndState) {
  const Planner planner = MakePlanner();
  const Result<PlannedAllocation> plan = planner.Plan(Device(kFixedBytes + 570 + 63));
  ASSERT_TRUE(plan.ok()) << plan.status().message();
  EXPECT_EQ(plan->choices.at("l.1.down_proj"), "fp8") << "as --size of what the caches leave";
  EXPECT_EQ(plan->file_bytes, kFixedBytes + 48);
  EXPECT_EQ(plan->slack, 15);
  EXPECT_EQ(FreeDeviceBytes(*plan), 15);
  const Json json = PlanToJson(*plan, {});
  EXPECT_EQ(json["budget"],
            Json::parse(R"({"device_bytes": 1633, "context": 9, "sequences": 1, "drafts": 0})"));
  EXPECT_EQ(json["device"], Json::parse(R"({"weights_bytes": 1048, "kv_cache_bytes": 500,
      "state_bytes": 70, "free_bytes": 15})"));
}

TEST(Planner, ADeviceThatIsTooSmallIsToldTheSmallest) {
  const Planner planner = MakePlanner();
  constexpr int64_t kSmallest = kFixedBytes + 48 + 570;
  EXPECT_EQ(planner.Plan(Device(kSmallest - 1)).status().message(),
            "--device-memory of 1617 bytes cannot be met: the smallest feasible is 1618 bytes, "
            "1048 of weights, 500 of KV cache and 70 of state");
  EXPECT_EQ(planner.Plan(Device(1)).status().code(), StatusCode::kUnmet);
  EXPECT_TRUE(planner.Plan(Device(kSmallest)).ok());
}

Budget MaxKl(double nats) {
  Budget budget{.kind = Budget::Kind::kMaxKl};
  budget.max_kl = nats;
  return budget;
}

std::vector<UnitCosts> LossyUnits() {
  return {MakeUnit("a", 16, {{8, 1.0}, {16, 0.1}, {32, 0}}),
          MakeUnit("b", 16, {{8, 3.0}, {16, 0.3}, {32, 0}})};
}

TEST(Planner, MaxKlIsTheSmallestPlanThatKeepsTheBound) {
  const Planner planner = Planner::Make(LossyUnits(), Rules(), kFixedBytes).value();
  const PlannedAllocation all_small = planner.Plan(MaxKl(4.0)).value();
  EXPECT_EQ(all_small.choices.at("a"), "nvfp4");
  EXPECT_EQ(all_small.choices.at("b"), "nvfp4");
  const PlannedAllocation plan = planner.Plan(MaxKl(1.3)).value();
  EXPECT_EQ(plan.choices.at("a"), "nvfp4");
  EXPECT_EQ(plan.choices.at("b"), "fp8");
  EXPECT_LE(plan.cost, 1.3);
  EXPECT_EQ(plan.bytes, 8 + 16 + 2 * 7);
  EXPECT_EQ(plan.bytes_bound, plan.bytes);
  EXPECT_EQ(plan.slack, 0);
  EXPECT_EQ(plan.file_bytes, kFixedBytes + plan.bytes);
  EXPECT_EQ(plan.lower_bound, plan.cost);
  EXPECT_GT(plan.price, 0);
  const Json json = PlanToJson(plan, {});
  EXPECT_EQ(json["budget"], Json::parse(R"({"max_kl": 1.3})"));
  EXPECT_EQ(json["bytes_lower_bound"], plan.bytes);
  EXPECT_EQ(planner.Plan(MaxKl(1e-9))->bpp, 16.0);
}

TEST(Planner, MaxKlBoundsTheWeightedCost) {
  std::vector<UnitCosts> units = LossyUnits();
  for (UnitFormat& format : units[0].formats) format.losses = {.text = format.cost};
  for (UnitFormat& format : units[1].formats) format.losses = {.mtp = 10 * format.cost};
  const PlannedAllocation plan = Planner::Make(units, Rules(), 0).value().Plan(MaxKl(1.3)).value();
  EXPECT_EQ(plan.choices.at("b"), "fp8") << "not only the text's loss counts";
  EXPECT_DOUBLE_EQ(plan.losses.text, 1.0);
}

TEST(Planner, AnUnreachableKlIsToldTheLeast) {
  PlanRules rules = Rules();
  rules.forbid = {{"b", "bf16"}};
  const Planner planner = Planner::Make(LossyUnits(), rules, kFixedBytes).value();
  const Status refused = planner.Plan(MaxKl(0.1)).status();
  EXPECT_EQ(refused.code(), StatusCode::kUnmet);
  EXPECT_EQ(refused.message(),
            "--max-kl 0.1 cannot be met: the least predicted KL is 0.3 nats per token");
  EXPECT_EQ(planner.Plan(MaxKl(0.3))->choices.at("a"), "bf16");
}

TEST(Planner, TakesAnyNumberAsABudget) {
  const Planner planner = MakePlanner();
  const double infinity = std::numeric_limits<double>::infinity();
  for (const double large : {16.0, 1e6, 1e300, infinity}) {
    const Result<PlannedAllocation> plan = planner.Plan(Bpp(large));
    ASSERT_TRUE(plan.ok()) << plan.status().message();
    EXPECT_EQ(plan->bpp, 16.0);
    EXPECT_EQ(plan->price, 0);
  }
  for (const double small : {3.99, 0.0, -1.0, -1e300, -infinity})
    EXPECT_EQ(planner.Plan(Bpp(small)).status().code(), StatusCode::kUnmet) << small;
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_EQ(planner.Plan(Bpp(nan)).status().code(), StatusCode::kInvalidInput);
  EXPECT_EQ(planner.Sweep({5, nan}).status().code(), StatusCode::kInvalidInput);
}

TEST(Planner, BppOfUnitsWithoutAChoiceIsZero) {
  const std::vector<UnitCosts> units = {MakeUnit("u", 800, {{400, 2.0}})};
  const Planner planner = Planner::Make(units, Rules(), kFixedBytes).value();
  EXPECT_EQ(planner.SmallestBpp(), 0);
  const Result<PlannedAllocation> plan = planner.Plan(Bpp(1));
  ASSERT_TRUE(plan.ok()) << plan.status().message();
  EXPECT_EQ(plan->bpp, 0);
  EXPECT_EQ(plan->slack, 0);
  EXPECT_EQ(plan->file_bytes, kFixedBytes + 407);
}

TEST(Planner, UnitsCountByTheFormatsBeforeTheRules) {
  PlanRules rules = Rules();
  rules.pin = {{".", "bf16"}};
  EXPECT_DOUBLE_EQ(MakePlanner(rules).SmallestBpp(), 16.0);
  rules.pin = {};
  rules.formats = {"bf16"};
  EXPECT_EQ(MakePlanner(rules).SmallestBpp(), 0) << "one format is no choice";
}

TEST(Planner, SizeWeighsBytesThatBppDoesNotCount) {
  // fp8 has the smaller payload, nvfp4 the smaller file.
  UnitCosts unit = MakeUnit("u", 8, {{10, 1.0}, {9, 1.0}, {16, 0}});
  unit.formats[1].bytes = 40;
  const Planner planner = Planner::Make({unit}, Rules(), 0).value();
  EXPECT_EQ(planner.Plan(Bpp(10))->choices.at("u"), "fp8");
  const Budget size{.kind = Budget::Kind::kFileBytes, .bpp = 0, .file_bytes = 17};
  EXPECT_EQ(planner.Plan(size)->choices.at("u"), "nvfp4");
}

TEST(Planner, SweepMarksInfeasiblePointsWithTheSmallestFeasibleOne) {
  const Result<std::vector<PlannedAllocation>> sweep = MakePlanner().Sweep({3, 4, 8});
  ASSERT_TRUE(sweep.ok());
  ASSERT_EQ(sweep->size(), 3U);
  EXPECT_FALSE((*sweep)[0].feasible);
  EXPECT_TRUE((*sweep)[1].feasible);
  const Json json = PlanToJson((*sweep)[2], *sweep);
  EXPECT_EQ(json["frontier"][0]["feasible"], false);
  EXPECT_EQ(json["frontier"][0]["target_bpp"], 3.0);
  EXPECT_FALSE(json["frontier"][0].contains("predicted_kl"));
  EXPECT_DOUBLE_EQ(json["frontier"][0]["smallest_feasible_bpp"], 4.0);
  EXPECT_EQ(json["frontier"][1]["feasible"], true);
  EXPECT_EQ(json["frontier"][1]["target_bpp"], 4.0);
}

TEST(Planner, TheWholeOfQwen27bIsSpentAndProvenAtEveryTarget) {
  const std::vector<UnitCosts> units = Qwen27bUnits(27);
  int64_t linears = 0, weights = 0;
  for (const UnitCosts& unit : units) {
    linears += static_cast<int64_t>(unit.linears.size());
    weights += unit.weights;
  }
  EXPECT_EQ(units.size(), 64 * 4 + 5 + 27 * 4 + 2);
  EXPECT_EQ(linears, 16 * 7 + 48 * 6 + 8 + 27 * 4 + 2);
  EXPECT_EQ(weights, 25'207'533'568);
  const Planner planner = Planner::Make(units, Qwen27bRules(), kFixedBytes).value();
  for (const double target : {4.5, 4.75, 5.0, 5.25, 5.5, 6.0, 7.0, 8.25}) {
    const Result<PlannedAllocation> plan = planner.Plan(Bpp(target));
    ASSERT_TRUE(plan.ok()) << plan.status().message();
    EXPECT_LE(plan->bpp, target);
    EXPECT_GE(plan->bpp, target - 0.001);
    EXPECT_EQ(plan->cost, plan->lower_bound) << target;
    EXPECT_EQ(plan->choices.size(), static_cast<size_t>(linears));
  }
}

TEST(Planner, TheKneeIsAFeasiblePointOfTheSweep) {
  const Planner planner = MakePlanner();
  const auto sweep = planner.Sweep({3, 4, 6, 8, 16}).value();
  EXPECT_EQ(KneeOf(sweep), 3);
  EXPECT_EQ(PlanToJson(sweep[4], sweep)["knee"]["bpp"], 8.0);
  const auto few = planner.Sweep({2, 3, 4, 6}).value();
  EXPECT_EQ(KneeOf(few), -1) << "two feasible points";
  EXPECT_TRUE(PlanToJson(few[3], few)["knee"].is_null());
}

TEST(Planner, PinsAndForbidsActOnWholeUnits) {
  PlanRules rules = Rules();
  rules.pin = {{"k_proj", "bf16"}};
  rules.forbid = {{"down_proj$", "nvfp4"}};
  const Result<PlannedAllocation> plan = MakePlanner(rules).Plan(Bpp(16));
  ASSERT_TRUE(plan.ok());
  EXPECT_EQ(plan->choices.at("l.0.q_proj"), "bf16");
  const Planner planner = MakePlanner(rules);
  EXPECT_DOUBLE_EQ(planner.SmallestBpp(), 12.0) << "pinned units still count in bpp";
  EXPECT_EQ(planner.Plan(Bpp(12))->choices.at("l.1.down_proj"), "fp8");
}

TEST(Planner, RefusesRulesThatCannotHold) {
  const auto refusal = [](const PlanRules& rules) {
    const Result<Planner> planner = Planner::Make(MakeUnits(), rules, kFixedBytes);
    EXPECT_EQ(planner.status().code(), StatusCode::kInvalidInput);
    return planner.status().message();
  };
  PlanRules rules = Rules();
  rules.pin = {{"no_such", "fp8"}};
  EXPECT_THAT(refusal(rules), HasSubstr("--pin no_such=fp8: matches no Linear"));
  rules.pin = {{"(", "fp8"}};
  EXPECT_THAT(refusal(rules), HasSubstr("pattern"));
  rules.pin = {{"odd", "fp8"}};
  EXPECT_THAT(refusal(rules), HasSubstr("l.2.odd"));
  rules.pin = {{"down", "fp8"}};
  rules.forbid = {{"down", "fp8"}};
  EXPECT_THAT(refusal(rules), HasSubstr("without a format"));
  rules.forbid = {};
  rules.pin = {{"q_proj", "fp8"}, {"k_proj", "bf16"}};
  EXPECT_THAT(refusal(rules), HasSubstr("--pin k_proj=bf16: l.0.qkv_proj"));
  rules.pin = {};
  rules.forbid = {{"[", "fp8"}};
  EXPECT_THAT(refusal(rules), HasSubstr("--forbid [=fp8: the pattern \"[\""));
  rules.forbid = {{"no_such", "fp8"}};
  EXPECT_THAT(refusal(rules), HasSubstr("--forbid no_such=fp8: matches no Linear"));
  rules.forbid = {{"down", "nvpf4"}};
  EXPECT_THAT(refusal(rules), HasSubstr("--forbid down=nvpf4: the format is none of --formats"));
  rules.forbid = {{"down", "fp8"}, {"down", "nvfp4"}, {"down", "bf16"}};
  EXPECT_THAT(refusal(rules), HasSubstr("--forbid down=bf16: leaves l.1.down_proj"));
  rules = Rules();
  rules.formats = {"nvfp4"};
  EXPECT_THAT(refusal(rules), HasSubstr("--formats nvfp4"));
}

TEST(Planner, UniformTakesTheLargestOtherFormatWhereItCannot) {
  const Result<PlannedAllocation> plan = MakePlanner().Uniform("fp8");
  ASSERT_TRUE(plan.ok());
  EXPECT_EQ(plan->choices.at("l.0.q_proj"), "fp8");
  EXPECT_EQ(plan->choices.at("l.2.odd"), "bf16");
  EXPECT_DOUBLE_EQ(plan->bpp, 8.0);
  EXPECT_EQ(plan->lower_bound, plan->cost);
  PlanRules rules = Rules();
  rules.pin = {{"down", "bf16"}};
  EXPECT_EQ(MakePlanner(rules).Uniform("nvfp4")->choices.at("l.1.down_proj"), "bf16");
}

TEST(Planner, AChosenFormatIsTakenWhateverTheRulesAdmit) {
  std::vector<UnitCosts> units = MakeUnits();
  units[1].chosen = "fp8";
  PlanRules rules = Rules();
  rules.formats = {"nvfp4", "bf16"};
  const PlannedAllocation plan = Planner::Make(units, rules, 0).value().Plan(Bpp(8)).value();
  EXPECT_EQ(plan.choices.at("l.1.down_proj"), "fp8");
  EXPECT_NE(plan.choices.at("l.0.q_proj"), "fp8");
  EXPECT_DOUBLE_EQ(plan.bpp, 8.0 * (8 + 16) / 32) << "the chosen unit counts";
  units[2].chosen = "nvfp4";
  const Status refused = Planner::Make(units, rules, 0).status();
  EXPECT_EQ(refused.message(), "l.2.odd: cannot be stored as nvfp4");
}

TEST(Planner, TheWeightedCostIsMinimisedAndThePartsAreSummed) {
  std::vector<UnitCosts> units = MakeUnits();
  for (UnitFormat& format : units[0].formats) {
    format.losses = {.text = 1, .caption = 10, .mtp = 100};
    format.cost = format.format == "fp8" ? 0 : 10;
  }
  const PlannedAllocation plan = Planner::Make(units, Rules(), 0).value().Plan(Bpp(6)).value();
  EXPECT_EQ(plan.choices.at("l.0.q_proj"), "fp8");
  EXPECT_DOUBLE_EQ(plan.cost, 3);
  EXPECT_DOUBLE_EQ(plan.losses.text, 1 + 3);
  EXPECT_DOUBLE_EQ(plan.losses.caption, 10);
  EXPECT_DOUBLE_EQ(plan.losses.mtp, 100);
  const Json json = PlanToJson(plan, {});
  EXPECT_DOUBLE_EQ(json["predicted_kl"], 4);
  EXPECT_DOUBLE_EQ(json["predicted"]["caption"], 10);
  EXPECT_DOUBLE_EQ(json["objective"], 3);
}

TEST(Plan, JsonGoesOutAndComesBack) {
  const Planner planner = MakePlanner();
  const PlannedAllocation plan = planner.Plan(Bpp(6)).value();
  const Json json = PlanToJson(plan, {});
  EXPECT_EQ(json["schema"], 1);
  EXPECT_EQ(json["gap"], 0.0);
  EXPECT_DOUBLE_EQ(json["predicted_kl"], 1.3);
  const std::vector<std::string> linears = {"l.0.q_proj", "l.0.k_proj", "l.1.down_proj", "l.2.odd"};
  const auto choices = ChoicesFromJson(json, "plan.json", linears);
  ASSERT_TRUE(choices.ok()) << choices.status().message();
  EXPECT_EQ(*choices, plan.choices);
}

TEST(Plan, RefusesChoicesThatDoNotFitTheModel) {
  const std::vector<std::string> linears = {"a", "b"};
  const auto refusal = [&](const Json& json) {
    return ChoicesFromJson(json, "plan.json", linears).status().message();
  };
  EXPECT_THAT(refusal({{"choices", {{"a", "fp8"}}}}), HasSubstr("no choice for Linear b"));
  EXPECT_THAT(refusal({{"choices", {{"a", "fp8"}, {"b", "fp8"}, {"c", "fp8"}}}}),
              HasSubstr("no Linear c"));
  EXPECT_THAT(refusal({{"choices", {{"a", 4}, {"b", "fp8"}}}}), HasSubstr("format of a"));
  EXPECT_THAT(refusal(Json::array()), HasSubstr("plan.json"));
}

TEST(Rules, ParseAtTheLastEqualsSign) {
  const Result<FormatRule> rule = ParseFormatRule("--pin", "a=b=fp8");
  ASSERT_TRUE(rule.ok());
  EXPECT_EQ(rule->pattern, "a=b");
  EXPECT_EQ(rule->format, "fp8");
  for (const char* bad : {"fp8", "=fp8", "a=", ""}) {
    EXPECT_THAT(ParseFormatRule("--pin", bad).status().message(), HasSubstr("REGEX=FORMAT"));
  }
}

TEST(Size, TakesDecimalAndBinaryUnits) {
  EXPECT_EQ(*ParseSize("--size", "23GB"), 23'000'000'000);
  EXPECT_EQ(*ParseSize("--size", "1.5GiB"), 3 * (int64_t{1} << 29));
  EXPECT_EQ(*ParseSize("--size", "5000"), 5000);
  EXPECT_EQ(*ParseSize("--size", "2 MB"), 2'000'000);
  EXPECT_EQ(*ParseSize("--size", "3KiB"), 3072);
  EXPECT_EQ(*ParseSize("--size", "1.0000000009kB"), 1000);
  for (const char* bad : {"", "GB", "-1GB", "0", "1TBx", "nan", "1e30GB"}) {
    EXPECT_THAT(ParseSize("--size", bad).status().message(), HasSubstr("23GB")) << bad;
  }
}

TEST(Size, EveryDecimalIsTheIntegerThatItSays) {
  for (int64_t hundredths = 1; hundredths <= 5000; ++hundredths) {
    const std::string text = fmt::format("{}.{:02}", hundredths / 100, hundredths % 100);
    EXPECT_EQ(*ParseSize("--size", text + "GB"), hundredths * 10'000'000) << text;
    EXPECT_EQ(*ParseSize("--size", text + "kB"), hundredths * 10) << text;
  }
}

TEST(CostTable, IsReadAndItsFaultsAreNamed) {
  const auto parse = [](const char* text) {
    return UnitsFromJson(Json::parse(text), "costs.json");
  };
  const auto units = parse(R"({"schema":1,"units":[{"name":"u","weights":8,"choices":
      [{"format":"nvfp4","bytes":4,"cost":0.5},{"format":"bf16","bytes":16,"cost":0}]}]})");
  ASSERT_TRUE(units.ok()) << units.status().message();
  ASSERT_EQ(units->size(), 1U);
  EXPECT_EQ((*units)[0].choices[1].bytes, 16);
  const Allocation allocation = Allocate(*units, 10).value();
  const Json json = AllocationToJson(*units, allocation, Json{{"bytes", 10}});
  EXPECT_EQ(json["choices"]["u"], "nvfp4");
  EXPECT_DOUBLE_EQ(json["bpp"], 4.0);
  EXPECT_EQ(json["slack_bytes"], 6);

  EXPECT_THAT(parse(R"({"units":[]})").status().message(), HasSubstr("schema"));
  EXPECT_THAT(parse(R"({"schema":2,"units":[]})").status().message(), HasSubstr("schema 2"));
  EXPECT_THAT(parse(R"({"schema":1})").status().message(), HasSubstr("units"));
  EXPECT_THAT(parse(R"({"schema":1,"units":[{"name":"u"}]})").status().message(),
              HasSubstr("unit u"));
  EXPECT_THAT(parse(R"({"schema":1,"units":[{"name":"u","choices":[{"format":"a","bytes":1.5,
      "cost":0}]}]})")
                  .status()
                  .message(),
              HasSubstr("bytes"));
  EXPECT_THAT(parse(R"({"schema":1,"units":[{"name":"u","choices":[]},{"name":"u","choices":[]}]})")
                  .status()
                  .message(),
              HasSubstr("listed twice"));
  const auto refusal = [&](const char* text) {
    const Status status = parse(text).status();
    EXPECT_EQ(status.code(), StatusCode::kInvalidInput) << text;
    EXPECT_THAT(status.message(), HasSubstr("costs.json")) << text;
    return status.message();
  };
  refusal("[]");
  refusal(R"({"schema":1,"units":{}})");
  refusal(R"({"schema":1,"units":["u"]})");
  EXPECT_THAT(refusal(R"({"schema":1,"units":[{"name":"u","choices":["fp8"]}]})"),
              HasSubstr("unit u"));
  EXPECT_THAT(refusal(R"({"schema":1,"units":[{"name":"u","weights":-8,"choices":[]}]})"),
              HasSubstr("-8 weights"));
  EXPECT_THAT(refusal(R"({"schema":1,"units":[{"name":"u","choices":[{"format":"a","bytes":1,
      "cost":"low"}]}]})"),
              HasSubstr("cost"));
}

}  // namespace
}  // namespace prismaquant

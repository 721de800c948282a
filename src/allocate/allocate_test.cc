#include "allocate/allocate.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>

namespace prismaquant {
namespace {

using ::testing::HasSubstr;

Unit MakeUnit(const std::string& name, const std::vector<std::pair<int64_t, double>>& choices) {
  Unit unit{.name = name, .weights = 1, .choices = {}};
  for (const auto& [bytes, cost] : choices) {
    unit.choices.push_back({fmt::format("f{}", unit.choices.size()), bytes, cost});
  }
  return unit;
}

// Least cost within the budget by trying everything; infinity if nothing fits.
double BruteForce(const std::vector<Unit>& units, int64_t budget, size_t next = 0) {
  if (budget < 0) return std::numeric_limits<double>::infinity();
  if (next == units.size()) return 0;
  double least = std::numeric_limits<double>::infinity();
  for (const Choice& choice : units[next].choices) {
    least = std::min(least, choice.cost + BruteForce(units, budget - choice.bytes, next + 1));
  }
  return least;
}

int64_t LargestBytes(const std::vector<Unit>& units) {
  int64_t total = 0;
  for (const Unit& unit : units) {
    int64_t largest = 0;
    for (const Choice& choice : unit.choices) largest = std::max(largest, choice.bytes);
    total += largest;
  }
  return total;
}

// Units as a model of 500 has them: a few sizes, losses over several orders of magnitude.
std::vector<Unit> ModelUnits(int count) {
  std::mt19937 random(3);
  std::lognormal_distribution<double> loss(0, 1.5);
  const int64_t sizes[] = {3 * 5120 * 1024, 5120 * 6144, 2 * 5120 * 17408, 5120 * 17408};
  std::vector<Unit> units;
  for (int u = 0; u < count; ++u) {
    const int64_t weights = sizes[random() % 4];
    const double base = loss(random) * 1e-3;
    units.push_back(MakeUnit(fmt::format("u{}", u), {{weights * 9 / 16 + 8, base},
                                                     {weights + 2 * 5120, base * 0.08},
                                                     {weights * 33 / 32, base * 0.09},
                                                     {2 * weights, 0}}));
  }
  return units;
}

// Everything that an Allocation promises about itself.
void ExpectConsistent(const std::vector<Unit>& units, int64_t budget, const Allocation& found) {
  ASSERT_EQ(found.choice.size(), units.size());
  int64_t bytes = 0;
  double cost = 0;
  for (size_t i = 0; i < units.size(); ++i) {
    const Choice& choice = units[i].choices.at(static_cast<size_t>(found.choice[i]));
    bytes += choice.bytes;
    cost += choice.cost;
    for (const Choice& other : units[i].choices) {
      const bool fits = other.bytes - choice.bytes <= found.slack;
      EXPECT_FALSE(fits && other.cost < choice.cost)
          << "an upgrade of " << units[i].name << " fits";
    }
  }
  EXPECT_EQ(found.bytes, bytes);
  EXPECT_EQ(found.slack, budget - bytes);
  EXPECT_GE(found.slack, 0);
  EXPECT_DOUBLE_EQ(found.cost, cost);
  EXPECT_LE(found.lower_bound, found.cost);
  EXPECT_GE(found.price, 0);
}

enum class Kind {
  kFalling,
  kAnything,
  kTies,
  kHuge,
  kOffsets,    // few bytes apart, on top of more than a terabyte
  kHeavyTail,  // bytes and costs over many orders of magnitude
  kTiny,       // denormal costs
  kLargest,    // costs near the largest double
};

class Draw {
 public:
  explicit Draw(unsigned seed) : random_(seed) {}
  int64_t Integer(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }
  double Real(double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(random_);
  }

 private:
  std::mt19937 random_;
};

std::pair<int64_t, double> RandomChoice(Kind kind, Draw& draw) {
  const int64_t bytes = draw.Integer(0, 40);
  const double cost = static_cast<double>(draw.Integer(0, 20)) / 7;
  switch (kind) {
    case Kind::kFalling:
      return {bytes, 50.0 / static_cast<double>(1 + bytes)};
    case Kind::kAnything:
      return {bytes, cost};
    case Kind::kTies:
      return {1 + bytes % 4, cost * 7 / 10};
    case Kind::kHuge:
      return {(bytes << 43) + draw.Integer(0, 3), cost};
    case Kind::kOffsets:
      return {(int64_t{1} << 48) + bytes, draw.Real(0, 1)};
    case Kind::kHeavyTail:
      return {static_cast<int64_t>(std::exp(draw.Real(0, 33))), std::exp(draw.Real(-35, 5))};
    case Kind::kTiny:
      return {bytes, cost * 7 * std::numeric_limits<double>::denorm_min()};
    case Kind::kLargest:
      return {bytes << 40, cost * 0x1p1018};
  }
  return {};
}

std::vector<Unit> RandomUnits(Kind kind, Draw& draw) {
  std::vector<Unit> units;
  const int64_t count = draw.Integer(1, 7);
  for (int64_t u = 0; u < count; ++u) {
    std::vector<std::pair<int64_t, double>> choices;
    for (int64_t c = draw.Integer(1, 4); c > 0; --c) choices.push_back(RandomChoice(kind, draw));
    units.push_back(MakeUnit(fmt::format("u{}", u), choices));
  }
  return units;
}

class RandomCases : public ::testing::TestWithParam<Kind> {};

TEST_P(RandomCases, EqualBruteForceAtEveryBudget) {
  Draw draw(7);
  for (int round = 0; round < 400; ++round) {
    const std::vector<Unit> units = RandomUnits(GetParam(), draw);
    const int64_t smallest = SmallestBytes(units), largest = LargestBytes(units);
    for (const int64_t budget : {smallest, smallest + (largest - smallest) / 5,
                                 (smallest + largest) / 2, largest - 1, largest, largest + 100}) {
      if (budget < smallest) continue;
      const Result<Allocation> found = Allocate(units, budget);
      ASSERT_TRUE(found.ok()) << found.status().message();
      ExpectConsistent(units, budget, *found);
      const double least = BruteForce(units, budget);
      EXPECT_NEAR(found->cost, least, 1e-14 * least);
      EXPECT_EQ(found->gap(), 0);
    }
  }
}

// Fewest bytes at this cost by trying everything; -1 if no allocation costs so little.
int64_t FewestBytes(const std::vector<Unit>& units, double most_cost, size_t next = 0,
                    int64_t bytes = 0, double cost = 0) {
  if (next == units.size()) return cost <= most_cost ? bytes : -1;
  int64_t fewest = -1;
  for (const Choice& choice : units[next].choices) {
    const int64_t found =
        FewestBytes(units, most_cost, next + 1, bytes + choice.bytes, cost + choice.cost);
    if (found >= 0 && (fewest < 0 || found < fewest)) fewest = found;
  }
  return fewest;
}

TEST_P(RandomCases, SmallestEqualsBruteForceAtEveryBound) {
  constexpr double kRounding = 1e-12;
  Draw draw(17);
  for (int round = 0; round < 150; ++round) {
    const std::vector<Unit> units = RandomUnits(GetParam(), draw);
    const double least = Allocate(units, LargestBytes(units))->cost;
    const double most = Allocate(units, SmallestBytes(units))->cost;
    for (const double share : {0.0, 0.01, 0.2, 0.5, 0.9, 1.0, 2.0}) {
      const double bound = least + share * (most - least);
      const Result<SmallestAllocation> found = AllocateSmallest(units, bound);
      ASSERT_TRUE(found.ok()) << found.status().message();
      const Allocation& allocation = found->allocation;
      ExpectConsistent(units, allocation.bytes, allocation);
      EXPECT_LE(allocation.cost, bound);
      EXPECT_EQ(found->bytes_bound, allocation.bytes);
      const int64_t stricter = FewestBytes(units, bound * (1 - kRounding));
      EXPECT_TRUE(stricter < 0 || allocation.bytes <= stricter);
      EXPECT_GE(allocation.bytes, FewestBytes(units, bound * (1 + kRounding)));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Allocate, RandomCases,
                         ::testing::Values(Kind::kFalling, Kind::kAnything, Kind::kTies,
                                           Kind::kHuge, Kind::kOffsets, Kind::kHeavyTail,
                                           Kind::kTiny, Kind::kLargest));

TEST(Allocate, CostsFallWithTheBudgetByteForByte) {
  Draw draw(11);
  for (int round = 0; round < 60; ++round) {
    const std::vector<Unit> units = RandomUnits(Kind::kAnything, draw);
    const int64_t smallest = SmallestBytes(units);
    double before = std::numeric_limits<double>::infinity();
    for (int64_t budget = smallest; budget <= LargestBytes(units); ++budget) {
      const Result<Allocation> found = Allocate(units, budget);
      ASSERT_TRUE(found.ok());
      EXPECT_LE(found->cost, before);
      before = found->cost;
    }
    EXPECT_EQ(Allocate(units, smallest - 1).status().code(), StatusCode::kUnmet);
    const Allocation unlimited = Allocate(units, std::numeric_limits<int64_t>::max()).value();
    EXPECT_EQ(unlimited.cost, before);
    EXPECT_EQ(unlimited.price, 0);
  }
}

// Bytes that every choice of a unit has cannot change which choice is best.
TEST(Allocate, BytesCommonToAllChoicesChangeNothing) {
  constexpr int64_t kOffset = int64_t{1} << 44;
  constexpr int64_t kUnits = 200;
  Draw draw(5);
  for (int round = 0; round < 100; ++round) {
    std::vector<Unit> units;
    for (int64_t u = 0; u < kUnits; ++u) {
      std::vector<std::pair<int64_t, double>> choices;
      for (int c = 0; c < 4; ++c) choices.emplace_back(draw.Integer(0, 40), draw.Real(0, 1));
      units.push_back(MakeUnit(fmt::format("u{}", u), choices));
    }
    const int64_t budget = draw.Integer(SmallestBytes(units), LargestBytes(units));
    const Allocation plain = Allocate(units, budget).value();
    for (Unit& unit : units) {
      for (Choice& choice : unit.choices) choice.bytes += kOffset;
    }
    const Allocation shifted = Allocate(units, budget + kUnits * kOffset).value();
    EXPECT_EQ(shifted.choice, plain.choice);
    EXPECT_EQ(shifted.slack, plain.slack);
    EXPECT_EQ(shifted.price, plain.price);
  }
}

// Past the state limit the answer is still feasible, and the bound still one.
TEST(Allocate, TheLeastCostThatARefusalNamesCanBeMet) {
  Draw draw(19);
  for (int round = 0; round < 200; ++round) {
    std::vector<Unit> units = RandomUnits(Kind::kAnything, draw);
    units.push_back(MakeUnit("dear", {{1, draw.Real(1, 2)}}));
    const Status refused = AllocateSmallest(units, 0.5).status();
    EXPECT_EQ(refused.code(), StatusCode::kUnmet);
    const std::string named = refused.message().substr(refused.message().find("KL is ") + 6);
    const Result<SmallestAllocation> found = AllocateSmallest(units, std::stod(named));
    ASSERT_TRUE(found.ok()) << refused.message();
    EXPECT_FALSE(AllocateSmallest(units, std::nextafter(std::stod(named), 0)).ok());
  }
}

TEST(Allocate, SmallestIsFoundAgainFromItsOwnCost) {
  const std::vector<Unit> units = ModelUnits(200);
  const double most = Allocate(units, SmallestBytes(units))->cost;
  for (const double share : {0.9, 0.3, 0.05}) {
    const SmallestAllocation first = AllocateSmallest(units, share * most).value();
    const SmallestAllocation again = AllocateSmallest(units, first.allocation.cost).value();
    EXPECT_EQ(again.allocation.choice, first.allocation.choice);
    EXPECT_EQ(first.bytes_bound, first.allocation.bytes);
  }
}

TEST(Allocate, SmallestSaysTheTrueBoundPastTheStateLimit) {
  Draw draw(23);
  int unproven = 0;
  for (int round = 0; round < 20; ++round) {
    std::vector<Unit> units;
    for (int u = 0; u < 14; ++u) {
      const int64_t bytes = draw.Integer(1 << 20, 1 << 24);
      const double cost = static_cast<double>(bytes) + draw.Real(0, 1000);
      units.push_back(MakeUnit(fmt::format("u{}", u), {{0, cost}, {bytes, 0}}));
    }
    const double bound = Allocate(units, 0)->cost / 2;
    const int64_t fewest = FewestBytes(units, bound);
    const SmallestAllocation found = AllocateSmallest(units, bound, 20).value();
    EXPECT_LE(found.allocation.cost, bound);
    EXPECT_GE(found.allocation.bytes, fewest);
    EXPECT_LE(found.bytes_bound, fewest);
    if (found.bytes_bound < found.allocation.bytes) ++unproven;
  }
  EXPECT_GT(unproven, 10);
}

TEST(Allocate, SaysTheTrueGapPastTheStateLimit) {
  Draw draw(13);
  int unproven = 0;
  for (int round = 0; round < 40; ++round) {
    std::vector<Unit> units;
    for (int u = 0; u < 14; ++u) {
      const int64_t bytes = draw.Integer(1 << 20, 1 << 24);
      const double cost = static_cast<double>(bytes) + draw.Real(0, 1000);
      units.push_back(MakeUnit(fmt::format("u{}", u), {{0, cost}, {bytes, 0}}));
    }
    const int64_t budget = LargestBytes(units) / 2;
    const double least = BruteForce(units, budget);
    for (const size_t states : {0, 1, 20, 200}) {
      const Allocation found = Allocate(units, budget, states).value();
      ExpectConsistent(units, budget, found);
      EXPECT_GE(found.cost, least * (1 - 1e-14));
      EXPECT_LE(found.lower_bound, least);
      EXPECT_GT(found.lower_bound, 0.9 * least);
      if (found.gap() > 0) ++unproven;
    }
    EXPECT_NEAR(Allocate(units, budget)->cost, least, 1e-14 * least);
  }
  EXPECT_GT(unproven, 100);
}

TEST(Allocate, TakesMoreChoicesThanAShortCounts) {
  std::vector<std::pair<int64_t, double>> many;
  for (int i = 0; i < 40'000; ++i) many.emplace_back(3 * i, 40'000 - i + 0.3 * (i * 7919 % 13));
  std::vector<Unit> few;
  for (int u = 0; u < 6; ++u) {
    const int bytes = 1 + 2 * u;
    few.push_back(
        MakeUnit(fmt::format("few{}", u), {{0, 9}, {bytes, 9 - 0.3 * bytes - 0.05 * (u % 3)}}));
  }
  std::vector<Unit> units = few;
  units.push_back(MakeUnit("many", many));
  for (const int64_t budget : {105'005, 105'010}) {
    const Allocation found = Allocate(units, budget).value();
    ExpectConsistent(units, budget, found);
    EXPECT_EQ(found.gap(), 0);
    double least = std::numeric_limits<double>::infinity();
    for (const auto& [bytes, cost] : many)
      least = std::min(least, cost + BruteForce(few, budget - bytes));
    EXPECT_NEAR(found.cost, least, 1e-13 * least);
  }
}

TEST(Allocate, PriceIsTheSlopeThatTheBudgetBreaks) {
  const std::vector<Unit> units = {MakeUnit("a", {{0, 10}, {10, 0}}),
                                   MakeUnit("b", {{0, 10}, {5, 0}})};
  EXPECT_DOUBLE_EQ(Allocate(units, 4)->price, 2.0);
  EXPECT_DOUBLE_EQ(Allocate(units, 12)->price, 1.0);
  EXPECT_EQ(Allocate(units, 15)->price, 0.0);
}

TEST(Allocate, TakesTheBestUnhulledChoice) {
  // The middle choices lie above the hull: the relaxation never takes them, the optimum does.
  const std::vector<Unit> units = {MakeUnit("a", {{0, 10}, {6, 5.5}, {10, 0}}),
                                   MakeUnit("b", {{0, 10}, {6, 5.4}, {10, 0}})};
  const Result<Allocation> found = Allocate(units, 9);
  ASSERT_TRUE(found.ok());
  EXPECT_DOUBLE_EQ(found->cost, 15.4);
  EXPECT_DOUBLE_EQ(found->lower_bound, 15.4);
}

TEST(Allocate, SaysTheSmallestBudgetWhenNothingFits) {
  const std::vector<Unit> units = {MakeUnit("a", {{30, 1}, {12, 2}}), MakeUnit("b", {{8, 0}})};
  const Result<Allocation> found = Allocate(units, 19);
  ASSERT_EQ(found.status().code(), StatusCode::kUnmet);
  EXPECT_THAT(found.status().message(), HasSubstr("19 bytes"));
  EXPECT_THAT(found.status().message(), HasSubstr("20 bytes"));
  EXPECT_TRUE(Allocate(units, 20).ok());
}

TEST(Allocate, NothingToChooseFromIsEmpty) {
  const Result<Allocation> found = Allocate({}, 5);
  ASSERT_TRUE(found.ok());
  EXPECT_EQ(found->slack, 5);
  EXPECT_EQ(found->cost, 0);
}

TEST(Allocate, RefusesMalformedUnitsByName) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const std::vector<std::vector<std::pair<int64_t, double>>> bad = {
      {}, {{1, nan}}, {{1, -1.0}}, {{-1, 1.0}}, {{1, std::numeric_limits<double>::infinity()}}};
  for (const auto& choices : bad) {
    const Result<Allocation> found = Allocate({MakeUnit("the_unit", choices)}, 10);
    ASSERT_EQ(found.status().code(), StatusCode::kInvalidInput);
    EXPECT_THAT(found.status().message(), HasSubstr("the_unit"));
  }
  Unit twice = MakeUnit("twice", {{1, 1}, {2, 0}});
  twice.choices[1].format = twice.choices[0].format;
  EXPECT_THAT(Allocate({twice}, 10).status().message(), HasSubstr("listed twice"));
  const double largest = std::numeric_limits<double>::max();
  const std::vector<Unit> dear = {MakeUnit("a", {{1, largest}}), MakeUnit("b", {{1, largest}})};
  EXPECT_THAT(Allocate(dear, 10).status().message(), HasSubstr("unit b: the costs"));
  const int64_t huge = int64_t{1} << 52;
  EXPECT_FALSE(Allocate({MakeUnit("a", {{huge, 0}}), MakeUnit("b", {{huge, 0}})}, huge).ok());
}

TEST(Allocate, ProvesAModelOf500UnitsOptimal) {
  const std::vector<Unit> units = ModelUnits(500);
  const int64_t smallest = SmallestBytes(units), largest = LargestBytes(units);
  double before = std::numeric_limits<double>::infinity();
  for (int step = 0; step <= 12; ++step) {
    const int64_t budget = smallest + (largest - smallest) * step / 12;
    const Result<Allocation> found = Allocate(units, budget);
    ASSERT_TRUE(found.ok());
    ExpectConsistent(units, budget, *found);
    EXPECT_EQ(found->gap(), 0);
    EXPECT_LE(found->cost, before);
    before = found->cost;
  }
}

TEST(Allocate, IsTheSameEachTime) {
  const std::vector<Unit> units = ModelUnits(200);
  const int64_t budget = (SmallestBytes(units) + LargestBytes(units)) / 2;
  EXPECT_EQ(Allocate(units, budget)->choice, Allocate(units, budget)->choice);
}

TEST(Knee, IsThePointFarthestBelowTheChord) {
  EXPECT_EQ(Knee({1, 2, 3, 4, 5}, {10, 2, 1.5, 1.2, 1}), 1);
  EXPECT_EQ(Knee({1, 2, 10}, {10, 1, 0}), 1);
}

TEST(Knee, OfThePublishedSweepIsAtFiveAndAHalfBits) {
  const std::vector<double> bpp = {4.5, 4.75, 5, 5.25, 5.5, 6, 7, 8.25};
  const std::vector<double> loss = {948, 704, 604, 532, 477, 393, 276, 180};
  const int knee = Knee(bpp, loss);
  ASSERT_EQ(knee, 4);
  EXPECT_EQ(bpp[static_cast<size_t>(knee)], 5.5);
}

TEST(Knee, DependsOnNeitherScaleNorOrder) {
  EXPECT_EQ(Knee({5, 1, 3, 2, 4}, {1, 10, 1.5, 2, 1.2}), 3);
  EXPECT_EQ(Knee({1e9, 2e9, 3e9, 4e9, 5e9}, {10e-6, 2e-6, 1.5e-6, 1.2e-6, 1e-6}), 1);
}

TEST(Knee, NeedsThreePointsAndAFall) {
  EXPECT_EQ(Knee({}, {}), -1);
  EXPECT_EQ(Knee({1, 2}, {2, 1}), -1);
  EXPECT_EQ(Knee({1, 2, 3}, {1, 1, 1}), -1);
  EXPECT_EQ(Knee({1, 1, 1}, {3, 2, 1}), -1);
}

}  // namespace
}  // namespace prismaquant

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
  EXPECT_NEAR(found.cost, cost, 1e-12 * (1 + cost));
  EXPECT_LE(found.lower_bound, found.cost);
  EXPECT_GE(found.price, 0);
}

enum class Kind { kFalling, kAnything, kTies, kHuge };

std::vector<Unit> RandomUnits(Kind kind, std::mt19937& random) {
  const auto integer = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  std::vector<Unit> units;
  const int64_t count = integer(1, 7);
  for (int64_t u = 0; u < count; ++u) {
    std::vector<std::pair<int64_t, double>> choices;
    for (int64_t c = integer(1, 4); c > 0; --c) {
      const int64_t scale = kind == Kind::kHuge ? int64_t{1} << 44 : 1;
      int64_t bytes = integer(kind == Kind::kTies ? 1 : 0, kind == Kind::kTies ? 4 : 40) * scale;
      if (kind == Kind::kHuge) bytes += integer(0, 3);
      double cost = static_cast<double>(integer(0, 20)) / (kind == Kind::kTies ? 10 : 7);
      if (kind == Kind::kFalling) cost = 50.0 / static_cast<double>(1 + bytes);
      choices.emplace_back(bytes, cost);
    }
    units.push_back(MakeUnit(fmt::format("u{}", u), choices));
  }
  return units;
}

class RandomCases : public ::testing::TestWithParam<Kind> {};

TEST_P(RandomCases, EqualBruteForceAtEveryBudget) {
  std::mt19937 random(7);
  for (int round = 0; round < 400; ++round) {
    const std::vector<Unit> units = RandomUnits(GetParam(), random);
    const int64_t smallest = SmallestBytes(units), largest = LargestBytes(units);
    for (const int64_t budget : {smallest, smallest + (largest - smallest) / 5,
                                 (smallest + largest) / 2, largest - 1, largest, largest + 100}) {
      if (budget < smallest) continue;
      const Result<Allocation> found = Allocate(units, budget);
      ASSERT_TRUE(found.ok()) << found.status().message();
      ExpectConsistent(units, budget, *found);
      EXPECT_NEAR(found->cost, BruteForce(units, budget), 1e-9);
      EXPECT_NEAR(found->gap(), 0, 1e-12);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Allocate, RandomCases,
                         ::testing::Values(Kind::kFalling, Kind::kAnything, Kind::kTies,
                                           Kind::kHuge));

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
  const int64_t huge = int64_t{1} << 52;
  EXPECT_FALSE(Allocate({MakeUnit("a", {{huge, 0}}), MakeUnit("b", {{huge, 0}})}, huge).ok());
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

TEST(Knee, NeedsThreePointsAndAFall) {
  EXPECT_EQ(Knee({1, 2}, {2, 1}), -1);
  EXPECT_EQ(Knee({1, 2, 3}, {1, 1, 1}), -1);
  EXPECT_EQ(Knee({1, 1, 1}, {3, 2, 1}), -1);
}

}  // namespace
}  // namespace prismaquant

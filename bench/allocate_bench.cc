// The exact allocation of 500 units with four formats each, and of 400 units whose costs are a
// constant minus their bytes, which passes the state limit. The argument is the budget's place
// between the smallest and the largest allocation, in percent; `gap` is relative to the cost.
// Then all of Qwen3.6-27B with five formats: one budget (the argument, in hundredths of a bit per
// weight), the published sweep of eight, and the smallest plan for a bound on the loss (the
// argument, in percent of the loss of the smallest allocation).

#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "allocate/allocate.h"
#include "allocate/plan.h"
#include "allocate/qwen3_6_27b.h"

namespace prismaquant {
namespace {

constexpr int kUnits = 500;

std::vector<Unit> MakeUnits() {
  std::mt19937 random(3);
  std::lognormal_distribution<double> loss(0, 1.5);
  const int64_t sizes[] = {3 * 5120 * 1024, 5120 * 6144, 2 * 5120 * 17408, 5120 * 17408};
  std::vector<Unit> units;
  for (int u = 0; u < kUnits; ++u) {
    const int64_t weights = sizes[random() % 4];
    const double base = loss(random) * 1e-3;
    units.push_back({.name = fmt::format("u{}", u),
                     .weights = weights,
                     .choices = {{"nvfp4", weights * 9 / 16 + 8, base},
                                 {"fp8", weights + 2 * 5120, base * 0.08},
                                 {"mxfp8", weights * 33 / 32, base * 0.09},
                                 {"bf16", 2 * weights, 0}}});
  }
  return units;
}

std::vector<Unit> SubsetSumUnits() {
  std::mt19937 random(3);
  std::uniform_int_distribution<int64_t> bytes(1 << 20, 1 << 30);
  std::vector<Unit> units;
  for (int u = 0; u < 400; ++u) {
    Unit unit{.name = fmt::format("u{}", u), .weights = 0, .choices = {}};
    for (const char* format : {"a", "b", "c", "d", "e"}) {
      Choice& choice = unit.choices.emplace_back();
      choice.format = format;
      choice.bytes = bytes(random);
      choice.cost = static_cast<double>((1 << 30) - choice.bytes);
    }
    units.push_back(unit);
  }
  return units;
}

void AllocateAt(benchmark::State& state, const std::vector<Unit>& units) {
  const int64_t smallest = SmallestBytes(units);
  int64_t largest = 0;
  for (const Unit& unit : units) {
    int64_t most = 0;
    for (const Choice& choice : unit.choices) most = std::max(most, choice.bytes);
    largest += most;
  }
  const int64_t budget = smallest + (largest - smallest) * state.range(0) / 100;
  double gap = 0;
  for (auto _ : state) {
    const Allocation found = Allocate(units, budget).value();
    gap = found.gap() / found.cost;
  }
  state.counters["gap"] = gap;
}

void AllocateModel(benchmark::State& state) { AllocateAt(state, MakeUnits()); }
void AllocateSubsetSum(benchmark::State& state) { AllocateAt(state, SubsetSumUnits()); }

constexpr unsigned kSeed = 27;

Planner Qwen27bPlanner() {
  return Planner::Make(Qwen27bUnits(kSeed), Qwen27bRules(), /*fixed_bytes=*/0).value();
}

double RelativeGap(const PlannedAllocation& plan) {
  return plan.cost > 0 ? (plan.cost - plan.lower_bound) / plan.cost : 0;
}

void Qwen27bBudget(benchmark::State& state) {
  const Planner planner = Qwen27bPlanner();
  const Budget budget{.kind = Budget::Kind::kBpp, .bpp = static_cast<double>(state.range(0)) / 100};
  double gap = 0;
  for (auto _ : state) gap = RelativeGap(planner.Plan(budget).value());
  state.counters["gap"] = gap;
}

void Qwen27bSweep(benchmark::State& state) {
  const Planner planner = Qwen27bPlanner();
  double gap = 0;
  for (auto _ : state) {
    const auto sweep = planner.Sweep({4.5, 4.75, 5, 5.25, 5.5, 6, 7, 8.25}).value();
    for (const PlannedAllocation& point : sweep) gap = std::max(gap, RelativeGap(point));
  }
  state.counters["gap"] = gap;
}

void Qwen27bMaxKl(benchmark::State& state) {
  const Planner planner = Qwen27bPlanner();
  const Budget smallest{.kind = Budget::Kind::kBpp, .bpp = planner.SmallestBpp()};
  Budget budget{.kind = Budget::Kind::kMaxKl};
  budget.max_kl = planner.Plan(smallest)->cost * static_cast<double>(state.range(0)) / 100;
  int64_t gap = 0;
  for (auto _ : state) {
    const PlannedAllocation plan = planner.Plan(budget).value();
    gap = plan.bytes - plan.bytes_bound;
  }
  state.counters["gap_bytes"] = static_cast<double>(gap);
}

BENCHMARK(Qwen27bBudget)->Arg(450)->Arg(475)->Arg(550)->Arg(825)->Unit(benchmark::kMillisecond);
BENCHMARK(Qwen27bSweep)->Unit(benchmark::kMillisecond);
BENCHMARK(Qwen27bMaxKl)->Arg(5)->Arg(30)->Arg(70)->Unit(benchmark::kMillisecond);
BENCHMARK(AllocateModel)->Arg(5)->Arg(25)->Arg(50)->Arg(75)->Unit(benchmark::kMillisecond);
BENCHMARK(AllocateSubsetSum)
    ->Arg(10)
    ->Arg(50)
    ->Arg(90)
    ->Iterations(1)
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace prismaquant

BENCHMARK_MAIN();

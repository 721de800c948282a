// The exact allocation of 500 units with four formats each. The argument is the budget's place
// between the smallest and the largest allocation, in percent.

#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include <random>
#include <string>
#include <vector>

#include "allocate/allocate.h"

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

void AllocateModel(benchmark::State& state) {
  const std::vector<Unit> units = MakeUnits();
  const int64_t smallest = SmallestBytes(units);
  int64_t largest = 0;
  for (const Unit& unit : units) largest += unit.choices.back().bytes;
  const int64_t budget = smallest + (largest - smallest) * state.range(0) / 100;
  double gap = 0;
  for (auto _ : state) gap = Allocate(units, budget)->gap();
  state.counters["gap"] = gap;
}

BENCHMARK(AllocateModel)->Arg(5)->Arg(25)->Arg(50)->Arg(75)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace prismaquant

BENCHMARK_MAIN();

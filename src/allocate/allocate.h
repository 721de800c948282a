#ifndef PRISMAQUANT_ALLOCATE_ALLOCATE_H_
#define PRISMAQUANT_ALLOCATE_ALLOCATE_H_

// Allocation: choose one format per unit so that the predicted loss is least and the bytes stay
// within an integer budget, or so that the bytes are fewest and the loss stays within a bound: the
// multiple-choice knapsack problem (MCKP), solved exactly and with its certificate. Pure functions
// of their arguments; no weights, no files.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"

namespace prismaquant {

struct Choice {
  std::string format;
  int64_t bytes = 0;  // what the budget counts
  double cost = 0;    // predicted loss in nats per token, finite and >= 0
};

struct Unit {
  std::string name;
  int64_t weights = 0;
  std::vector<Choice> choices;  // at least one
};

struct Allocation {
  std::vector<int> choice;  // per unit, index into Unit::choices
  int64_t bytes = 0;        // <= budget
  double cost = 0;          // sum of chosen costs
  // No allocation within the budget costs less (rounding of sums aside); equals cost when proven.
  double lower_bound = 0;
  double gap() const { return cost - lower_bound; }
  int64_t slack = 0;  // budget - bytes; no single lower-cost choice fits into it
  double price = 0;   // nats per byte: the multiplier of the budget in the linear relaxation
};

// States that the exact stage may hold, of 24 bytes each.
constexpr size_t kMaxStates = 20'000'000;

// Least cost within `budget` bytes, the same for the same arguments. A budget below the smallest
// sum of bytes is kUnmet and says that sum. Past `max_states` the answer is the best one found,
// with its true gap.
Result<Allocation> Allocate(const std::vector<Unit>& units, int64_t budget,
                            size_t max_states = kMaxStates);

struct SmallestAllocation {
  // Its slack is 0: the budget is its own bytes.
  Allocation allocation;
  // No allocation of fewer bytes costs at most what was asked (rounding of sums aside); equals the
  // allocation's bytes when proven.
  int64_t bytes_bound = 0;
};

// Fewest bytes at a cost of at most `most_cost`, and of all allocations of these bytes the least
// cost. A bound below the least cost of all allocations is kUnmet and says that cost with every
// digit. Past `max_states` as Allocate.
Result<SmallestAllocation> AllocateSmallest(const std::vector<Unit>& units, double most_cost,
                                            size_t max_states = kMaxStates);

// Bytes of the smallest allocation.
int64_t SmallestBytes(const std::vector<Unit>& units);

// Kneedle (Satopaa et al. 2011) for a decreasing curve: index of the point farthest below the chord
// of the normalised curve, -1 if there are fewer than three points.
int Knee(const std::vector<double>& x, const std::vector<double>& y);

}  // namespace prismaquant

#endif  // PRISMAQUANT_ALLOCATE_ALLOCATE_H_

#include "allocate/allocate.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>
#include <tuple>
#include <utility>

namespace prismaquant {
namespace {

// A choice worth considering: no other choice of its unit is as small and as good.
struct Option {
  int index = 0;      // into Unit::choices
  int64_t bytes = 0;  // above the smallest choice of the unit, so that prices multiply no offset
  double cost = 0;    // in units of 2^CostExponent
};

struct Item {
  std::vector<Option> options;  // bytes rising, cost falling
  std::vector<int> hull;        // options on the lower convex hull
};

double Slope(const Option& small, const Option& large) {
  return (small.cost - large.cost) / static_cast<double>(large.bytes - small.bytes);
}

// One step along a hull: more bytes for less cost.
struct Step {
  int item = 0;
  int to = 0;  // option
  int64_t bytes = 0;
  double slope = 0;
};

// Binary exponent of the largest cost: scaled by it, no product or quotient leaves double's range.
int CostExponent(const std::vector<Unit>& units) {
  double largest = 0;
  for (const Unit& unit : units) {
    for (const Choice& choice : unit.choices) largest = std::max(largest, choice.cost);
  }
  return largest > 0 ? std::ilogb(largest) : 0;
}

Item MakeItem(const Unit& unit, int exponent) {
  Item item;
  std::vector<Option> all;
  int64_t smallest = std::numeric_limits<int64_t>::max();
  for (const Choice& choice : unit.choices) smallest = std::min(smallest, choice.bytes);
  for (size_t i = 0; i < unit.choices.size(); ++i) {
    all.push_back({static_cast<int>(i), unit.choices[i].bytes - smallest,
                   std::scalbn(unit.choices[i].cost, -exponent)});
  }
  std::sort(all.begin(), all.end(), [](const Option& a, const Option& b) {
    return std::tie(a.bytes, a.cost, a.index) < std::tie(b.bytes, b.cost, b.index);
  });
  for (const Option& option : all) {
    if (item.options.empty() || option.cost < item.options.back().cost)
      item.options.push_back(option);
  }
  for (int i = 0; i < static_cast<int>(item.options.size()); ++i) {
    while (item.hull.size() >= 2) {
      const Option& a = item.options[item.hull[item.hull.size() - 2]];
      const Option& b = item.options[item.hull.back()];
      if (Slope(a, b) > Slope(b, item.options[i])) break;
      item.hull.pop_back();
    }
    item.hull.push_back(i);
  }
  return item;
}

// The linear relaxation: hull steps taken by falling slope until the budget breaks one of them.
struct Relaxation {
  std::vector<int> option;  // per item, the integral part
  std::vector<int> upper;   // the same with the broken step taken whole
  int64_t over = 0;         // bytes of `upper` beyond the budget
  double price = 0;         // slope of the broken step; 0 if everything fits
};

Relaxation Relax(const std::vector<Item>& items, int64_t budget) {
  std::vector<Step> steps;
  Relaxation r;
  for (size_t i = 0; i < items.size(); ++i) {
    const Item& item = items[i];
    r.option.push_back(item.hull.front());
    for (size_t h = 1; h < item.hull.size(); ++h) {
      const Option& a = item.options[item.hull[h - 1]];
      const Option& b = item.options[item.hull[h]];
      steps.push_back({static_cast<int>(i), item.hull[h], b.bytes - a.bytes, Slope(a, b)});
    }
  }
  std::stable_sort(steps.begin(), steps.end(),
                   [](const Step& a, const Step& b) { return a.slope > b.slope; });
  int64_t bytes = 0;
  for (const Step& step : steps) {
    if (bytes + step.bytes > budget) {
      r.upper = r.option;
      r.upper[step.item] = step.to;
      r.over = bytes + step.bytes - budget;
      r.price = step.slope;
      return r;
    }
    bytes += step.bytes;
    r.option[step.item] = step.to;
  }
  r.upper = r.option;
  return r;
}

struct Incumbent {
  std::vector<int> option;
  int64_t bytes = 0;
  double cost = 0;
};

double CostOf(const std::vector<Item>& items, const std::vector<int>& option) {
  double cost = 0;
  for (size_t i = 0; i < items.size(); ++i) cost += items[i].options[option[i]].cost;
  return cost;
}

// Repeatedly the fitting upgrade that gains most per byte, until none fits.
Incumbent Fill(const std::vector<Item>& items, int64_t budget, std::vector<int> option) {
  Incumbent best{.option = std::move(option), .bytes = 0, .cost = 0};
  for (size_t i = 0; i < items.size(); ++i) best.bytes += items[i].options[best.option[i]].bytes;
  while (true) {
    double best_slope = 0;
    int item = -1, target = -1;
    for (size_t i = 0; i < items.size(); ++i) {
      const Option& now = items[i].options[best.option[i]];
      for (size_t o = best.option[i] + 1; o < items[i].options.size(); ++o) {
        const Option& next = items[i].options[o];
        if (best.bytes + next.bytes - now.bytes > budget) break;
        const double slope = Slope(now, next);
        if (slope > best_slope) {
          best_slope = slope;
          item = static_cast<int>(i);
          target = static_cast<int>(o);
        }
      }
    }
    if (item < 0) break;
    best.bytes += items[item].options[target].bytes - items[item].options[best.option[item]].bytes;
    best.option[item] = target;
  }
  best.cost = CostOf(items, best.option);
  return best;
}

// The exact stage. At the price p of the relaxation every option has a reduced cost r >= 0, what it
// loses against the option of its item in `upper`, and every allocation costs
//   dual + sum of r + p * (unused bytes),   dual = cost of `upper` + p * over.
// So options and partial allocations whose sum reaches the incumbent drop out, and the rest is
// searched by dynamic programming over (bytes, cost), items with the largest stakes first. All
// terms that are compared are sums of parts no larger than the incumbent; `tolerance_` covers their
// rounding.
class Core {
 public:
  Core(const std::vector<Item>& items, int64_t budget, const Relaxation& relaxation,
       Incumbent incumbent, size_t max_states)
      : items_(items),
        budget_(budget),
        max_states_(std::max<size_t>(max_states, 1)),
        upper_(relaxation.upper),
        price_(relaxation.price),
        over_price_(price_ * static_cast<double>(relaxation.over)),
        tolerance_(8 * std::numeric_limits<double>::epsilon() *
                   static_cast<double>(items.size() + 1)),
        best_(std::move(incumbent)) {}

  // True if the incumbent is now proven optimal. An incumbent far above the optimum makes for
  // coarse rounding, so a search that halved it is repeated from what it found.
  bool Solve() {
    while (true) {
      const double before = best_.cost;
      if (!Improve()) return false;
      if (best_.cost >= before / 2) return true;
    }
  }

  const Incumbent& best() const { return best_; }
  // No allocation costs less.
  double lower_bound() const { return std::min(best_.cost, Dual() * (1 - tolerance_)); }

 private:
  struct State {
    int64_t bytes = 0;    // of the items decided so far
    double cost = 0;      // of the same
    int32_t parent = -1;  // in the previous layer
    int32_t option = 0;
  };
  // What a layer of states must leave for, or expect from, the items after it.
  struct Rest {
    int64_t least = 0, most = 0;  // bytes
    double upper_cost = 0;        // of their options in `upper`, and p * over
  };

  double Dual() const { return CostOf(items_, upper_) + over_price_; }

  double Reduced(size_t item, const Option& option) const {
    const Option& upper = items_[item].options[upper_[item]];
    const double reduced =
        option.cost - upper.cost + price_ * static_cast<double>(option.bytes - upper.bytes);
    return std::max(0.0, reduced);
  }

  bool Improve() {
    limit_ = best_.cost * (1 + tolerance_);
    if (Dual() * (1 + tolerance_) >= best_.cost) return true;
    return Search(Undecided());
  }

  // Items that keep more than one option; the others are fixed to the one in `upper`.
  std::vector<int> Undecided() {
    std::vector<int> order;
    std::vector<int64_t> stake(items_.size(), 0);
    kept_.assign(items_.size(), {});
    const double dual = Dual();
    for (size_t i = 0; i < items_.size(); ++i) {
      const auto& options = items_[i].options;
      for (int o = 0; o < static_cast<int>(options.size()); ++o) {
        if (o == upper_[i] || dual + Reduced(i, options[o]) < limit_) kept_[i].push_back(o);
      }
      if (kept_[i].size() > 1) order.push_back(static_cast<int>(i));
      stake[i] = options[kept_[i].back()].bytes - options[kept_[i].front()].bytes;
    }
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return stake[a] > stake[b]; });
    return order;
  }

  bool Search(const std::vector<int>& order) {
    if (order.empty()) return true;
    State start;
    for (size_t i = 0; i < items_.size(); ++i) {
      if (kept_[i].size() > 1) continue;
      start.bytes += items_[i].options[kept_[i].front()].bytes;
      start.cost += items_[i].options[kept_[i].front()].cost;
    }
    std::vector<Rest> rest(order.size() + 1);
    rest.back().upper_cost = over_price_;
    for (size_t k = order.size(); k-- > 0;) {
      const auto& options = items_[order[k]].options;
      rest[k].least = rest[k + 1].least + options[kept_[order[k]].front()].bytes;
      rest[k].most = rest[k + 1].most + options[kept_[order[k]].back()].bytes;
      rest[k].upper_cost = rest[k + 1].upper_cost + options[upper_[order[k]]].cost;
    }
    std::vector<std::vector<State>> layers = {{start}};
    size_t states = 1;
    int64_t upper_bytes = start.bytes;
    for (size_t k = 0; k < order.size(); ++k) {
      upper_bytes += items_[order[k]].options[upper_[order[k]]].bytes;
      layers.push_back(
          Extend(layers.back(), order[k], rest[k + 1], upper_bytes, max_states_ - states));
      states += layers.back().size();
      if (states >= max_states_) return false;
      if (layers.back().empty()) return true;
    }
    Take(order, layers);
    return true;
  }

  // Decides one more item: every state with every option kept, in order of bytes, without those
  // that do not fit, cannot beat the incumbent, or have another with no more bytes and no more
  // cost. Stops after `most_states`.
  std::vector<State> Extend(const std::vector<State>& states, int item, const Rest& rest,
                            int64_t upper_bytes, size_t most_states) const {
    const std::vector<int>& kept = kept_[item];
    std::vector<size_t> position(kept.size(), 0);
    std::vector<State> next;
    double lowest = std::numeric_limits<double>::infinity();
    while (next.size() < most_states) {
      State state;
      size_t from = kept.size();
      for (size_t c = 0; c < kept.size(); ++c) {
        if (position[c] == states.size()) continue;
        const State& parent = states[position[c]];
        const Option& option = items_[item].options[kept[c]];
        const int64_t bytes = parent.bytes + option.bytes;
        const double cost = parent.cost + option.cost;
        if (from < kept.size() && std::tie(state.bytes, state.cost) <= std::tie(bytes, cost))
          continue;
        state = {bytes, cost, static_cast<int32_t>(position[c]), kept[c]};
        from = c;
      }
      if (from == kept.size() || state.bytes + rest.least > budget_) break;
      ++position[from];
      if (state.cost >= lowest || state.cost >= limit_) continue;
      const int64_t unused = std::max<int64_t>(0, budget_ - state.bytes - rest.most);
      const int64_t paid = state.bytes - upper_bytes + unused;
      if (state.cost + rest.upper_cost + price_ * static_cast<double>(paid) >= limit_) continue;
      lowest = state.cost;
      next.push_back(state);
    }
    return next;
  }

  // The last complete state is the cheapest one; it replaces an incumbent that it beats.
  void Take(const std::vector<int>& order, const std::vector<std::vector<State>>& layers) {
    std::vector<int> option = upper_;
    const State* state = &layers.back().back();
    for (size_t k = order.size(); k-- > 0;) {
      option[order[k]] = state->option;
      state = &layers[k][state->parent];
    }
    Incumbent found = Fill(items_, budget_, std::move(option));
    if (std::tie(found.cost, found.bytes) < std::tie(best_.cost, best_.bytes))
      best_ = std::move(found);
  }

  const std::vector<Item>& items_;
  int64_t budget_;
  size_t max_states_;
  std::vector<int> upper_;
  double price_;
  double over_price_;
  double tolerance_;  // relative
  Incumbent best_;
  double limit_ = 0;                    // what costs this much does not beat the incumbent
  std::vector<std::vector<int>> kept_;  // per item, options that an improvement may use
};

Status Validate(const std::vector<Unit>& units) {
  int64_t most = 0;
  double most_cost = 0;
  for (const Unit& unit : units) {
    if (unit.choices.empty())
      return Status::InvalidInput(fmt::format("unit {}: has no choice", unit.name));
    std::set<std::string> formats;
    int64_t largest = 0;
    double dearest = 0;
    for (const Choice& choice : unit.choices) {
      if (!std::isfinite(choice.cost) || choice.cost < 0 || choice.bytes < 0) {
        return Status::InvalidInput(fmt::format(
            "unit {}: format {} has {} bytes and cost {}, expected both finite and not negative",
            unit.name, choice.format, choice.bytes, choice.cost));
      }
      if (!formats.insert(choice.format).second) {
        return Status::InvalidInput(
            fmt::format("unit {}: format {} is listed twice", unit.name, choice.format));
      }
      largest = std::max(largest, choice.bytes);
      dearest = std::max(dearest, choice.cost);
    }
    if (__builtin_add_overflow(most, largest, &most) || most > (int64_t{1} << 52)) {
      return Status::InvalidInput(
          fmt::format("unit {}: the bytes of all units pass 2^52", unit.name));
    }
    most_cost += dearest;
    if (!std::isfinite(most_cost)) {
      return Status::InvalidInput(
          fmt::format("unit {}: the costs of all units pass the largest double", unit.name));
    }
  }
  return {};
}

}  // namespace

int64_t SmallestBytes(const std::vector<Unit>& units) {
  int64_t total = 0;
  for (const Unit& unit : units) {
    int64_t smallest = std::numeric_limits<int64_t>::max();
    for (const Choice& choice : unit.choices) smallest = std::min(smallest, choice.bytes);
    total += unit.choices.empty() ? 0 : smallest;
  }
  return total;
}

Result<Allocation> Allocate(const std::vector<Unit>& units, int64_t budget, size_t max_states) {
  PQ_RETURN_IF_ERROR(Validate(units));
  const int64_t smallest = SmallestBytes(units);
  if (budget < smallest) {
    return Status::Unmet(
        fmt::format("the budget of {} bytes cannot be met, the smallest allocation has {} bytes",
                    budget, smallest));
  }
  const int exponent = CostExponent(units);
  std::vector<Item> items;
  for (const Unit& unit : units) items.push_back(MakeItem(unit, exponent));
  const int64_t room = budget - smallest;
  const Relaxation relaxation = Relax(items, room);
  Core core(items, room, relaxation, Fill(items, room, relaxation.option), max_states);
  const bool proven = core.Solve();

  Allocation result;
  for (size_t i = 0; i < items.size(); ++i) {
    result.choice.push_back(items[i].options[core.best().option[i]].index);
    result.cost += units[i].choices[result.choice.back()].cost;
  }
  result.bytes = smallest + core.best().bytes;
  result.lower_bound =
      proven ? result.cost : std::min(result.cost, std::scalbn(core.lower_bound(), exponent));
  result.slack = budget - result.bytes;
  result.price = std::scalbn(relaxation.price, exponent);
  return result;
}

// The least cost within a budget falls as the budget grows, so the least sufficient budget is found
// by halving. A budget is ruled out by the lower bound of its solution.
Result<SmallestAllocation> AllocateSmallest(const std::vector<Unit>& units, double most_cost,
                                            size_t max_states) {
  PQ_ASSIGN_OR_RETURN(Allocation best,
                      Allocate(units, std::numeric_limits<int64_t>::max(), max_states));
  if (!(best.cost <= most_cost)) {
    return Status::Unmet(
        fmt::format("--max-kl {} cannot be met: the least predicted KL is {} nats per token",
                    most_cost, best.cost));
  }
  int64_t bound = SmallestBytes(units);
  int64_t insufficient = bound - 1;
  while (insufficient + 1 < best.bytes) {
    const int64_t budget = insufficient + (best.bytes - insufficient) / 2;
    PQ_ASSIGN_OR_RETURN(Allocation found, Allocate(units, budget, max_states));
    if (found.cost <= most_cost) {
      best = std::move(found);
      continue;
    }
    insufficient = budget;
    if (found.lower_bound > most_cost) bound = budget + 1;
  }
  PQ_ASSIGN_OR_RETURN(const Allocation last, Allocate(units, best.bytes, max_states));
  best.price = last.price;
  best.slack = 0;
  return SmallestAllocation{std::move(best), bound};
}

int Knee(const std::vector<double>& x, const std::vector<double>& y) {
  if (x.size() < 3 || x.size() != y.size()) return -1;
  const auto [x_low, x_high] = std::minmax_element(x.begin(), x.end());
  const auto [y_low, y_high] = std::minmax_element(y.begin(), y.end());
  if (*x_high == *x_low || *y_high == *y_low) return -1;
  int knee = 0;
  double deepest = std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < x.size(); ++i) {
    const double difference =
        (y[i] - *y_low) / (*y_high - *y_low) - (1 - (x[i] - *x_low) / (*x_high - *x_low));
    if (difference < deepest) {
      deepest = difference;
      knee = static_cast<int>(i);
    }
  }
  return knee;
}

}  // namespace prismaquant

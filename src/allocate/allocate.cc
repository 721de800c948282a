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

// States that the exact stage may hold; beyond this the answer is the best one found, with its true
// gap.
constexpr size_t kMaxStates = 20'000'000;

// A choice worth considering: no other choice of its unit is as small and as good.
struct Option {
  int index = 0;  // into Unit::choices
  int64_t bytes = 0;
  double cost = 0;
};

struct Item {
  std::vector<Option> options;  // bytes rising, cost falling
  std::vector<int> hull;        // options on the lower convex hull
};

// One step along a hull: more bytes for less cost.
struct Step {
  int item = 0;
  int from = 0, to = 0;  // positions in the hull
  int64_t bytes = 0;
  double gain = 0;
  double slope() const { return gain / static_cast<double>(bytes); }
};

Item MakeItem(const Unit& unit) {
  Item item;
  std::vector<Option> all;
  for (size_t i = 0; i < unit.choices.size(); ++i) {
    all.push_back({static_cast<int>(i), unit.choices[i].bytes, unit.choices[i].cost});
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
      const Option& c = item.options[i];
      const double along = (a.cost - b.cost) * static_cast<double>(c.bytes - b.bytes);
      if (along > (b.cost - c.cost) * static_cast<double>(b.bytes - a.bytes)) break;
      item.hull.pop_back();
    }
    item.hull.push_back(i);
  }
  return item;
}

// The linear relaxation: hull steps taken by falling slope until the budget breaks one of them.
struct Relaxation {
  std::vector<int> option;  // per item, the integral part
  int64_t bytes = 0;        // of the integral part
  double bound = 0;         // least cost of the relaxation
  double price = 0;         // slope of the broken step; 0 if everything fits
};

Relaxation Relax(const std::vector<Item>& items, int64_t budget) {
  std::vector<Step> steps;
  Relaxation r;
  for (size_t i = 0; i < items.size(); ++i) {
    const Item& item = items[i];
    r.option.push_back(item.hull.front());
    r.bytes += item.options[item.hull.front()].bytes;
    for (size_t h = 1; h < item.hull.size(); ++h) {
      const Option& a = item.options[item.hull[h - 1]];
      const Option& b = item.options[item.hull[h]];
      steps.push_back({static_cast<int>(i), static_cast<int>(h - 1), static_cast<int>(h),
                       b.bytes - a.bytes, a.cost - b.cost});
    }
  }
  std::stable_sort(steps.begin(), steps.end(),
                   [](const Step& a, const Step& b) { return a.slope() > b.slope(); });
  double fraction_gain = 0;
  for (const Step& step : steps) {
    if (r.bytes + step.bytes > budget) {
      r.price = step.slope();
      fraction_gain = r.price * static_cast<double>(budget - r.bytes);
      break;
    }
    r.bytes += step.bytes;
    r.option[step.item] = items[step.item].hull[step.to];
  }
  for (size_t i = 0; i < items.size(); ++i) r.bound += items[i].options[r.option[i]].cost;
  r.bound -= fraction_gain;
  return r;
}

// A feasible choice: the relaxation's integral part, then repeatedly the fitting upgrade that gains
// most per byte.
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

Incumbent Fill(const std::vector<Item>& items, const Relaxation& relaxation, int64_t budget) {
  Incumbent best{.option = relaxation.option, .bytes = relaxation.bytes, .cost = 0};
  while (true) {
    double best_slope = 0;
    int item = -1, target = -1;
    for (size_t i = 0; i < items.size(); ++i) {
      const Option& now = items[i].options[best.option[i]];
      for (size_t o = best.option[i] + 1; o < items[i].options.size(); ++o) {
        const Option& next = items[i].options[o];
        if (best.bytes + next.bytes - now.bytes > budget) break;
        const double slope = (now.cost - next.cost) / static_cast<double>(next.bytes - now.bytes);
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

// The exact stage. With the price of the relaxation every option has a reduced cost r >= 0 (what it
// loses against its item's best at that price). A solution better than the incumbent spends less
// than the gap on reduced costs and unused bytes together, so options with r >= gap drop out, and
// the rest is searched by dynamic programming over (bytes above the relaxed choice, reduced cost),
// items with the largest stakes first, keeping undominated states within the gap.
class Core {
 public:
  Core(const std::vector<Item>& items, int64_t budget, const Relaxation& relaxation,
       Incumbent incumbent)
      : items_(items), budget_(budget), price_(relaxation.price), best_(std::move(incumbent)) {
    double dual = -price_ * static_cast<double>(budget);
    for (size_t i = 0; i < items_.size(); ++i) {
      double lowest = std::numeric_limits<double>::infinity();
      for (const Option& option : items_[i].options) lowest = std::min(lowest, Penalised(option));
      lowest_.push_back(lowest);
      dual += lowest;
    }
    dual_ = dual;
  }

  // True if the incumbent is now proven optimal.
  bool Solve() {
    const double gap = best_.cost - dual_;
    const double tolerance = 1e-12 * std::max(1e-300, std::abs(best_.cost) + std::abs(dual_));
    if (gap <= tolerance) return true;
    std::vector<int> order = Undecided(gap);
    if (order.empty()) return Finish({}, {});
    return Search(order, gap);
  }

  const Incumbent& best() const { return best_; }
  double dual() const { return dual_; }

 private:
  struct State {
    int64_t bytes = 0;    // above the fixed part
    double reduced = 0;   // reduced costs so far
    int32_t parent = -1;  // in the previous layer
    int16_t option = 0;
  };

  double Penalised(const Option& option) const {
    return option.cost + price_ * static_cast<double>(option.bytes);
  }
  double Reduced(int item, const Option& option) const { return Penalised(option) - lowest_[item]; }

  // Items that keep more than one option; the others are fixed to their only one.
  std::vector<int> Undecided(double gap) {
    std::vector<int> order;
    std::vector<double> stake(items_.size(), 0);
    kept_.assign(items_.size(), {});
    for (size_t i = 0; i < items_.size(); ++i) {
      for (size_t o = 0; o < items_[i].options.size(); ++o) {
        const double reduced = Reduced(static_cast<int>(i), items_[i].options[o]);
        if (reduced < gap) kept_[i].push_back(static_cast<int>(o));
      }
      if (kept_[i].size() > 1) order.push_back(static_cast<int>(i));
      const auto& options = items_[i].options;
      stake[i] =
          static_cast<double>(options[kept_[i].back()].bytes - options[kept_[i].front()].bytes);
    }
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return stake[a] > stake[b]; });
    return order;
  }

  // Bytes of the items before (largest = false: smallest options) the search order's tail.
  bool Search(const std::vector<int>& order, double gap) {
    int64_t fixed_bytes = 0;
    std::vector<char> open(items_.size(), 0);
    for (const int i : order) open[i] = 1;
    for (size_t i = 0; i < items_.size(); ++i) {
      if (!open[i]) fixed_bytes += items_[i].options[kept_[i].front()].bytes;
    }
    std::vector<int64_t> least(order.size() + 1, 0), most(order.size() + 1, 0);
    for (size_t k = order.size(); k-- > 0;) {
      const auto& options = items_[order[k]].options;
      least[k] = least[k + 1] + options[kept_[order[k]].front()].bytes;
      most[k] = most[k + 1] + options[kept_[order[k]].back()].bytes;
    }
    const int64_t room = budget_ - fixed_bytes;
    layers_.clear();
    layers_.push_back({State{}});
    size_t states = 1;
    for (size_t k = 0; k < order.size(); ++k) {
      layers_.push_back(Extend(layers_.back(), order[k], room, least[k + 1], most[k + 1], gap));
      states += layers_.back().size();
      if (states > kMaxStates) return false;
      if (layers_.back().empty()) return true;
    }
    return Finish(order, layers_.back());
  }

  std::vector<State> Extend(const std::vector<State>& states, int item, int64_t room,
                            int64_t least_left, int64_t most_left, double gap) const {
    std::vector<State> next;
    for (size_t s = 0; s < states.size(); ++s) {
      for (const int o : kept_[item]) {
        const Option& option = items_[item].options[o];
        State state{states[s].bytes + option.bytes, states[s].reduced + Reduced(item, option),
                    static_cast<int32_t>(s), static_cast<int16_t>(o)};
        if (state.bytes + least_left > room) continue;
        const int64_t unused = std::max<int64_t>(0, room - state.bytes - most_left);
        if (state.reduced + price_ * static_cast<double>(unused) >= gap) continue;
        next.push_back(state);
      }
    }
    return Undominated(std::move(next));
  }

  // A state is dominated by one with no more bytes whose true cost so far, reduced - price * bytes,
  // is no higher.
  std::vector<State> Undominated(std::vector<State> states) const {
    const auto cost = [&](const State& s) {
      return s.reduced - price_ * static_cast<double>(s.bytes);
    };
    std::sort(states.begin(), states.end(), [&](const State& a, const State& b) {
      if (a.bytes != b.bytes) return a.bytes < b.bytes;
      if (a.reduced != b.reduced) return a.reduced < b.reduced;
      return std::tie(a.parent, a.option) < std::tie(b.parent, b.option);
    });
    std::vector<State> kept;
    double lowest = std::numeric_limits<double>::infinity();
    for (const State& state : states) {
      if (cost(state) >= lowest) continue;
      lowest = cost(state);
      kept.push_back(state);
    }
    return kept;
  }

  // Takes the cheapest complete state if it beats the incumbent.
  bool Finish(const std::vector<int>& order, const std::vector<State>& last) {
    std::vector<int> option(items_.size());
    for (size_t i = 0; i < items_.size(); ++i) option[i] = kept_[i].front();
    for (const State& end : last) {
      const State* state = &end;
      for (size_t k = order.size(); k-- > 0;) {
        option[order[k]] = state->option;
        state = &layers_[k][state->parent];
      }
      Consider(option);
    }
    if (order.empty()) Consider(option);
    return true;
  }

  void Consider(const std::vector<int>& option) {
    Incumbent candidate{.option = option, .bytes = 0, .cost = CostOf(items_, option)};
    for (size_t i = 0; i < items_.size(); ++i)
      candidate.bytes += items_[i].options[option[i]].bytes;
    if (candidate.bytes > budget_) return;
    if (std::tie(candidate.cost, candidate.bytes) < std::tie(best_.cost, best_.bytes))
      best_ = std::move(candidate);
  }

  const std::vector<Item>& items_;
  int64_t budget_;
  double price_;
  Incumbent best_;
  double dual_ = 0;
  std::vector<double> lowest_;          // per item, least penalised cost
  std::vector<std::vector<int>> kept_;  // per item, options that an improvement may use
  std::vector<std::vector<State>> layers_;
};

Status Validate(const std::vector<Unit>& units) {
  int64_t most = 0;
  for (const Unit& unit : units) {
    if (unit.choices.empty())
      return Status::InvalidInput(fmt::format("unit {}: has no choice", unit.name));
    std::set<std::string> formats;
    int64_t largest = 0;
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
    }
    if (__builtin_add_overflow(most, largest, &most) || most > (int64_t{1} << 52)) {
      return Status::InvalidInput(
          fmt::format("unit {}: the bytes of all units pass 2^52", unit.name));
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

Result<Allocation> Allocate(const std::vector<Unit>& units, int64_t budget) {
  PQ_RETURN_IF_ERROR(Validate(units));
  const int64_t smallest = SmallestBytes(units);
  if (budget < smallest) {
    return Status::Unmet(
        fmt::format("the budget of {} bytes cannot be met, the smallest allocation has {} bytes",
                    budget, smallest));
  }
  std::vector<Item> items;
  for (const Unit& unit : units) items.push_back(MakeItem(unit));
  const Relaxation relaxation = Relax(items, budget);
  Core core(items, budget, relaxation, Fill(items, relaxation, budget));
  const bool proven = core.Solve();

  Allocation result;
  for (size_t i = 0; i < items.size(); ++i) {
    result.choice.push_back(items[i].options[core.best().option[i]].index);
  }
  result.bytes = core.best().bytes;
  result.cost = core.best().cost;
  result.lower_bound = proven ? result.cost : std::min(result.cost, std::max(0.0, core.dual()));
  result.slack = budget - result.bytes;
  result.price = relaxation.price;
  return result;
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

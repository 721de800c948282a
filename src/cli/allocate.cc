#include <fmt/format.h>

#include <memory>
#include <optional>
#include <string>

#include "cli/session.h"
#include "cli/tables.h"
#include "io/file_system.h"

namespace prismaquant {
namespace {

struct AllocateFlags {
  std::string work, json, costs;
  int64_t bytes = -1;
  PlanFlags plan;
};

Status AllocateSmallestOfTable(const std::vector<Unit>& units, double max_kl,
                               const std::string& json_file) {
  PQ_ASSIGN_OR_RETURN(const SmallestAllocation found, AllocateSmallest(units, max_kl));
  if (json_file != "-") {
    fmt::print("{} units, {} bytes, at least {}, cost {:.6g} of {:.6g}\n", units.size(),
               found.allocation.bytes, found.bytes_bound, found.allocation.cost, max_kl);
  }
  Json json = AllocationToJson(units, found.allocation, Json{{"max_kl", max_kl}});
  json["bytes_lower_bound"] = found.bytes_bound;
  return WriteJson(json, json_file);
}

Status AllocateTable(const AllocateFlags& flags) {
  const std::optional<double>& max_kl = flags.plan.budget.max_kl;
  if ((flags.bytes >= 0) == max_kl.has_value()) {
    return Status::InvalidInput(
        "--costs: needs one budget, --bytes (of the units) or --max-kl (sum of costs)");
  }
  PQ_ASSIGN_OR_RETURN(const std::string text, ReadFile(flags.costs));
  PQ_ASSIGN_OR_RETURN(const Json table, ParseJson(text, flags.costs));
  PQ_ASSIGN_OR_RETURN(const std::vector<Unit> units, UnitsFromJson(table, flags.costs));
  if (max_kl) return AllocateSmallestOfTable(units, *max_kl, flags.json);
  PQ_ASSIGN_OR_RETURN(const Allocation allocation, Allocate(units, flags.bytes));
  if (flags.json != "-") {
    fmt::print("{} units, {} bytes of {}, cost {:.6g}, lower bound {:.6g}\n", units.size(),
               allocation.bytes, flags.bytes, allocation.cost, allocation.lower_bound);
  }
  return WriteJson(AllocationToJson(units, allocation, Json{{"bytes", flags.bytes}}), flags.json);
}

Status RunAllocate(const AllocateFlags& flags) {
  if (!flags.costs.empty()) return AllocateTable(flags);
  if (flags.work.empty())
    return Status::InvalidInput("allocate: needs --work, or --costs with --bytes or --max-kl");
  if (flags.bytes >= 0)
    return Status::InvalidInput("--bytes: goes with --costs; use --size for a checkpoint");
  PQ_ASSIGN_OR_RETURN(const auto session, Session::Resume(flags.work));
  PQ_ASSIGN_OR_RETURN(const Planner planner, session->MakePlanner(flags.plan, /*with_costs=*/true));
  PQ_ASSIGN_OR_RETURN(const ChosenPlan chosen, ChoosePlan(*session, planner, flags.plan.budget));
  if (flags.json != "-") PrintPlan(chosen.plan, chosen.sweep, session->labels());
  return WriteJson(PlanToJson(chosen.plan, chosen.sweep), flags.json);
}

}  // namespace

Command AddAllocateCommand(CLI::App& app) {
  const auto flags = std::make_shared<AllocateFlags>();
  CLI::App* command =
      app.add_subcommand("allocate", "Choose a format for every Linear under a budget");
  command->add_option("--work", flags->work, "Run store folder of a finished probe");
  flags->plan.Register(*command);
  command->add_option("--costs", flags->costs,
                      "Allocate this table of units and choices instead of a run store");
  command->add_option("--bytes", flags->bytes, "Budget of --costs: sum of bytes over the units")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--json", flags->json, "Write the allocation as JSON; - is standard output");
  return {command, [flags] { return RunAllocate(*flags); }};
}

}  // namespace prismaquant

#include <fmt/format.h>

#include <memory>
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

Status AllocateTable(const AllocateFlags& flags) {
  if (flags.bytes < 0) return Status::InvalidInput("--costs: needs --bytes, the budget in bytes");
  PQ_ASSIGN_OR_RETURN(const std::string text, ReadFile(flags.costs));
  PQ_ASSIGN_OR_RETURN(const Json table, ParseJson(text, flags.costs));
  PQ_ASSIGN_OR_RETURN(const std::vector<Unit> units, UnitsFromJson(table, flags.costs));
  PQ_ASSIGN_OR_RETURN(const Allocation allocation, Allocate(units, flags.bytes));
  if (flags.json != "-") {
    fmt::print("{} units, {} bytes of {}, cost {:.6g}, lower bound {:.6g}\n", units.size(),
               allocation.bytes, flags.bytes, allocation.cost, allocation.lower_bound);
  }
  return WriteJson(AllocationToJson(units, allocation, flags.bytes), flags.json);
}

Status RunAllocate(const AllocateFlags& flags) {
  if (!flags.costs.empty()) return AllocateTable(flags);
  if (flags.work.empty())
    return Status::InvalidInput("allocate: needs --work, or --costs with --bytes");
  if (flags.bytes >= 0)
    return Status::InvalidInput("--bytes: goes with --costs; use --size for a checkpoint");
  PQ_ASSIGN_OR_RETURN(const auto session, Session::Resume(flags.work));
  PQ_ASSIGN_OR_RETURN(const Planner planner, session->MakePlanner(flags.plan, /*with_costs=*/true));
  PQ_ASSIGN_OR_RETURN(const ChosenPlan chosen, ChoosePlan(session->model(), planner, flags.plan));
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

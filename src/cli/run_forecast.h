#ifndef PRISMAQUANT_CLI_RUN_FORECAST_H_
#define PRISMAQUANT_CLI_RUN_FORECAST_H_

// RunForecast: what a run will need, held against --memory before it begins, printed by --dry-run
// and beside what the run then took.

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "cli/run_flags.h"
#include "cli/session.h"
#include "performance/forecast.h"
#include "performance/machine_rates.h"
#include "performance/run_profile.h"

namespace prismaquant {

struct RunForecast {
  std::vector<StageNeeds> stages;
  std::optional<MachineRates> rates;  // of this machine; not measured for a run of a few seconds
  int64_t held_bytes = 0;             // by the process before the first stage
  int64_t memory_bytes = 0;           // --memory, or its default
  bool memory_is_default = true;
  int64_t free_bytes = 0;  // of the disk that the run store lies on

  // Largest resident set of a stage.
  int64_t Resident(const StageNeeds& stage) const;
  // kUnmet, naming the smallest --memory that can, if a stage needs more than there is to be.
  Status CheckMemory() const;
  Json ToJson() const;
};

// Without rates. If the run would not fit, CheckMemory's error; not of a dry run, which is to show
// it.
Result<RunForecast> ForecastRun(const Session& session, const RunSettings& settings,
                                const RunFlags& flags);
// Adds the rates, in two seconds; not for a run of a few seconds, unless it is a dry run. `work`:
// the run store's folder, which need not exist.
Status MeasureRates(const Session& session, const RunFlags& flags,
                    const std::filesystem::path& work, RunForecast& forecast);

// What a dry run comes to: stages with FLOP, time, memory, traffic with storage and disk as a
// table, or as JSON if `json` names a file or is "-"; then CheckMemory.
Status ReportForecast(const RunForecast& forecast, const std::string& json);
// Stages as they were, beside the forecast if the run was whole, and kernels if asked for.
void PrintProfile(const RunProfile& profile, const RunForecast* forecast, bool kernels);
// The same as "stages", "peak_memory_bytes" and "kernels".
void AddProfile(const RunProfile& profile, bool kernels, Json& json);

}  // namespace prismaquant

#endif  // PRISMAQUANT_CLI_RUN_FORECAST_H_

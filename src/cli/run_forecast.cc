#include "cli/run_forecast.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <string>

#include "base/progress.h"
#include "io/file_system.h"
#include "performance/memory.h"

namespace prismaquant {
namespace {

// Of what is available, without --memory.
constexpr double kDefaultMemory = 0.8;
// Shorter runs are over before the machine is measured.
constexpr double kMeasuredFlop = 4e12;
// Of libtorch's code, tables and threads, once it computes.
constexpr int64_t kLibraryBytes = 170'000'000;
// Of a stage; kernels below it are not printed.
constexpr double kSmallestShare = 0.01;
constexpr size_t kKernelWidth = 44;

std::string Bytes(double bytes) { return FormatBytes(std::llround(bytes)); }

void PrintKernels(const RunProfile& profile) {
  const std::vector<KernelMeasure> kernels = profile.Kernels();
  std::map<std::string, double> seconds;
  for (const KernelMeasure& kernel : kernels) seconds[kernel.stage] += kernel.seconds;
  fmt::print("{:<18} {:<44} {:>8} {:>10} {:>6} {:>9} {:>8}\n", "stage", "kernel", "calls",
             "seconds", "share", "GFLOP/s", "GB/s");
  for (const KernelMeasure& kernel : kernels) {
    const double share = kernel.seconds / seconds.at(kernel.stage);
    if (share < kSmallestShare) continue;
    const auto rate = [&](double work) {
      return work > 0 ? fmt::format("{:.1f}", work / kernel.seconds / 1e9) : "";
    };
    fmt::print("{:<18} {:<44} {:>8} {:>10.2f} {:>5.1f}% {:>9} {:>8}\n", kernel.stage,
               kernel.kernel.empty() ? "(between kernels)" : kernel.kernel.substr(0, kKernelWidth),
               kernel.calls, kernel.seconds, 100 * share, rate(kernel.flop), rate(kernel.bytes));
  }
}

// The forecast of a stage of the profile; null if there is none.
const StageNeeds* Find(const RunForecast* forecast, const std::string& stage) {
  if (forecast == nullptr) return nullptr;
  const auto found = std::find_if(forecast->stages.begin(), forecast->stages.end(),
                                  [&](const StageNeeds& needs) { return needs.stage == stage; });
  return found == forecast->stages.end() ? nullptr : &*found;
}

void PrintStages(const RunProfile& profile, const RunForecast* forecast) {
  fmt::print("{:<16} {:>13} {:>12} {:>11} {:>11} {:>11} {:>11} {:>11} {:>11}\n", "stage", "time",
             "forecast", "peak memory", "forecast", "read", "forecast", "written", "forecast");
  for (const StageMeasure& stage : profile.Stages()) {
    const StageNeeds* needs = Find(forecast, stage.stage);
    const auto planned = [needs](double StageNeeds::*bytes) {
      return needs == nullptr ? "" : Bytes(needs->*bytes);
    };
    const bool timed = needs != nullptr && forecast->rates.has_value();
    fmt::print("{:<16} {:>13} {:>12} {:>11} {:>11} {:>11} {:>11} {:>11} {:>11}\n", stage.stage,
               FormatSeconds(stage.seconds),
               timed ? FormatSeconds(needs->Seconds(*forecast->rates)) : "",
               FormatBytes(stage.peak_bytes),
               needs == nullptr ? "" : FormatBytes(forecast->Resident(*needs)),
               FormatBytes(stage.read_bytes), planned(&StageNeeds::read),
               FormatBytes(stage.written_bytes), planned(&StageNeeds::written));
  }
  fmt::print("{:<16} {:>13} {:>12} {:>11}\n", "all", "", "",
             FormatBytes(profile.PeakMemoryBytes()));
}

void PrintForecast(const RunForecast& forecast) {
  if (forecast.rates) {
    const MachineRates& rates = *forecast.rates;
    fmt::print(
        "this machine: products {:.3f} TFLOP/s, in float32 {:.3f}; factors {:.3f}; "
        "{:.0f} M weights/s to nearest, {:.0f} M in GPTQ's loop; memory {:.1f} GB/s, reads "
        "{:.2f}, writes {:.2f}\n",
        rates.product / 1e12, rates.float_product / 1e12, rates.factor / 1e12, rates.nearest / 1e6,
        rates.columns / 1e6, rates.memory / 1e9, rates.read / 1e9, rates.write / 1e9);
  }
  fmt::print("{:<16} {:>11} {:>13} {:>11} {:>11} {:>11} {:>11}\n", "stage", "TFLOP", "time",
             "peak memory", "read", "written", "on disk");
  double flop = 0, seconds = 0, read = 0, written = 0, stored = 0;
  int64_t resident = forecast.held_bytes;
  const auto row = [&](const std::string& stage, double operations, double time, int64_t memory,
                       double in, double out, double kept) {
    fmt::print("{:<16} {:>11.3g} {:>13} {:>11} {:>11} {:>11} {:>11}\n", stage, operations / 1e12,
               forecast.rates ? FormatSeconds(time) : "", FormatBytes(memory), Bytes(in),
               Bytes(out), Bytes(kept));
  };
  for (const StageNeeds& stage : forecast.stages) {
    const double time = forecast.rates ? stage.Seconds(*forecast.rates) : 0;
    row(stage.stage, stage.Flop(), time, forecast.Resident(stage), stage.read, stage.written,
        stage.stored);
    flop += stage.Flop();
    seconds += time;
    resident = std::max(resident, forecast.Resident(stage));
    read += stage.read;
    written += stage.written;
    stored = std::max(stored, stage.stored);
  }
  row("all", flop, seconds, resident, read, written, stored);
  fmt::print("--memory {}; on the disk of the run store {} are free\n",
             FormatBytes(forecast.memory_bytes), FormatBytes(forecast.free_bytes));
}

}  // namespace

int64_t RunForecast::Resident(const StageNeeds& stage) const {
  return held_bytes + std::llround(stage.resident);
}

Status RunForecast::CheckMemory() const {
  const auto largest = std::max_element(
      stages.begin(), stages.end(),
      [](const StageNeeds& a, const StageNeeds& b) { return a.resident < b.resident; });
  if (largest == stages.end() || Resident(*largest) <= memory_bytes) return {};
  const int64_t needed = Resident(*largest);
  constexpr int64_t kMega = 1'000'000;
  return Status::Unmet(fmt::format(
      "--memory {}{}: the stage \"{}\" needs {}; the smallest --memory that can is {}MB, or take "
      "fewer --samples",
      FormatBytes(memory_bytes), memory_is_default ? " (the default, 80 % of what is free)" : "",
      largest->stage, FormatBytes(needed), (needed + kMega - 1) / kMega));
}

Json RunForecast::ToJson() const {
  Json json = {
      {"memory_bytes", memory_bytes}, {"held_bytes", held_bytes}, {"free_bytes", free_bytes}};
  if (rates) json["rates"] = rates->ToJson();
  for (const StageNeeds& stage : stages) {
    Json& entry = json["stages"][stage.stage];
    entry = {{"flop", stage.Flop()},
             {"resident_bytes", Resident(stage)},
             {"read_bytes", std::llround(stage.read)},
             {"written_bytes", std::llround(stage.written)},
             {"stored_bytes", std::llround(stage.stored)}};
    if (rates) entry["seconds"] = stage.Seconds(*rates);
  }
  return json;
}

Result<RunForecast> ForecastRun(const Session& session, const RunSettings& settings,
                                const RunFlags& flags) {
  RunForecast forecast;
  forecast.stages = Forecast(session.model(), session.calibration(), settings);
  forecast.held_bytes = ResidentBytes() + kLibraryBytes;
  forecast.memory_bytes =
      std::llround(kDefaultMemory * static_cast<double>(AvailableMemoryBytes()));
  if (!flags.memory.empty()) {
    PQ_ASSIGN_OR_RETURN(forecast.memory_bytes, ParseSize("--memory", flags.memory));
    forecast.memory_is_default = false;
  }
  if (!flags.dry_run) PQ_RETURN_IF_ERROR(forecast.CheckMemory());
  return forecast;
}

Status MeasureRates(const Session& session, const RunFlags& flags,
                    const std::filesystem::path& work, RunForecast& forecast) {
  forecast.free_bytes = FileSystem::Default().FreeBytes(work);
  double flop = 0;
  for (const StageNeeds& stage : forecast.stages) flop += stage.Flop();
  if (!flags.dry_run && flop <= kMeasuredFlop) return {};
  PQ_ASSIGN_OR_RETURN(
      forecast.rates,
      MeasureMachine(TypicalProduct(session.model(), session.calibration()),
                     session.compute().dtype, session.checkpoint(), ExistingFolder(work)));
  return {};
}

Status ReportForecast(const RunForecast& forecast, const std::string& json) {
  if (json != "-") PrintForecast(forecast);
  PQ_RETURN_IF_ERROR(WriteJson(forecast.ToJson(), json));
  return forecast.CheckMemory();
}

void AddProfile(const RunProfile& profile, bool kernels, Json& json) {
  json["stages"] = Json::object();
  for (const StageMeasure& stage : profile.Stages()) {
    json["stages"][stage.stage] = {{"seconds", stage.seconds},
                                   {"peak_memory_bytes", stage.peak_bytes},
                                   {"read_bytes", stage.read_bytes},
                                   {"written_bytes", stage.written_bytes}};
  }
  json["peak_memory_bytes"] = profile.PeakMemoryBytes();
  if (!kernels) return;
  for (const KernelMeasure& kernel : profile.Kernels()) {
    json["kernels"].push_back({{"stage", kernel.stage},
                               {"kernel", kernel.kernel},
                               {"calls", kernel.calls},
                               {"seconds", kernel.seconds},
                               {"flop", kernel.flop},
                               {"bytes", kernel.bytes}});
  }
}

void PrintProfile(const RunProfile& profile, const RunForecast* forecast, bool kernels) {
  PrintStages(profile, forecast);
  if (kernels) PrintKernels(profile);
}

}  // namespace prismaquant

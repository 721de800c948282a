#include "base/progress.h"

#include <fmt/format.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <utility>

namespace prismaquant {
namespace {

constexpr double kTerminalInterval = 0.2;
constexpr double kPlainInterval = 10;

double Seconds(std::chrono::steady_clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

}  // namespace

Progress::Progress(std::string title, int64_t total, std::string unit)
    : title_(std::move(title)),
      unit_(std::move(unit)),
      total_(total),
      terminal_(::isatty(STDERR_FILENO) != 0),
      start_(Clock::now()),
      drawn_(start_) {}

Progress::~Progress() {
  if (done_ >= total_) {
    Draw(/*last=*/true);
  } else if (terminal_ && line_open_) {
    fmt::print(stderr, "\n");
  }
}

void Progress::Skip(int64_t steps) {
  skipped_ += steps;
  done_ += steps;
}

void Progress::Advance(int64_t steps) {
  done_ += steps;
  const double since = Seconds(Clock::now() - drawn_);
  if (since >= (terminal_ ? kTerminalInterval : kPlainInterval)) Draw(/*last=*/false);
}

void Progress::Draw(bool last) {
  drawn_ = Clock::now();
  const double elapsed = Seconds(drawn_ - start_);
  const auto fresh = static_cast<double>(done_ - skipped_);
  const double rate = elapsed > 0 ? fresh / elapsed : 0;
  std::string line = fmt::format("{}: {}/{} {}", title_, done_, total_, unit_);
  if (rate > 0) line += fmt::format(", {:.3g} {}/s", rate, unit_);
  if (last) {
    line += fmt::format(", {}", FormatSeconds(elapsed));
  } else if (rate > 0) {
    line += fmt::format(", {} left", FormatSeconds(static_cast<double>(total_ - done_) / rate));
  }
  if (terminal_) {
    fmt::print(stderr, "\r\033[K{}{}", line, last ? "\n" : "");
    line_open_ = !last;
  } else {
    fmt::print(stderr, "{}\n", line);
  }
  std::fflush(stderr);
}

int64_t PeakMemoryBytes() {
  // getrusage would count what the process was before it became this program.
  std::ifstream status("/proc/self/status");
  for (std::string key; status >> key;) {
    int64_t kilobytes = 0;
    if (key == "VmHWM:" && status >> kilobytes) return kilobytes * 1024;
  }
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  return static_cast<int64_t>(usage.ru_maxrss) * 1024;
}

std::string FormatSeconds(double seconds) {
  if (seconds < 59.95) return fmt::format("{:.1f} s", seconds);
  const auto whole = std::max(static_cast<int64_t>(seconds), int64_t{60});
  if (whole < 3600) return fmt::format("{} min {} s", whole / 60, whole % 60);
  return fmt::format("{} h {} min", whole / 3600, whole % 3600 / 60);
}

std::string FormatBytes(int64_t bytes) {
  const auto value = static_cast<double>(bytes);
  if (bytes >= 999'999'500) return fmt::format("{:.3f} GB", value / 1e9);
  if (bytes >= 999'950) return fmt::format("{:.3f} MB", value / 1e6);
  if (bytes >= 1000) return fmt::format("{:.1f} kB", value / 1e3);
  return fmt::format("{} bytes", bytes);
}

}  // namespace prismaquant

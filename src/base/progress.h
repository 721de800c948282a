#ifndef PRISMAQUANT_BASE_PROGRESS_H_
#define PRISMAQUANT_BASE_PROGRESS_H_

// Progress: a line on standard error with rate and time left for a stage of known length. On a
// terminal the line is redrawn; elsewhere a plain line appears now and then. Belongs to one thread.

#include <chrono>
#include <cstdint>
#include <string>

namespace prismaquant {

class Progress {
 public:
  // `total` steps named `unit` ("layers"). The last line, with the time taken, appears when a
  // finished stage's object goes; a stage that ends early leaves only its line on a terminal as it
  // was.
  Progress(std::string title, int64_t total, std::string unit);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // `done` of `total` steps are finished. Steps that were already finished at the start (a resumed
  // run) are told once with Skip and do not count into the rate.
  void Skip(int64_t steps);
  void Advance(int64_t steps = 1);

 private:
  using Clock = std::chrono::steady_clock;
  void Draw(bool last);

  std::string title_, unit_;
  int64_t total_, done_ = 0, skipped_ = 0;
  bool terminal_, line_open_ = false;
  Clock::time_point start_, drawn_;
};

// Largest resident set of this process so far, in bytes.
int64_t PeakMemoryBytes();
// "3 min 12 s", "0.4 s"
std::string FormatSeconds(double seconds);
// "1.234 GB" with powers of ten
std::string FormatBytes(int64_t bytes);

}  // namespace prismaquant

#endif  // PRISMAQUANT_BASE_PROGRESS_H_

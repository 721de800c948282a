#ifndef PRISMAQUANT_BENCH_FIDELITY_MEASURED_KL_H_
#define PRISMAQUANT_BENCH_FIDELITY_MEASURED_KL_H_

// Measured KL(source || source with one case quantized), nats per token, of every case and
// format, per held-out window, in float32. A file keeps what was measured, case by case and
// chunk of windows by chunk, so that a run goes on where another one ended and cost models are
// compared again without measuring again.

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "base/json.h"
#include "base/status.h"
#include "bench/fidelity/cases.h"
#include "bench/fidelity/source_body.h"
#include "data/calibration.h"

namespace prismaquant {

struct WindowKls {
  std::vector<double> windows;  // nats per token, of the first windows of the text

  // Of the first `count` windows.
  double Mean(size_t count) const;
  double StandardError(size_t count) const;
};

// Name of the case -> format name -> measured.
using MeasuredKls = std::map<std::string, std::map<std::string, WindowKls>>;

struct MeasureOptions {
  bool weights_only = false;   // activations stay as they are
  std::filesystem::path file;  // empty: nothing is kept
  Json identity;               // of source, text and settings; a file with another one is refused
};

// Of all `windows`, and whatever else the file holds.
Result<MeasuredKls> MeasureKl(const SourceBody& body, const std::vector<FidelityCase>& cases,
                              const TokenWindows& windows, const MeasureOptions& options);

}  // namespace prismaquant

#endif  // PRISMAQUANT_BENCH_FIDELITY_MEASURED_KL_H_

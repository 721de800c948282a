#ifndef PRISMAQUANT_BENCH_FIDELITY_OBSERVATIONS_H_
#define PRISMAQUANT_BENCH_FIDELITY_OBSERVATIONS_H_

// Observations: what backward passes with sampled labels tell about every case and format. With
// dW = W_f - W and dx_t = Q_f(x_t) - x_t, the loss of a sequence changes to first order by
//
//   s = sum_t <g_t, dW x_t + W dx_t> = sum_oi G_oi dW_oi + sum_ti (W^T g_t)_i dx_ti,
//
// G = sum_t g_t x_t^T. A Term cuts one of these sums into pieces and adds the squares of the
// pieces: s^2 is the case of one piece. Many pieces vary less from sequence to sequence, and leave
// out the products of pieces. The Linears of a unit have outputs of their own and share dx_t.

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "bench/fidelity/cases.h"
#include "bench/fidelity/source_body.h"
#include "data/calibration.h"

namespace prismaquant {

enum class Term {
  kWhole,       // s^2
  kWhole16,     // a piece per window of 16 tokens of the sequence, ...
  kWhole32,     //
  kWhole64,     //
  kWhole128,    //
  kWhole256,    //
  kTokens,      // per token
  kRows,        // per output
  kRows64,      // per output and window of 64 tokens
  kElements,    // per output and token
  kWeights,     // first part, that of the weights: whole
  kWeightRows,  // per row of W, ...
  kWeightColumns,
  kWeightElements,
  kWeightTokens,  // per element and token
  kInputs,        // second part, that of the activations: whole
  kInputTokens,   // per row of x, ...
  kInputColumns,
  kInputElements,
  kInputColumnsApart,  // per column and Linear
  kFisherTrace,        // mean(dW^2) sum_t |g_t|^2 |x_t|^2, no piece of a sum
};
inline constexpr std::array<std::string_view, 21> kTermNames = {
    "whole",       "whole_16",     "whole_32",       "whole_64",        "whole_128",
    "whole_256",   "tokens",       "rows",           "rows_64",         "elements",
    "weights",     "weight_rows",  "weight_columns", "weight_elements", "weight_tokens",
    "inputs",      "input_tokens", "input_columns",  "input_elements",  "input_columns_apart",
    "fisher_trace"};
using Terms = std::array<double, kTermNames.size()>;

struct WeightedTerm {
  Term term = Term::kWhole;
  double weight = 1;
};

struct FormatObservations {
  std::vector<std::vector<Terms>> terms;  // per draw, per sequence

  // The weighted sum of terms of each sequence, mean over draws.
  std::vector<double> PerSequence(const std::vector<WeightedTerm>& sum) const;
};

// Of one case, by format name.
using CaseObservations = std::map<std::string, FormatObservations>;

// Hidden states of the calibration before every layer and after the last one, [layer][sequence],
// each [1, tokens, hidden_size], and the largest |x| of every Linear.
struct CalibrationPass {
  std::vector<std::vector<at::Tensor>> hidden;
  std::map<std::string, double> input_amax;
};
Result<CalibrationPass> RunCalibration(const SourceBody& body, const TokenWindows& windows);

struct ObserveOptions {
  int64_t draws = 1;  // of labels per sequence, each with a backward pass of its own
  uint64_t seed = 0;
  bool weights_only = false;  // dx = 0
};

// In the order of `cases`.
std::vector<CaseObservations> ObserveCases(const SourceBody& body,
                                           const std::vector<FidelityCase>& cases,
                                           const Calibration& calibration,
                                           const CalibrationPass& pass,
                                           const ObserveOptions& options);

}  // namespace prismaquant

#endif  // PRISMAQUANT_BENCH_FIDELITY_OBSERVATIONS_H_

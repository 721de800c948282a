#ifndef PRISMAQUANT_BENCH_FIDELITY_CASES_H_
#define PRISMAQUANT_BENCH_FIDELITY_CASES_H_

// FidelityCase: what is quantized alone, rounded to nearest with the scales that the probe would
// give it: one Linear of the text body, or the Linears of a fused unit together. What measurements
// and cost models are compared for.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "bench/fidelity/source_body.h"
#include "formats/format.h"
#include "model/model.h"

namespace prismaquant {

struct FidelityCase {
  std::string name;                 // of the Linear or the unit
  std::vector<LinearInfo> linears;  // of one layer, with one input
  SharedScales scales;
  std::vector<const Format*> formats;  // that can hold them

  int layer() const { return linears.front().layer; }
};

struct DrawOptions {
  int64_t count = 60;
  bool units = false;  // fused units, those of experts left out, instead of Linears
  uint64_t seed = 0;
};
// Cases of the body's Linears that can be allocated, all if there are fewer, in model order,
// without scales and formats. A function of model and options.
std::vector<FidelityCase> DrawCases(const Model& model, const DrawOptions& options);

// Adds scales and formats. `input_amax`: largest |x| over the calibration, by Linear name, of all
// Linears of the body.
void CompleteCases(const SourceBody& body, const std::map<std::string, double>& input_amax,
                   const std::vector<const Format*>& formats, std::vector<FidelityCase>& cases);

// The rounded weight of one of the case's Linears, float32 [out, in].
at::Tensor RoundedWeight(const SourceBody& body, const FidelityCase& fidelity_case,
                         const LinearInfo& linear, const Format& format);

}  // namespace prismaquant

#endif  // PRISMAQUANT_BENCH_FIDELITY_CASES_H_

#ifndef PRISMAQUANT_BENCH_FIDELITY_CASES_H_
#define PRISMAQUANT_BENCH_FIDELITY_CASES_H_

// FidelityCase: one Linear of the text body that is quantized alone, rounded to nearest with the
// scales that the probe would give it, and the formats in which it is. What measurements and cost
// models are compared for.

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
  LinearInfo linear;
  SharedScales scales;
  std::vector<const Format*> formats;  // that can hold it
};

// `count` of the body's Linears that can be allocated, all if there are fewer, in model order. A
// function of model, count and seed.
std::vector<LinearInfo> DrawLinears(const Model& model, int64_t count, uint64_t seed);

// Cases of the Linears. `input_amax`: largest |x| over the calibration, by Linear name, of all
// Linears of the layers that they are in.
std::vector<FidelityCase> MakeCases(const SourceBody& body, const std::vector<LinearInfo>& linears,
                                    const std::map<std::string, double>& input_amax,
                                    const std::vector<const Format*>& formats);

// The rounded weight, float32 [out, in].
at::Tensor RoundedWeight(const SourceBody& body, const FidelityCase& fidelity_case,
                         const Format& format);

}  // namespace prismaquant

#endif  // PRISMAQUANT_BENCH_FIDELITY_CASES_H_

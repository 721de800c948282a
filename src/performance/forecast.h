#ifndef PRISMAQUANT_PERFORMANCE_FORECAST_H_
#define PRISMAQUANT_PERFORMANCE_FORECAST_H_

// Forecast: what a run will ask of the machine, stage by stage, from shapes alone: before anything
// of the weights is read (docs/scaling.md has the formulas). Pure functions.

#include <cstdint>
#include <string>
#include <vector>

#include "data/calibration.h"
#include "formats/format.h"
#include "model/model.h"
#include "performance/machine_rates.h"
#include "render/render.h"

namespace prismaquant {

// The stages that a run has and what they depend on beside the model and the calibration.
struct RunSettings {
  ComputeOptions compute;
  bool smooth = false, probe = true, render = true;
  std::vector<const Format*> priced;       // rounded to nearest
  std::vector<const Format*> gptq_priced;  // as GPTQ leaves them
  RenderOptions rendering;
  double bits = 5.5;              // of a quantized weight, for what is written
  int64_t evaluation_tokens = 0;  // no evaluation: 0
  int64_t evaluation_window = 1;
  int64_t validated_plans = 0;  // each rendered, and measured on as many tokens as are there
  int64_t validation_tokens = 0;
};

struct StageNeeds {
  std::string stage;  // as RunProfile names it
  // FLOP of products in the compute dtype and in float32, and of factors.
  double products = 0, float_products = 0, factors = 0;
  double nearest = 0, columns = 0;  // weights rounded to nearest, and in GPTQ's loop
  double memory = 0;                // bytes of elementwise operators
  double read = 0, written = 0;     // bytes of storage
  double stored = 0;                // bytes that lie in the run store and in OUT at most
  double resident = 0;              // bytes, beside what the process holds before it begins

  // Its work this many times over; what is resident stays.
  StageNeeds Times(double times) const;
  double Flop() const { return products + float_products + factors; }
  // Reading goes on while the processor computes.
  double Seconds(const MachineRates& rates) const;
};

std::vector<StageNeeds> Forecast(const Model& model, const Calibration& calibration,
                                 const RunSettings& settings);

// The product that takes the most of a run's time: to measure the machine with.
ProductShape TypicalProduct(const Model& model, const Calibration& calibration);

}  // namespace prismaquant

#endif  // PRISMAQUANT_PERFORMANCE_FORECAST_H_

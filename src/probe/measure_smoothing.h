#ifndef PRISMAQUANT_PROBE_MEASURE_SMOOTHING_H_
#define PRISMAQUANT_PROBE_MEASURE_SMOOTHING_H_

// The factors by which a model is smoothed, from one forward pass of the calibration sequences
// through the source: of every channel that can be scaled the mean square is taken where its first
// reader sees it, and ChooseExponents does the rest. Channels that fewer than kFewestInputs tokens
// reached are left alone.

#include "base/status.h"
#include "data/calibration.h"
#include "model/model.h"
#include "model/smoothing.h"
#include "store/run_store.h"

namespace prismaquant {

// Stage "smooth", committed per layer; what the store holds is reused. The model must be
// unsmoothed, and the store bound to it and to this calibration.
Result<SmoothingExponents> MeasureSmoothing(const Model& model, const Calibration& calibration,
                                            const ComputeOptions& compute, RunStore& store);

}  // namespace prismaquant

#endif  // PRISMAQUANT_PROBE_MEASURE_SMOOTHING_H_

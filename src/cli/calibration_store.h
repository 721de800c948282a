#ifndef PRISMAQUANT_CLI_CALIBRATION_STORE_H_
#define PRISMAQUANT_CLI_CALIBRATION_STORE_H_

// Calibration data in the run store, so that a run goes on without the files that it came from.

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "data/calibration.h"
#include "model/model.h"
#include "store/run_store.h"
#include "tokenizer/tokenizer.h"

namespace prismaquant {

Status StoreCalibration(RunStore& store, const Calibration& calibration);
// `identity` of the run knows the fingerprint.
Result<Calibration> LoadCalibration(RunStore& store,
                                    const std::map<std::string, std::string>& identity);

// LoadCaptions for this model; kInvalidInput if it has no vision tower.
Result<std::vector<CaptionSequence>> LoadModelCaptions(const Model& model,
                                                       const Tokenizer& tokenizer,
                                                       const std::string& source, int64_t limit);

}  // namespace prismaquant

#endif  // PRISMAQUANT_CLI_CALIBRATION_STORE_H_

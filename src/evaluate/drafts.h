#ifndef PRISMAQUANT_EVALUATE_DRAFTS_H_
#define PRISMAQUANT_EVALUATE_DRAFTS_H_

// How well the MTP head drafts for its own body on a text. A draft is accepted if it is the token
// that the body finds most likely; further drafts come from the same head, fed with its own normed
// output and the token it drafted, as speculative decoding does. The n-th draft is judged where the
// text itself went on with the drafts before it, since there the body's choice is known.

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/status.h"
#include "evaluate/forward.h"
#include "model/model.h"
#include "model/sequences.h"

namespace prismaquant {

inline constexpr int kDrafts = 3;

struct DraftAcceptance {
  std::array<int64_t, kDrafts> judged = {}, accepted = {};  // of the first, second, third draft
  // NaN if none was judged.
  double rate(int draft) const;
};

// `outputs` of the same data; `projection` of the same model. The model must have a kMtp part.
// Second and third drafts are made at a bounded number of positions per window, evenly taken.
Result<DraftAcceptance> MeasureDrafts(const Model& model, const Calibration& data,
                                      const Sequences& sequences, const BodyOutputs& outputs,
                                      const std::shared_ptr<LinearRunner>& projection,
                                      const ComputeOptions& compute);

}  // namespace prismaquant

#endif  // PRISMAQUANT_EVALUATE_DRAFTS_H_

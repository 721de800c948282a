#ifndef PRISMAQUANT_PROBE_HEAD_COSTS_H_
#define PRISMAQUANT_PROBE_HEAD_COSTS_H_

// Statistics and costs of the output projection, which is too wide for a gradient matrix per
// sequence: the gradient at its output is softmax(logits) - onehot(label), so
// s_nf = sum_t <g_t, W_f Q_f(x_t) - W x_t> is taken from the logits themselves, slice by slice of
// the vocabulary, at no more than kPricedPositions of the text windows, which stand for all.

#include <cstdint>
#include <span>
#include <vector>

#include "base/status.h"
#include "data/calibration.h"
#include "formats/format.h"
#include "model/model.h"
#include "probe/blob_tensors.h"
#include "probe/loss.h"
#include "probe/probe.h"
#include "store/run_store.h"

namespace prismaquant {

// Rows of the projection that are worked on at a time.
inline constexpr int64_t kHeadSliceRows = 8192;
// Positions that are priced at most, spread evenly: they have labels of their own, so a cost's
// relative standard error from them is the root of two over their number.
inline constexpr int64_t kPricedPositions = 1024;

struct HeadStatistics {
  LinearStats stats;
  std::vector<LinearCost> costs;
};

// `hidden`: the body's outputs; `losses` of the same sequences, by `head`. The model must have a
// kHead part. Holds one slice of the projection and the positions' logits for it. Products are
// taken in the compute dtype.
Result<HeadStatistics> PriceHead(const Model& model, const OutputHead& head,
                                 const Calibration& calibration, const StoredSequences& hidden,
                                 const std::vector<SequenceLoss>& losses,
                                 const ProbeOptions& options,
                                 std::span<const Format* const> formats);

}  // namespace prismaquant

#endif  // PRISMAQUANT_PROBE_HEAD_COSTS_H_

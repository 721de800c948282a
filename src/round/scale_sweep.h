#ifndef PRISMAQUANT_ROUND_SCALE_SWEEP_H_
#define PRISMAQUANT_ROUND_SCALE_SWEEP_H_

// The scale sweep of the published recipe (docs/rendering.md), kept for comparison: after GPTQ each
// NVFP4 group of the original weight is rounded to nearest under 32 scales, and the best of them
// takes the place of GPTQ's group where its weighted error is less. Pure function.

#include <ATen/core/Tensor.h>

#include "formats/format.h"

namespace prismaquant {

// weight float32 [out, in]; importance float32 [in], what a squared error in a column counts;
// `stored` of NVFP4, its codes and scales are replaced group by group.
void SweepScales(const at::Tensor& weight, const at::Tensor& importance, const Format& format,
                 StoredTensors& stored);

}  // namespace prismaquant

#endif  // PRISMAQUANT_ROUND_SCALE_SWEEP_H_

#ifndef PRISMAQUANT_KERNELS_GPTQ_H_
#define PRISMAQUANT_KERNELS_GPTQ_H_

// The inner loop of GPTQ (Frantar et al. 2022) on one block of columns: each row is rounded column
// by column, the error of a column is spread over the block's remaining columns by the rows of U,
// and when a group begins its scale is chosen on the compensated weights. Rows are independent and
// run in parallel; the operator is prismaquant::gptq_block.

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace prismaquant::ops {

// Which grid the codes lie on; the group sizes are those of the formats.
enum class GptqGrid : int64_t {
  kE2M1Group16 = 0,
  kE4M3Group32 = 1,
  kE4M3Row = 2,
  kE2M1Group32 = 3,
  kInt4Group128 = 4,
  kInt8Group128 = 5
};

// Columns that share a scale; 0: all of a row.
int64_t GptqGroupSize(GptqGrid grid);

// weight [out, columns] float32: the block's compensated weights, overwritten by the quantized
// ones. u [columns, columns] float32: the block of the upper Cholesky factor of the inverse
// Hessian. scale: kE2M1Group16: E4M3 codes U8 [out, columns / 16], written; kE4M3Group32 and
// kE2M1Group32: E8M0 codes U8 [out, columns / 32], written; kInt4Group128 and kInt8Group128:
// float32, bfloat16 or float16 [out, columns / 128], written; kE4M3Row: float32 [out, 1], read.
// codes U8 [out, columns], written: one code per byte, E2M1, E4M3 or q + 2^(bits-1). error [out,
// columns] float32, written: (w - q) / u_jj, for the columns right of the block. global_scale: the
// divisor of NVFP4, 1 otherwise. choose_scales: search the group scale among the codec's and its
// neighbours (docs/rendering.md), else take the codec's. Columns that are no whole groups, and
// tensors of another shape or dtype, throw c10::Error.
void GptqBlock(GptqGrid grid, at::Tensor& weight, const at::Tensor& u, at::Tensor& scale,
               at::Tensor& codes, at::Tensor& error, double global_scale, bool choose_scales);

}  // namespace prismaquant::ops

#endif  // PRISMAQUANT_KERNELS_GPTQ_H_

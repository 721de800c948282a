#ifndef PRISMAQUANT_MODEL_MROPE_H_
#define PRISMAQUANT_MODEL_MROPE_H_

// The three positions (time, row, column) that Qwen3.5's rotary embedding gives a token of a
// sequence with one image. Text counts on in all three alike. The image's tokens share one time and
// take rows and columns of the merged grid, counted from where the text before them ended; the text
// after them goes on behind the longer side of that grid. Pure functions.

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "base/status.h"

namespace prismaquant {

// ids [T] int64; the image's tokens are those equal to `image_token_id`, its grid is in patches ->
// int64 [3, T]. A grid of 0 x 0 stands for no image. kInvalidInput if the image's tokens are not
// one run of grid_rows * grid_columns / merge_size^2 tokens.
Result<at::Tensor> MropePositions(const at::Tensor& ids, int64_t image_token_id, int64_t grid_rows,
                                  int64_t grid_columns, int64_t merge_size);

}  // namespace prismaquant

#endif  // PRISMAQUANT_MODEL_MROPE_H_

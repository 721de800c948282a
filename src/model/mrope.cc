#include "model/mrope.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>

namespace prismaquant {
namespace {

// [3, tokens]: the same position in all three rows.
at::Tensor TextRun(int64_t first, int64_t tokens) {
  return at::arange(first, first + tokens, at::kLong).unsqueeze(0).expand({3, tokens});
}

at::Tensor ImageRun(int64_t first, int64_t rows, int64_t columns) {
  const at::Tensor row = at::arange(rows, at::kLong).repeat_interleave(columns);
  const at::Tensor column = at::arange(columns, at::kLong).repeat({rows});
  return at::stack({at::zeros_like(row), row, column}) + first;
}

}  // namespace

Result<at::Tensor> MropePositions(const at::Tensor& ids, int64_t image_token_id, int64_t grid_rows,
                                  int64_t grid_columns, int64_t merge_size) {
  const int64_t rows = grid_rows / merge_size, columns = grid_columns / merge_size;
  const at::Tensor places = at::nonzero(ids == image_token_id).flatten();
  const int64_t found = places.size(0), tokens = ids.size(0);
  if (found != rows * columns) {
    return Status::InvalidInput(
        fmt::format("{} image tokens (id {}), expected {} for an image of {} x {} patches", found,
                    image_token_id, rows * columns, grid_rows, grid_columns));
  }
  if (found == 0) return TextRun(0, tokens).contiguous();
  const int64_t begin = places[0].item<int64_t>(), end = begin + found;
  if (places[-1].item<int64_t>() != end - 1) {
    return Status::InvalidInput(
        fmt::format("image tokens (id {}) stand apart, expected one image in one run of {} tokens",
                    image_token_id, found));
  }
  return at::cat({TextRun(0, begin), ImageRun(begin, rows, columns),
                  TextRun(begin + std::max(rows, columns), tokens - end)},
                 1);
}

}  // namespace prismaquant

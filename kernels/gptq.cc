#include "kernels/gptq.h"

#include <torch/torch.h>

#include <cmath>
#include <limits>

#include "kernels/gptq_rows.h"
#include "kernels/integer_codes.h"
#include "kernels/minifloat.h"
#include "kernels/operator.h"

namespace prismaquant::ops {
namespace {

bool HasIntegerCodes(GptqGrid grid) {
  return grid == GptqGrid::kInt4Group128 || grid == GptqGrid::kInt8Group128;
}

at::ScalarType ScaleType(GptqGrid grid, const at::Tensor& scale) {
  const at::ScalarType found = scale.scalar_type();
  const bool narrow = found == at::kBFloat16 || found == at::kHalf;
  if (HasIntegerCodes(grid) && narrow) return found;
  return HasIntegerCodes(grid) || grid == GptqGrid::kE4M3Row ? at::kFloat : at::kByte;
}

// As the codec stores a scale, but never infinite.
template <typename T>
float StoredScale(float scale) {
  constexpr auto kLargest = std::numeric_limits<T>::max();
  const float finite = scale < static_cast<float>(kLargest) ? scale : static_cast<float>(kLargest);
  const auto stored = static_cast<float>(static_cast<T>(finite));
  return stored == 0 ? static_cast<float>(std::numeric_limits<T>::epsilon()) : stored;
}

auto StoredScaleOf(at::ScalarType type) {
  if (type == at::kBFloat16) return StoredScale<at::BFloat16>;
  return type == at::kHalf ? StoredScale<at::Half> : StoredScale<float>;
}

void CheckWritten(const char* name, const at::Tensor& tensor, at::IntArrayRef shape,
                  at::ScalarType type) {
  TORCH_CHECK(tensor.sizes() == shape && tensor.scalar_type() == type, name, " is ",
              tensor.scalar_type(), " ", tensor.sizes(), ", expected ", type, " ", shape);
  TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

void CheckArguments(GptqGrid grid, const at::Tensor& weight, const at::Tensor& u,
                    const at::Tensor& scale, const at::Tensor& codes, const at::Tensor& error,
                    double global_scale) {
  TORCH_CHECK(weight.dim() == 2 && weight.size(1) > 0, "weight has shape ", weight.sizes(),
              ", expected [out, columns]");
  const int64_t out = weight.size(0), columns = weight.size(1);
  const int64_t shared = GptqGroupSize(grid), group = shared == 0 ? columns : shared;
  TORCH_CHECK(columns % group == 0, columns, " columns are no multiple of the group size ", group);
  CheckWritten("weight", weight, {out, columns}, at::kFloat);
  CheckWritten("scale", scale, {out, columns / group}, ScaleType(grid, scale));
  CheckWritten("codes", codes, {out, columns}, at::kByte);
  CheckWritten("error", error, {out, columns}, at::kFloat);
  TORCH_CHECK(u.sizes() == at::IntArrayRef({columns, columns}) && u.scalar_type() == at::kFloat,
              "u is ", u.scalar_type(), " ", u.sizes(), ", expected Float [", columns, ", ",
              columns, "]");
  TORCH_CHECK(global_scale > 0 && std::isfinite(static_cast<float>(global_scale)),
              "global_scale is ", global_scale, ", expected finite and positive");
}

void GptqBlockCpu(int64_t grid_number, const at::Tensor& weight, const at::Tensor& u,
                  const at::Tensor& scale, const at::Tensor& codes, const at::Tensor& error,
                  double global_scale, bool choose_scales) {
  const auto grid = static_cast<GptqGrid>(grid_number);
  CheckArguments(grid, weight, u, scale, codes, error, global_scale);
  const at::Tensor factor = u.contiguous();
  const int64_t out = weight.size(0), columns = weight.size(1);
  const int64_t groups = scale.size(1);
  const rows::GptqBlockView block{.columns = columns,
                                  .u = factor.const_data_ptr<float>(),
                                  .global_scale = static_cast<float>(global_scale),
                                  .stored_scale = StoredScaleOf(scale.scalar_type()),
                                  .choose_scales = choose_scales};
  auto* w = weight.mutable_data_ptr<float>();
  auto* c = codes.mutable_data_ptr<uint8_t>();
  auto* e = error.mutable_data_ptr<float>();
  auto* s = static_cast<uint8_t*>(scale.mutable_data_ptr());
  const at::Tensor wide = scale.is_floating_point() ? scale.to(at::kFloat) : at::Tensor();
  auto* f = wide.defined() ? wide.mutable_data_ptr<float>() : nullptr;
  at::parallel_for(0, out, rows::kRowsInStep, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * columns;
    const auto round = [&](auto kernel, auto* scales) {
      kernel(block, end - begin, w + first, scales + begin * groups, c + first, e + first);
    };
    switch (grid) {
      case GptqGrid::kE2M1Group16:
        return round(rows::GptqE2M1Group16, s);
      case GptqGrid::kE4M3Group32:
        return round(rows::GptqE4M3Group32, s);
      case GptqGrid::kE2M1Group32:
        return round(rows::GptqE2M1Group32, s);
      case GptqGrid::kInt4Group128:
        return round(rows::GptqInt4Group128, f);
      case GptqGrid::kInt8Group128:
        return round(rows::GptqInt8Group128, f);
      case GptqGrid::kE4M3Row:
        return round(rows::GptqE4M3Row, f);
    }
  });
  if (HasIntegerCodes(grid)) scale.copy_(wide);
}

TORCH_LIBRARY_FRAGMENT(prismaquant, m) {
  m.def(
      "gptq_block(int grid, Tensor(a!) weight, Tensor u, Tensor(b!) scale, Tensor(c!) codes, "
      "Tensor(d!) error, float global_scale, bool choose_scales) -> ()");
}

TORCH_LIBRARY_IMPL(prismaquant, CPU, m) { m.impl("gptq_block", &GptqBlockCpu); }

}  // namespace

int64_t GptqGroupSize(GptqGrid grid) {
  switch (grid) {
    case GptqGrid::kE2M1Group16:
      return kNvfp4GroupSize;
    case GptqGrid::kE4M3Group32:
    case GptqGrid::kE2M1Group32:
      return kMxGroupSize;
    case GptqGrid::kInt4Group128:
    case GptqGrid::kInt8Group128:
      return kIntGroupSize;
    case GptqGrid::kE4M3Row:
      return 0;
  }
  TORCH_CHECK(false, "grid is ", static_cast<int64_t>(grid), ", expected 0 to 5");
}

void GptqBlock(GptqGrid grid, at::Tensor& weight, const at::Tensor& u, at::Tensor& scale,
               at::Tensor& codes, at::Tensor& error, double global_scale, bool choose_scales) {
  static const auto op =
      Operator<void(int64_t, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                    const at::Tensor&, const at::Tensor&, double, bool)>("prismaquant::gptq_block");
  op.call(static_cast<int64_t>(grid), weight, u, scale, codes, error, global_scale, choose_scales);
}

}  // namespace prismaquant::ops

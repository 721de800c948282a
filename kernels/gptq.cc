#include "kernels/gptq.h"

#include <torch/torch.h>

#include "kernels/gptq_rows.h"
#include "kernels/minifloat.h"

namespace prismaquant::ops {
namespace {

void GptqBlockCpu(int64_t grid, at::Tensor weight, const at::Tensor& u, at::Tensor scale, at::Tensor codes,
                  at::Tensor error, double global_scale, bool choose_scales) {
  const at::Tensor factor = u.contiguous();
  const at::Tensor importance = factor.diagonal().square().reciprocal().contiguous();
  const int64_t out = weight.size(0), columns = weight.size(1);
  TORCH_CHECK(weight.is_contiguous() && codes.is_contiguous() && error.is_contiguous() && scale.is_contiguous(),
              "gptq_block writes in place and needs contiguous tensors");
  TORCH_CHECK(factor.size(0) == columns && factor.size(1) == columns, "u has shape ", factor.sizes());
  const rows::GptqBlockView block{.columns = columns,
                                  .u = factor.const_data_ptr<float>(),
                                  .importance = importance.const_data_ptr<float>(),
                                  .global_scale = static_cast<float>(global_scale),
                                  .choose_scales = choose_scales};
  auto* scale_bytes = static_cast<uint8_t*>(scale.mutable_data_ptr());
  at::parallel_for(0, out, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float* w = weight.data_ptr<float>() + r * columns;
      uint8_t* c = codes.data_ptr<uint8_t>() + r * columns;
      float* e = error.data_ptr<float>() + r * columns;
      switch (static_cast<GptqGrid>(grid)) {
        case GptqGrid::kE2M1Group16:
          rows::GptqE2M1Group16(block, w, scale_bytes + r * (columns / kNvfp4GroupSize), c, e);
          break;
        case GptqGrid::kE4M3Group32:
          rows::GptqE4M3Group32(block, w, scale_bytes + r * (columns / kMxGroupSize), c, e);
          break;
        case GptqGrid::kE4M3Row:
          rows::GptqE4M3Row(block, w, scale.const_data_ptr<float>()[r], c, e);
          break;
      }
    }
  });
}

TORCH_LIBRARY_FRAGMENT(prismaquant, m) {
  m.def(
      "gptq_block(int grid, Tensor(a!) weight, Tensor u, Tensor(b!) scale, Tensor(c!) codes, Tensor(d!) error, "
      "float global_scale, bool choose_scales) -> ()");
}

TORCH_LIBRARY_IMPL(prismaquant, CPU, m) { m.impl("gptq_block", &GptqBlockCpu); }

}  // namespace

void GptqBlock(GptqGrid grid, at::Tensor& weight, const at::Tensor& u, at::Tensor& scale, at::Tensor& codes,
               at::Tensor& error, double global_scale, bool choose_scales) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("prismaquant::gptq_block", "")
          .typed<void(int64_t, at::Tensor, const at::Tensor&, at::Tensor, at::Tensor, at::Tensor, double, bool)>();
  op.call(static_cast<int64_t>(grid), weight, u, scale, codes, error, global_scale, choose_scales);
}

}  // namespace prismaquant::ops

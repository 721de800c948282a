#include "round/scale_sweep.h"

#include <torch/torch.h>

#include "kernels/minifloat.h"

namespace prismaquant {
namespace {

constexpr int64_t kCandidates = 32;
constexpr double kSmallestMultiple = 0.5, kLargestMultiple = 1.5;

// The nearest code of each value, ties to even, and what it means.
struct Nearest {
  at::Tensor codes, values;
};
Nearest RoundToNearest(const at::Tensor& x) {
  const at::Tensor grid = at::tensor({0.0F, 0.5F, 1.0F, 1.5F, 2.0F, 3.0F, 4.0F, 6.0F});
  const at::Tensor middles = (grid.narrow(0, 1, 7) + grid.narrow(0, 0, 7)) / 2;
  const at::Tensor magnitude = x.abs().contiguous();
  const at::Tensor lower = at::bucketize(magnitude, middles);
  const at::Tensor upper = at::bucketize(magnitude, middles, /*out_int32=*/false, /*right=*/true);
  const at::Tensor index = at::where(lower.remainder(2) == 0, lower, upper);
  const at::Tensor negative = x.signbit();
  const at::Tensor value = grid.index_select(0, index.flatten()).view(index.sizes());
  return {.codes = (index + negative.to(at::kLong) * 8).to(at::kByte),
          .values = at::where(negative, -value, value)};
}

at::Tensor Unpack(const at::Tensor& packed) {
  return at::stack({packed.bitwise_and(15), packed.bitwise_right_shift(4)}, 2).flatten(1);
}

}  // namespace

void SweepScales(const at::Tensor& weight, const at::Tensor& importance, const Format& format,
                 StoredTensors& stored) {
  const int64_t out = weight.size(0), groups = weight.size(1) / kNvfp4GroupSize;
  const at::Tensor w = weight.view({out, groups, kNvfp4GroupSize});
  const at::Tensor c = importance.view({groups, kNvfp4GroupSize});
  const at::Tensor global = stored.at("weight_global_scale");
  const auto error_of = [&](const at::Tensor& values) {
    return ((values - w).square() * c).sum(-1, /*keepdim=*/true);
  };
  at::Tensor least = error_of(format.Decode(stored).view(w.sizes()));
  at::Tensor codes = Unpack(stored.at("weight_packed")).view(w.sizes());
  at::Tensor scales = stored.at("weight_scale").to(at::kFloat).view({out, groups, 1});
  const at::Tensor ideal = w.abs().amax(-1, /*keepdim=*/true) / kE2M1Max * global;
  for (int64_t i = 0; i < kCandidates; ++i) {
    const double multiple = kSmallestMultiple + (kLargestMultiple - kSmallestMultiple) *
                                                    static_cast<double>(i) / (kCandidates - 1);
    const at::Tensor scale =
        (ideal * multiple).clamp_max(kE4M3Max).to(at::kFloat8_e4m3fn).to(at::kFloat);
    const at::Tensor step = scale / global;
    const Nearest nearest = RoundToNearest(at::where(step > 0, w / step, at::zeros_like(w)));
    const at::Tensor error = error_of(nearest.values * step);
    const at::Tensor better = at::logical_and(error<least, scale> 0);
    least = at::where(better, error, least);
    codes = at::where(better, nearest.codes, codes);
    scales = at::where(better, scale, scales);
  }
  const at::Tensor pairs = codes.view({out, -1, 2});
  stored["weight_packed"] =
      pairs.select(2, 0).bitwise_or(pairs.select(2, 1).bitwise_left_shift(4)).contiguous();
  stored["weight_scale"] = scales.view({out, groups}).to(at::kFloat8_e4m3fn);
}

}  // namespace prismaquant

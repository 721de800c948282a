#include "round/scale_sweep.h"

#include <ATen/Parallel.h>
#include <torch/torch.h>

#include "kernels/minifloat.h"

namespace prismaquant {
namespace {

constexpr int kCandidates = 32;
constexpr double kSmallestMultiple = 0.5, kLargestMultiple = 1.5;

// One group as it is stored, and what its weighted squared error is.
struct Group {
  uint8_t codes[kNvfp4GroupSize];
  uint8_t scale = 0;  // E4M3
  float error = 0;
};

float SquaredError(const float* values, const float* w, const float* importance) {
  float sum = 0;
  for (int64_t j = 0; j < kNvfp4GroupSize; ++j) {
    const float difference = values[j] - w[j];
    sum += difference * difference * importance[j];
  }
  return sum;
}

Group RoundUnder(uint8_t scale, float global, const float* w, const float* importance) {
  Group group{.codes = {}, .scale = scale};
  const float step = DecodeE4M3(scale) / global;
  float values[kNvfp4GroupSize];
  for (int64_t j = 0; j < kNvfp4GroupSize; ++j) {
    const float value = RoundToE2M1(WithoutNegativeZero(w[j] / step));
    group.codes[j] = EncodeE2M1(value);
    values[j] = value * step;
  }
  group.error = SquaredError(values, w, importance);
  return group;
}

// The best of the candidates if its error is less than `least`, else a group with the scale 0.
Group Sweep(const float* w, const float* importance, float global, float least) {
  Group best{.codes = {}, .error = least};
  const float ideal = LargestMagnitude(w, kNvfp4GroupSize) / kE2M1Max * global;
  for (int i = 0; i < kCandidates; ++i) {
    const double multiple =
        kSmallestMultiple + (kLargestMultiple - kSmallestMultiple) * i / (kCandidates - 1);
    const uint8_t scale = EncodeE4M3(RoundToE4M3(ideal * static_cast<float>(multiple)));
    if (scale == 0) continue;
    const Group group = RoundUnder(scale, global, w, importance);
    if (group.error < best.error) best = group;
  }
  return best;
}

}  // namespace

void SweepScales(const at::Tensor& weight, const at::Tensor& importance, const Format& format,
                 StoredTensors& stored) {
  const int64_t in = weight.size(1), groups = in / kNvfp4GroupSize;
  const at::Tensor source = weight.contiguous();
  const at::Tensor rounded = format.Decode(stored).contiguous();
  at::Tensor packed = stored.at("weight_packed").clone();
  at::Tensor scales = stored.at("weight_scale").view(at::kByte).clone();
  const auto global = stored.at("weight_global_scale").item<float>();
  const auto* c = importance.const_data_ptr<float>();
  at::parallel_for(0, weight.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * groups; n < end * groups; ++n) {
      const int64_t column = n % groups * kNvfp4GroupSize;
      const float* w = source.const_data_ptr<float>() + n * kNvfp4GroupSize;
      const float* before = rounded.const_data_ptr<float>() + n * kNvfp4GroupSize;
      const Group best = Sweep(w, c + column, global, SquaredError(before, w, c + column));
      if (best.scale == 0) continue;
      scales.mutable_data_ptr<uint8_t>()[n] = best.scale;
      PackNibbles(best.codes, packed.mutable_data_ptr<uint8_t>() + n * kNvfp4GroupSize / 2);
    }
  });
  stored["weight_packed"] = packed;
  stored["weight_scale"] = scales.view(at::kFloat8_e4m3fn);
}

}  // namespace prismaquant

#include "kernels/magnitude.h"

#include <ATen/Parallel.h>
#include <torch/library.h>
#include <torch/torch.h>

#include <algorithm>
#include <bit>

#include "kernels/multiversion.h"
#include "kernels/operator.h"

namespace prismaquant::ops {
namespace {

constexpr int64_t kGrain = 1 << 16;  // elements of a task

// The bits of magnitudes are ordered as the magnitudes are, NaN above all.
template <typename Bits, Bits kMask>
PQ_INLINE Bits LargestBits(const Bits* bits, int64_t count) {
  Bits largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto magnitude = static_cast<Bits>(bits[i] & kMask);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

PQ_MULTIVERSION
uint16_t LargestBits16(const uint16_t* bits, int64_t count) {
  return LargestBits<uint16_t, 0x7fff>(bits, count);
}

PQ_MULTIVERSION
uint32_t LargestBits32(const uint32_t* bits, int64_t count) {
  return LargestBits<uint32_t, 0x7fffffff>(bits, count);
}

template <typename Bits, typename Largest>
Bits Reduce(const at::Tensor& tensor, Largest largest) {
  const auto* bits = static_cast<const Bits*>(tensor.const_data_ptr());
  return at::parallel_reduce(
      0, tensor.numel(), kGrain, Bits{0},
      [&](int64_t begin, int64_t end, Bits before) {
        return std::max(before, largest(bits + begin, end - begin));
      },
      [](Bits a, Bits b) { return std::max(a, b); });
}

double LargestMagnitudeCpu(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.is_contiguous(), "a tensor of shape ", tensor.sizes(), " is not contiguous");
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return std::bit_cast<float>(Reduce<uint32_t>(tensor, LargestBits32));
    case at::kBFloat16:
      return std::bit_cast<float>(static_cast<uint32_t>(Reduce<uint16_t>(tensor, LargestBits16))
                                  << 16);
    case at::kHalf:
      return static_cast<float>(
          c10::Half(Reduce<uint16_t>(tensor, LargestBits16), c10::Half::from_bits()));
    default:
      TORCH_CHECK(false, "a tensor is ", tensor.scalar_type(),
                  ", expected Float, Half or BFloat16");
  }
}

TORCH_LIBRARY_FRAGMENT(prismaquant, m) { m.def("largest_magnitude(Tensor tensor) -> float"); }

TORCH_LIBRARY_IMPL(prismaquant, CPU, m) { m.impl("largest_magnitude", &LargestMagnitudeCpu); }

}  // namespace

double LargestMagnitude(const at::Tensor& tensor) {
  static const auto op = Operator<double(const at::Tensor&)>("prismaquant::largest_magnitude");
  return op.call(tensor);
}

}  // namespace prismaquant::ops

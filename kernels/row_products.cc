#include "kernels/row_products.h"

#include <ATen/Parallel.h>
#include <torch/library.h>
#include <torch/torch.h>

#include <array>
#include <bit>
#include <vector>

#include "kernels/multiversion.h"
#include "kernels/operator.h"

namespace prismaquant::ops {
namespace {

constexpr int64_t kParts = 32;

PQ_INLINE float Widen(float x) { return x; }
// The bits of a bfloat16.
PQ_INLINE float Widen(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

template <typename Element>
PQ_INLINE float InnerProduct(const Element* a, const Element* b, int64_t columns) {
  std::array<float, kParts> sums{};
  int64_t j = 0;
  for (; j + kParts <= columns; j += kParts) {
    for (int64_t p = 0; p < kParts; ++p) sums[p] += Widen(a[j + p]) * Widen(b[j + p]);
  }
  for (int64_t p = 0; j < columns; ++j, ++p) sums[p] += Widen(a[j]) * Widen(b[j]);
  for (int64_t width = kParts / 2; width > 0; width /= 2) {
    for (int64_t p = 0; p < width; ++p) sums[p] += sums[p + width];
  }
  return sums[0];
}

PQ_MULTIVERSION
float InnerProductFloat32(const float* a, const float* b, int64_t columns) {
  return InnerProduct(a, b, columns);
}

PQ_MULTIVERSION
float InnerProductBfloat16(const uint16_t* a, const uint16_t* b, int64_t columns) {
  return InnerProduct(a, b, columns);
}

// `product` of a row of each matrix, whose elements are of the type Element.
template <typename Element, typename Product>
void ForRows(const at::Tensor& a, at::TensorList b, at::Tensor& products, Product product) {
  const int64_t rows = a.size(0), columns = a.size(1);
  auto* out = products.mutable_data_ptr<float>();
  const auto* left = static_cast<const Element*>(a.const_data_ptr());
  std::vector<const Element*> right;
  for (const at::Tensor& matrix : b) {
    right.push_back(static_cast<const Element*>(matrix.const_data_ptr()));
  }
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (size_t i = 0; i < right.size(); ++i) {
        out[static_cast<int64_t>(i) * rows + r] =
            product(left + r * columns, right[i] + r * columns, columns);
      }
    }
  });
}

at::Tensor RowProductsCpu(const at::Tensor& a, at::TensorList b) {
  TORCH_CHECK(a.dim() == 2 && a.is_contiguous(), "a has shape ", a.sizes(),
              ", expected contiguous [rows, columns]");
  TORCH_CHECK(a.scalar_type() == at::kFloat || a.scalar_type() == at::kBFloat16, "a is ",
              a.scalar_type(), ", expected Float or BFloat16");
  for (const at::Tensor& matrix : b) {
    TORCH_CHECK(matrix.sizes() == a.sizes() && matrix.scalar_type() == a.scalar_type() &&
                    matrix.is_contiguous(),
                "b is ", matrix.scalar_type(), " ", matrix.sizes(), ", expected contiguous ",
                a.scalar_type(), " ", a.sizes());
  }
  at::Tensor products = at::empty({static_cast<int64_t>(b.size()), a.size(0)}, at::kFloat);
  if (a.scalar_type() == at::kFloat) {
    ForRows<float>(a, b, products, InnerProductFloat32);
  } else {
    ForRows<uint16_t>(a, b, products, InnerProductBfloat16);
  }
  return products;
}

TORCH_LIBRARY_FRAGMENT(prismaquant, m) { m.def("row_products(Tensor a, Tensor[] b) -> Tensor"); }

TORCH_LIBRARY_IMPL(prismaquant, CPU, m) { m.impl("row_products", &RowProductsCpu); }

}  // namespace

at::Tensor RowProducts(const at::Tensor& a, at::TensorList b) {
  static const auto op =
      Operator<at::Tensor(const at::Tensor&, at::TensorList)>("prismaquant::row_products");
  return op.call(a, b);
}

double InnerProduct(const at::Tensor& a, const at::Tensor& b) {
  return RowProducts(a, {b}).sum(at::kDouble).item<double>();
}

}  // namespace prismaquant::ops

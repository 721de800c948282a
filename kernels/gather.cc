#include "kernels/gather.h"

#include <ATen/Parallel.h>
#include <torch/library.h>
#include <torch/torch.h>

#include <optional>
#include <vector>

#include "kernels/multiversion.h"
#include "kernels/operator.h"

namespace prismaquant::ops {
namespace {

template <typename Element>
PQ_INLINE void GatherRow(const Element* row, const int32_t* columns, int64_t count, Element* out) {
  for (int64_t j = 0; j < count; ++j) out[j] = row[columns[j]];
}

PQ_MULTIVERSION
void GatherRow1(const uint8_t* row, const int32_t* columns, int64_t count, uint8_t* out) {
  GatherRow(row, columns, count, out);
}

PQ_MULTIVERSION
void GatherRow2(const uint16_t* row, const int32_t* columns, int64_t count, uint16_t* out) {
  GatherRow(row, columns, count, out);
}

PQ_MULTIVERSION
void GatherRow4(const uint32_t* row, const int32_t* columns, int64_t count, uint32_t* out) {
  GatherRow(row, columns, count, out);
}

std::vector<int32_t> Places(const char* name, const at::Tensor& places, int64_t size) {
  TORCH_CHECK(places.dim() == 1 && places.scalar_type() == at::kLong, name, " are ",
              places.scalar_type(), " ", places.sizes(), ", expected Long of one dimension");
  const at::Tensor all = places.contiguous();
  std::vector<int32_t> found;
  for (int64_t i = 0; i < all.numel(); ++i) {
    const int64_t place = all.const_data_ptr<int64_t>()[i];
    TORCH_CHECK(place >= 0 && place < size, name, " has the place ", place, ", expected below ",
                size);
    found.push_back(static_cast<int32_t>(place));
  }
  return found;
}

template <typename Element, typename Row>
void GatherRows(const at::Tensor& matrix, const std::vector<int32_t>& rows,
                const std::vector<int32_t>& columns, at::Tensor& gathered, Row gather_row) {
  const auto* in = static_cast<const Element*>(matrix.const_data_ptr());
  auto* out = static_cast<Element*>(gathered.mutable_data_ptr());
  const auto count = static_cast<int64_t>(columns.size());
  at::parallel_for(0, gathered.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = rows.empty() ? i : rows[static_cast<size_t>(i)];
      gather_row(in + row * matrix.size(1), columns.data(), count, out + i * count);
    }
  });
}

at::Tensor GatherCpu(const at::Tensor& matrix, const at::Tensor& columns,
                     const std::optional<at::Tensor>& rows) {
  TORCH_CHECK(matrix.dim() == 2 && matrix.is_contiguous(), "matrix has shape ", matrix.sizes(),
              ", expected contiguous [rows, columns]");
  const bool all = !rows || !rows->defined();
  const std::vector<int32_t> column_places = Places("columns", columns, matrix.size(1));
  const std::vector<int32_t> row_places =
      all ? std::vector<int32_t>() : Places("rows", *rows, matrix.size(0));
  at::Tensor gathered =
      at::empty({all ? matrix.size(0) : rows->numel(), columns.numel()}, matrix.options());
  switch (matrix.element_size()) {
    case 1:
      GatherRows<uint8_t>(matrix, row_places, column_places, gathered, GatherRow1);
      break;
    case 2:
      GatherRows<uint16_t>(matrix, row_places, column_places, gathered, GatherRow2);
      break;
    case 4:
      GatherRows<uint32_t>(matrix, row_places, column_places, gathered, GatherRow4);
      break;
    default:
      TORCH_CHECK(false, "matrix is ", matrix.scalar_type(), ", expected 1, 2 or 4 bytes");
  }
  return gathered;
}

TORCH_LIBRARY_FRAGMENT(prismaquant, m) {
  m.def("gather(Tensor matrix, Tensor columns, Tensor? rows) -> Tensor");
}

TORCH_LIBRARY_IMPL(prismaquant, CPU, m) { m.impl("gather", &GatherCpu); }

}  // namespace

at::Tensor Gather(const at::Tensor& matrix, const at::Tensor& columns, const at::Tensor& rows) {
  static const auto op =
      Operator<at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&)>(
          "prismaquant::gather");
  return op.call(matrix, columns, rows.defined() ? std::optional(rows) : std::nullopt);
}

}  // namespace prismaquant::ops

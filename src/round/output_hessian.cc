#include "round/output_hessian.h"

#include <ATen/CPUGeneratorImpl.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "formats/extremes.h"

namespace prismaquant {
namespace {

constexpr uint64_t kProbeSeed = 1;
// c over the mean of the output Hessian's diagonal.
constexpr double kRowDamping = 3;
// A matrix of so many rows at least is rounded in about so many steps; vectors hold 16 rows.
constexpr int64_t kRowSteps = 64;
constexpr int64_t kVectorRows = 16;

}  // namespace

void OutputSketch::Add(const at::Tensor& g, const at::Tensor& squares) {
  if (!probes_.defined()) {
    const int64_t out = g.size(1), columns = std::min(kProbes, out);
    auto generator = at::make_generator<at::CPUGeneratorImpl>(kProbeSeed);
    probes_ = at::randn({out, columns}, generator);
    sketch_ = at::zeros({out, columns});
  }
  const at::Tensor counted = at::minimum(squares, squares.mean());
  const at::Tensor weights =
      (counted / squares.clamp_min(std::numeric_limits<float>::min())).sqrt();
  const at::Tensor rows = g * weights.unsqueeze(1);
  sketch_.add_(at::matmul(rows.t(), at::matmul(rows, probes_)));
  trace_ += counted.sum(at::kDouble).item<double>();
}

at::Tensor OutputSketch::Factor() const {
  if (!(trace_ > 0) || !AllFinite(sketch_)) return {};
  const at::Tensor probes = probes_.to(at::kDouble), sketch = sketch_.to(at::kDouble);
  const at::Tensor core = at::matmul(probes.t(), sketch);
  // K is about S C^+ S^T with the sketch S and the core C, without what is lost in S's rounding.
  const auto [sizes, axes] = at::linalg_eigh((core + core.t()) / 2);
  const int64_t columns = sizes.size(0);
  const double least = static_cast<double>(columns) * std::numeric_limits<float>::epsilon() *
                       sizes[columns - 1].item<double>();
  const at::Tensor known = sizes > least;
  const at::Tensor roots = at::where(known, sizes.clamp_min(least).rsqrt(), at::zeros_like(sizes));
  const at::Tensor half = at::matmul(sketch, axes * roots);
  const auto [squares, turn] = at::linalg_eigh(at::matmul(half.t(), half));
  const int64_t rank = std::min(kRank, columns);
  const double mean = trace_ / static_cast<double>(sketch.size(0));
  return at::matmul(half, turn.narrow(1, columns - rank, rank))
      .div_(std::sqrt(mean))
      .to(at::kFloat);
}

RowFeedback::RowFeedback(const at::Tensor& factor)
    : factor_(factor.to(at::kFloat).contiguous()), answer_(at::empty_like(factor_)) {
  const int64_t rank = factor_.size(1);
  std::vector<double> inverse(static_cast<size_t>(rank * rank), 0),
      product(static_cast<size_t>(rank));
  for (int64_t i = 0; i < rank; ++i) inverse[static_cast<size_t>(i * rank + i)] = 1 / kRowDamping;
  const float* const f = factor_.const_data_ptr<float>();
  float* const a = answer_.mutable_data_ptr<float>();
  for (int64_t k = factor_.size(0) - 1; k >= 0; --k) {
    double square = 0;
    for (int64_t i = 0; i < rank; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < rank; ++j) sum += inverse[i * rank + j] * f[k * rank + j];
      product[i] = sum;
      square += sum * f[k * rank + i];
    }
    for (int64_t i = 0; i < rank; ++i) {
      const double answer = product[i] / (1 + square);
      a[k * rank + i] = static_cast<float>(answer);
      for (int64_t j = 0; j < rank; ++j) inverse[i * rank + j] -= answer * product[j];
    }
  }
}

int64_t RowFeedback::RowsAtATime(int64_t out) const {
  return std::max(out / (kRowSteps * kVectorRows), int64_t{1}) * kVectorRows;
}

at::Tensor RowFeedback::Start(int64_t columns) const {
  return at::zeros({factor_.size(1), columns});
}

at::Tensor RowFeedback::Moved(int64_t first, int64_t rows, const at::Tensor& z) const {
  return at::matmul(answer_.narrow(0, first, rows), z);
}

void RowFeedback::Add(int64_t first, const at::Tensor& errors, at::Tensor& z) const {
  z.addmm_(factor_.narrow(0, first, errors.size(0)).t(), errors);
}

}  // namespace prismaquant

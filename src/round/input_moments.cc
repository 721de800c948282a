#include "round/input_moments.h"

#include <torch/torch.h>

#include <algorithm>

namespace prismaquant {
namespace {

constexpr int64_t kBlockTokens = 4096;

double InnerProduct(const at::Tensor& a, const at::Tensor& b) {
  return (a * b).sum(-1).sum(at::kDouble).item<double>();
}

}  // namespace

InputMoments::InputMoments(int64_t in) : hessian_(at::zeros({in, in}, at::kFloat)) {}

void InputMoments::Add(const at::Tensor& x, const at::Tensor& token_weights,
                       const at::Tensor& lack) {
  if (lack.defined() && !pull_.defined())
    pull_ = at::zeros({lack.size(1), hessian_.size(0)}, at::kFloat);
  for (int64_t begin = 0; begin < x.size(0); begin += kBlockTokens) {
    const int64_t count = std::min(kBlockTokens, x.size(0) - begin);
    const at::Tensor roots = token_weights.defined()
                                 ? token_weights.narrow(0, begin, count).sqrt().unsqueeze(1)
                                 : at::Tensor();
    const auto weighted = [&](const at::Tensor& rows) {
      const at::Tensor block = rows.narrow(0, begin, count).to(at::kFloat);
      return roots.defined() ? block * roots : block;
    };
    const at::Tensor block = weighted(x);
    hessian_.addmm_(block.t(), block);
    if (!lack.defined()) continue;
    const at::Tensor lack_block = weighted(lack);
    pull_.addmm_(lack_block.t(), block);
    lack_energy_ += InnerProduct(lack_block, lack_block);
  }
  tokens_ += x.size(0);
}

InputMoments InputMoments::WithNoise(const at::Tensor& noise) const {
  InputMoments noisy = *this;
  noisy.hessian_ = hessian_ + at::diag(noise);
  return noisy;
}

RoundingError InputMoments::ErrorOf(const at::Tensor& decoded, const at::Tensor& weight) const {
  const at::Tensor difference = decoded - weight;
  RoundingError error;
  error.weight = InnerProduct(at::matmul(difference, hessian_), difference);
  error.output = error.weight;
  if (pull_.defined()) error.output += lack_energy_ - 2 * InnerProduct(difference, pull_);
  return error;
}

}  // namespace prismaquant

#include "round/input_moments.h"

#include <torch/torch.h>

#include <algorithm>

#include "kernels/row_products.h"
#include "kernels/symmetric.h"

namespace prismaquant {
namespace {

constexpr int64_t kBlockTokens = 4096;

// `rows` [tokens, ..] times the root of each token's weight.
at::Tensor Weighted(const at::Tensor& rows, const at::Tensor& token_weights,
                    at::ScalarType products) {
  if (!token_weights.defined()) return rows.to(products);
  return (rows.to(at::kFloat) * token_weights.sqrt().unsqueeze(1)).to(products);
}

at::Tensor Joined(const std::vector<at::Tensor>& pieces) {
  return pieces.empty() ? at::Tensor() : at::cat(pieces);
}

}  // namespace

at::ScalarType ProductType(at::ScalarType compute) {
  return compute == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
}

void AddUpperProduct(const at::Tensor& x, at::Tensor& sum) {
  const int64_t in = x.size(1);
  for (int64_t begin = 0; begin < in; begin += kUpperProductRows) {
    const int64_t rows = std::min(kUpperProductRows, in - begin);
    const at::Tensor left = x.narrow(1, begin, rows).t(), right = x.narrow(1, begin, in - begin);
    at::Tensor block = sum.narrow(0, begin, rows).narrow(1, begin, in - begin);
    if (x.scalar_type() == at::kFloat) {
      block.addmm_(left, right);
    } else {
      block.add_(at::matmul(left, right));
    }
  }
}

void InputRows::Add(const at::Tensor& x, const at::Tensor& token_weights, const at::Tensor& lack) {
  x_.push_back(Weighted(x, token_weights, ProductType(x.scalar_type())));
  if (lack.defined()) lack_.push_back(Weighted(lack, token_weights, ProductType(x.scalar_type())));
  tokens_ += x.size(0);
}

at::Tensor InputRows::x() const { return Joined(x_); }

at::Tensor InputRows::lack() const { return Joined(lack_); }

double InputRows::LackEnergy() const {
  double energy = 0;
  for (const at::Tensor& lack : lack_) {
    const at::Tensor wide = lack.to(at::kFloat);
    energy += ops::InnerProduct(wide, wide);
  }
  return energy;
}

RoundingError InputRows::ErrorOf(const at::Tensor& decoded, const at::Tensor& weight) const {
  RoundingError error;
  if (x_.empty()) return error;
  const at::Tensor difference = (decoded - weight).to(x_.front().scalar_type());
  for (size_t i = 0; i < x_.size(); ++i) {
    const at::Tensor y = at::matmul(x_[i], difference.t()).to(at::kFloat);
    const double square = ops::InnerProduct(y, y);
    error.weight += square;
    if (lack_.empty()) {
      error.output += square;
    } else {
      const at::Tensor distance = y - lack_[i];
      error.output += ops::InnerProduct(distance, distance);
    }
  }
  return error;
}

InputMoments::InputMoments(int64_t in) : hessian_(at::zeros({in, in}, at::kFloat)) {}

void InputMoments::Add(const at::Tensor& x, const at::Tensor& token_weights) {
  for (int64_t begin = 0; begin < x.size(0); begin += kBlockTokens) {
    const int64_t count = std::min(kBlockTokens, x.size(0) - begin);
    const at::Tensor weights =
        token_weights.defined() ? token_weights.narrow(0, begin, count) : token_weights;
    const at::Tensor block =
        Weighted(x.narrow(0, begin, count), weights, ProductType(x.scalar_type()));
    AddUpperProduct(block, hessian_);
  }
  ops::MirrorUpper(hessian_);
  tokens_ += x.size(0);
}

InputMoments InputMoments::WithNoise(const at::Tensor& noise) const {
  InputMoments noisy = *this;
  noisy.hessian_ = hessian_ + at::diag(noise);
  return noisy;
}

RoundingError InputMoments::ErrorOf(const at::Tensor& decoded, const at::Tensor& weight) const {
  const at::Tensor difference = decoded - weight;
  const double error = ops::InnerProduct(at::matmul(difference, hessian_), difference);
  return {.weight = error, .output = error};
}

}  // namespace prismaquant

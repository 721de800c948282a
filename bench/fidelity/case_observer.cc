#include "bench/fidelity/case_observer.h"

#include <torch/torch.h>

#include <algorithm>
#include <utility>

namespace prismaquant {
namespace {

double Sum(const at::Tensor& values) { return values.sum(at::kDouble).item<double>(); }

// Squares are summed along rows in float32 and the row sums in float64.
double SumOfSquares(const at::Tensor& values) {
  return Sum(values.dim() > 1 ? values.square().sum(-1) : values.to(at::kDouble).square());
}

// Pieces are `length` consecutive rows of [tokens, ..].
double WindowSquares(const at::Tensor& values, int64_t length) {
  double squares = 0;
  for (int64_t begin = 0; begin < values.size(0); begin += length) {
    const int64_t count = std::min(length, values.size(0) - begin);
    squares += SumOfSquares(values.narrow(0, begin, count).sum(0));
  }
  return squares;
}

double& At(Terms& terms, Term term) { return terms[static_cast<size_t>(term)]; }

// change [tokens, out]
void AddOutputs(const at::Tensor& change, Terms& terms) {
  At(terms, Term::kRows) += SumOfSquares(change.sum(0));
  At(terms, Term::kRows64) += WindowSquares(change, 64);
  At(terms, Term::kElements) += SumOfSquares(change);
}

// change [out, in]
void AddWeights(const at::Tensor& change, Terms& terms) {
  At(terms, Term::kWeightRows) += SumOfSquares(change.sum(1));
  At(terms, Term::kWeightColumns) += SumOfSquares(change.sum(0));
  At(terms, Term::kWeightElements) += SumOfSquares(change);
}

// change [tokens, in]
void AddInputs(const at::Tensor& change, Terms& terms) {
  const at::Tensor tokens = change.sum(1).to(at::kDouble);
  At(terms, Term::kInputs) += WindowSquares(tokens, tokens.size(0));
  At(terms, Term::kInputTokens) += SumOfSquares(tokens);
  At(terms, Term::kInputColumns) += SumOfSquares(change.sum(0));
  At(terms, Term::kInputElements) += SumOfSquares(change);
}

void AddWholes(const at::Tensor& per_token, Terms& terms) {
  At(terms, Term::kWhole) += WindowSquares(per_token, per_token.size(0));
  At(terms, Term::kWhole16) += WindowSquares(per_token, 16);
  At(terms, Term::kWhole32) += WindowSquares(per_token, 32);
  At(terms, Term::kWhole64) += WindowSquares(per_token, 64);
  At(terms, Term::kWhole128) += WindowSquares(per_token, 128);
  At(terms, Term::kWhole256) += WindowSquares(per_token, 256);
  At(terms, Term::kTokens) += SumOfSquares(per_token);
}

void Accumulate(const at::Tensor& added, at::Tensor& sum) {
  sum = sum.defined() ? sum + added : added;
}

}  // namespace

CaseObserver::CaseObserver(const SourceBody& body, const FidelityCase& one, bool weights_only,
                           CaseObservations& result)
    : scales_(one.scales), weights_only_(weights_only) {
  for (const Format* format : one.formats) {
    formats_.push_back({.format = format, .found = &result.at(std::string(format->name()))});
  }
  for (const LinearInfo& linear : one.linears) {
    Member& member = members_.emplace_back();
    member.weight = &body.weights(linear.layer).weight.at(linear.name);
    for (const Format* format : one.formats) {
      member.errors.push_back(RoundedWeight(body, one, linear, *format) - *member.weight);
    }
  }
}

void CaseObserver::BeginSequence() {
  for (Member& member : members_) member.outputs.clear();
  for (Priced& priced : formats_) priced.input_error = at::Tensor();
}

void CaseObserver::SetInput(const at::Tensor& x, Member& member) {
  for (size_t i = 0; i < formats_.size(); ++i) {
    Priced& priced = formats_[i];
    member.outputs.push_back(at::matmul(x, member.errors[i].t()));
    if (weights_only_ || !priced.format->quantizes_activations()) continue;
    if (!priced.input_error.defined()) {
      priced.input_error = priced.format->QuantizeActivation(x, scales_) - x;
    }
    member.outputs.back() += at::matmul(priced.input_error, member.weight->t());
  }
}

void CaseObserver::Observe(size_t member_index, const at::Tensor& x, const at::Tensor& g,
                           const at::Tensor& dx) {
  Member& member = members_[member_index];
  if (member.outputs.empty()) SetInput(x, member);
  Accumulate(dx, dx_);
  const at::Tensor g_square = g.square(), x_square = x.square();
  const double trace = Sum(g_square.sum(-1).to(at::kDouble) * x_square.sum(-1));
  const at::Tensor weight_gradient = at::matmul(g.t(), x);
  const at::Tensor token_gradient_squares = at::matmul(g_square.t(), x_square);
  for (size_t i = 0; i < formats_.size(); ++i) {
    Priced& priced = formats_[i];
    const at::Tensor output_change = g * member.outputs[i];
    Accumulate(output_change.sum(-1).to(at::kDouble), priced.per_token);
    AddOutputs(output_change, priced.terms);
    const at::Tensor weight_change = weight_gradient * member.errors[i];
    priced.weights += Sum(weight_change.sum(-1));
    AddWeights(weight_change, priced.terms);
    const at::Tensor error_square = member.errors[i].square();
    At(priced.terms, Term::kWeightTokens) += Sum((token_gradient_squares * error_square).sum(-1));
    At(priced.terms, Term::kFisherTrace) +=
        trace * Sum(error_square.sum(-1)) / static_cast<double>(error_square.numel());
    if (priced.input_error.defined()) {
      At(priced.terms, Term::kInputColumnsApart) += SumOfSquares((dx * priced.input_error).sum(0));
    }
  }
}

void CaseObserver::EndDraw(size_t draw, size_t sequence) {
  for (Priced& priced : formats_) {
    if (!priced.per_token.defined()) continue;
    AddWholes(priced.per_token, priced.terms);
    At(priced.terms, Term::kWeights) += priced.weights * priced.weights;
    if (priced.input_error.defined()) AddInputs(dx_ * priced.input_error, priced.terms);
    priced.found->terms[draw][sequence] = std::exchange(priced.terms, Terms{});
    priced.per_token = at::Tensor();
    priced.weights = 0;
  }
  dx_ = at::Tensor();
}

}  // namespace prismaquant

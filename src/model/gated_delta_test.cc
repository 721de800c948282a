#include "model/gated_delta.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <vector>

namespace prismaquant {
namespace {

constexpr int64_t kSequences = 2, kHeads = 3, kKeyDim = 8, kValueDim = 12;

using Rule = at::Tensor (*)(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                            const at::Tensor&, const at::Tensor&);

// q, k, v, g, beta as a layer makes them: unit keys, beta in (0, 1), decays from none to total.
std::vector<at::Tensor> Inputs(int64_t tokens, at::ScalarType dtype) {
  torch::manual_seed(tokens);
  const auto options = torch::dtype(dtype);
  const at::Tensor decay_strength = torch::tensor({1e-3, 1.0, 40.0}, options).view({1, kHeads, 1});
  std::vector<at::Tensor> inputs = {
      L2Norm(torch::randn({kSequences, kHeads, tokens, kKeyDim}, options)),
      L2Norm(torch::randn({kSequences, kHeads, tokens, kKeyDim}, options)),
      torch::randn({kSequences, kHeads, tokens, kValueDim}, options),
      -torch::rand({kSequences, kHeads, tokens}, options) * decay_strength,
      torch::rand({kSequences, kHeads, tokens}, options)};
  for (at::Tensor& input : inputs) input = input.detach().set_requires_grad(true);
  return inputs;
}

// The output, followed by the gradients of <output, fixed direction> by q, k, v, g and beta.
std::vector<at::Tensor> OutputAndGradients(Rule rule, const std::vector<at::Tensor>& inputs) {
  const at::Tensor output = rule(inputs[0], inputs[1], inputs[2], inputs[3], inputs[4]);
  const at::Tensor direction =
      at::arange(output.numel(), output.options().requires_grad(false)).sin().view(output.sizes());
  std::vector<at::Tensor> result = {output.detach()};
  for (at::Tensor& gradient : torch::autograd::grad({(output * direction).sum()}, inputs)) {
    result.push_back(gradient);
  }
  return result;
}

void ExpectFormsAgree(int64_t tokens, at::ScalarType dtype, double tolerance) {
  const std::vector<at::Tensor> inputs = Inputs(tokens, dtype);
  const std::vector<at::Tensor> chunked = OutputAndGradients(&ChunkedGatedDelta, inputs);
  const std::vector<at::Tensor> recurrent = OutputAndGradients(&RecurrentGatedDelta, inputs);
  ASSERT_EQ(chunked.size(), recurrent.size());
  for (size_t i = 0; i < chunked.size(); ++i) {
    ASSERT_EQ(chunked[i].sizes(), recurrent[i].sizes());
    EXPECT_EQ(chunked[i].scalar_type(), dtype);
    const double scale = recurrent[i].abs().max().item<double>() + 1e-3;
    const double error = (chunked[i] - recurrent[i]).abs().max().item<double>();
    EXPECT_LE(error, tolerance * scale) << tokens << " tokens, tensor " << i;
  }
}

TEST(GatedDelta, ChunkedIsTheRecurrenceWithItsGradients) {
  for (const int64_t tokens : {1, 2, 63, 64, 65, 128, 130}) {
    ExpectFormsAgree(tokens, at::kDouble, 1e-12);
  }
}

TEST(GatedDelta, ChunkedStaysCloseInSinglePrecision) { ExpectFormsAgree(130, at::kFloat, 1e-4); }

TEST(GatedDelta, RecurrenceFollowsItsDefinition) {
  const auto options = torch::dtype(at::kDouble);
  const at::Tensor q = torch::tensor({1.0, 2.0}, options).view({1, 1, 2, 1});
  const at::Tensor k = torch::tensor({1.0, 0.5}, options).view({1, 1, 2, 1});
  const at::Tensor v = torch::tensor({3.0, 5.0}, options).view({1, 1, 2, 1});
  const at::Tensor g = torch::tensor({-0.1, std::log(0.5)}, options).view({1, 1, 2});
  const at::Tensor beta = torch::tensor({0.5, 0.25}, options).view({1, 1, 2});
  // S1 = 0.5 * 3 = 1.5. Then S' = 0.75, d = 0.25 * (5 - 0.75 * 0.5) = 1.15625 and
  // S2 = 0.75 + 0.5 * 1.15625 = 1.328125, read with 2.
  const at::Tensor output = RecurrentGatedDelta(q, k, v, g, beta);
  EXPECT_DOUBLE_EQ(output[0][0][0][0].item<double>(), 1.5);
  EXPECT_DOUBLE_EQ(output[0][0][1][0].item<double>(), 2.65625);
}

TEST(GatedDelta, AnOutputDependsOnNoLaterToken) {
  const at::NoGradGuard no_grad;
  const std::vector<at::Tensor> inputs = Inputs(100, at::kDouble);
  const at::Tensor before =
      ChunkedGatedDelta(inputs[0], inputs[1], inputs[2], inputs[3], inputs[4]);
  const at::Tensor values = inputs[2].detach().clone();
  values.narrow(2, 70, 30).mul_(-3);
  const at::Tensor after = ChunkedGatedDelta(inputs[0], inputs[1], values, inputs[3], inputs[4]);
  EXPECT_TRUE(at::equal(before.narrow(2, 0, 70), after.narrow(2, 0, 70)));
  EXPECT_FALSE(at::allclose(before.narrow(2, 70, 30), after.narrow(2, 70, 30)));
}

TEST(GatedDelta, TotalForgettingStaysFinite) {
  std::vector<at::Tensor> inputs = Inputs(130, at::kFloat);
  inputs[3] = at::full_like(inputs[3], -200.0).detach().set_requires_grad(true);
  for (const at::Tensor& tensor : OutputAndGradients(&ChunkedGatedDelta, inputs)) {
    EXPECT_TRUE(tensor.isfinite().all().item<bool>());
  }
}

TEST(L2Norm, GivesUnitVectorsAndSparesZero) {
  const at::Tensor x = torch::tensor({{3.0, 4.0}, {0.0, 0.0}}, torch::dtype(at::kDouble));
  const at::Tensor y = L2Norm(x);
  EXPECT_NEAR(y[0][0].item<double>(), 0.6, 1e-7);
  EXPECT_NEAR(y[0][1].item<double>(), 0.8, 1e-7);
  EXPECT_EQ(y[1].abs().max().item<double>(), 0);
}

}  // namespace
}  // namespace prismaquant

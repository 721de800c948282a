#include "probe/linear_probe.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

namespace prismaquant {
namespace {

class Recorder : public LinearObserver {
 public:
  void Observe(int seen, const at::Tensor& input, const at::Tensor& output_gradient,
               const at::Tensor& input_gradient) override {
    id = seen;
    x = input.clone();
    g = output_gradient.clone();
    dx = input_gradient.clone();
  }
  int id = -1;
  at::Tensor x, g, dx;
};

TEST(LinearProbe, ShowsWhatAutogradComputes) {
  torch::manual_seed(3);
  const at::Tensor weight = torch::randn({4, 6}, at::kDouble),
                   bias = torch::randn({4}, at::kDouble);
  const at::Tensor x = torch::randn({1, 3, 6}, at::kDouble).requires_grad_(true);
  Recorder recorder;
  const at::Tensor y = ApplyProbed(x, weight, bias, 7, recorder);
  EXPECT_TRUE(y.allclose(at::linear(x, weight, bias)));
  const at::Tensor loss = (y.sin() * y).sum();
  const at::Tensor dx = torch::autograd::grad({loss}, {x})[0];

  const at::Tensor plain = x.detach().clone().requires_grad_(true);
  const at::Tensor y_plain = at::linear(plain, weight, bias);
  const auto expected = torch::autograd::grad({(y_plain.sin() * y_plain).sum()}, {plain, y_plain});
  EXPECT_EQ(recorder.id, 7);
  EXPECT_TRUE(dx.allclose(expected[0]));
  EXPECT_TRUE(recorder.dx.allclose(expected[0].flatten(0, 1)));
  EXPECT_TRUE(recorder.g.allclose(expected[1].flatten(0, 1)));
  EXPECT_TRUE(recorder.x.equal(x.detach().flatten(0, 1)));
}

TEST(LinearProbe, GradientsAreThoseOfAnOutputThatIsNotNeeded) {
  torch::manual_seed(5);
  const at::Tensor weight = torch::randn({4, 6}, at::kDouble),
                   upstream = torch::randn({1, 3, 4}, at::kDouble);
  const at::Tensor x = torch::randn({1, 3, 6}, at::kDouble).requires_grad_(true);
  Recorder with, without;
  const at::Tensor y = ApplyProbed(x, weight, {}, 0, with);
  const at::Tensor zeros = ApplyProbed(x, weight, {}, 1, without, /*needed=*/false);
  EXPECT_TRUE(zeros.equal(at::zeros_like(y)));
  EXPECT_TRUE(torch::autograd::grad({zeros}, {x}, {upstream})[0].equal(
      torch::autograd::grad({y}, {x}, {upstream})[0]));
  EXPECT_TRUE(without.x.equal(with.x));
  EXPECT_TRUE(without.g.equal(with.g));
  EXPECT_TRUE(without.dx.equal(with.dx));
}

TEST(LinearProbe, TwoReadersOfOneInputEachSeeTheirShare) {
  torch::manual_seed(4);
  const at::Tensor first = torch::randn({4, 6}, at::kDouble).requires_grad_(true);
  const at::Tensor second = torch::randn({5, 6}, at::kDouble);
  const at::Tensor x = torch::randn({2, 3, 6}, at::kDouble).requires_grad_(true);
  Recorder a, b;
  const at::Tensor u = ApplyProbed(x, first, {}, 0, a), v = ApplyProbed(x, second, {}, 1, b);
  ((u * u).sum() + (3 * v).sum()).backward();
  EXPECT_TRUE(a.g.allclose(2 * u.detach().reshape({6, 4})));
  EXPECT_TRUE(b.g.equal(at::full({6, 5}, 3.0, at::kDouble)));
  EXPECT_TRUE(a.dx.allclose(at::matmul(a.g, first.detach())));
  EXPECT_TRUE(b.dx.allclose(at::matmul(b.g, second)));
  EXPECT_TRUE(x.grad().reshape({6, 6}).allclose(a.dx + b.dx));
  EXPECT_FALSE(first.grad().defined());
}

}  // namespace
}  // namespace prismaquant

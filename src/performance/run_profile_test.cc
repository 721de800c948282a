#include "performance/run_profile.h"

#include <ATen/record_function.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <thread>

#include "performance/operator_work.h"

namespace prismaquant {
namespace {

using ::testing::ElementsAre;

const KernelMeasure* Find(const std::vector<KernelMeasure>& kernels, const std::string& stage,
                          const std::string& kernel) {
  const auto found = std::find_if(kernels.begin(), kernels.end(), [&](const KernelMeasure& one) {
    return one.stage == stage && one.kernel == kernel;
  });
  return found == kernels.end() ? nullptr : &*found;
}

void Multiply(int64_t m, int64_t k, int64_t n) { at::mm(at::ones({m, k}), at::ones({k, n})); }

TEST(RunProfile, CountsProductsOfTheStageTheyRunIn) {
  const RunProfile profile(RunProfile::Detail::kKernels);
  for (int i = 0; i < 2; ++i) {
    RECORD_USER_SCOPE("first");
    Multiply(2, 3, 4);
  }
  {
    RECORD_USER_SCOPE("second");
    Multiply(5, 6, 7);
  }
  const std::vector<KernelMeasure> kernels = profile.Kernels();
  const KernelMeasure* first = Find(kernels, "first", "mm float32");
  const KernelMeasure* second = Find(kernels, "second", "mm float32");
  ASSERT_NE(first, nullptr);
  ASSERT_NE(second, nullptr);
  EXPECT_EQ(first->calls, 2);
  EXPECT_EQ(first->flop, 2 * 2 * 2 * 3 * 4);
  EXPECT_EQ(first->bytes, 2 * 4 * (2 * 3 + 3 * 4 + 2 * 4));
  EXPECT_EQ(second->flop, 2 * 5 * 6 * 7);
}

TEST(RunProfile, StagesAreInOrderAndHaveTheTimeOfWhatTheyHold) {
  const RunProfile profile(RunProfile::Detail::kStages);
  {
    RECORD_USER_SCOPE("outer");
    {
      RECORD_USER_SCOPE("inner");
      std::this_thread::sleep_for(std::chrono::milliseconds(30));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  const std::vector<StageMeasure> stages = profile.Stages();
  ASSERT_EQ(stages.size(), 2U);
  EXPECT_EQ(stages[0].stage, "outer");
  EXPECT_EQ(stages[1].stage, "inner");
  EXPECT_GE(stages[1].seconds, 0.03);
  EXPECT_GE(stages[0].seconds, stages[1].seconds + 0.02);
  const std::vector<KernelMeasure> kernels = profile.Kernels();
  const KernelMeasure* own = Find(kernels, "outer", "");
  ASSERT_NE(own, nullptr);
  EXPECT_LT(own->seconds, stages[0].seconds - 0.03 + 1e-9);
}

TEST(RunProfile, KnowsThePeakOfEachStage) {
  constexpr int64_t kElements = 100'000'000;
  const RunProfile profile(RunProfile::Detail::kStages);
  {
    RECORD_USER_SCOPE("large");
    at::ones({kElements}, at::kFloat);
  }
  {
    RECORD_USER_SCOPE("small");
    at::ones({10}, at::kFloat);
  }
  const std::vector<StageMeasure> stages = profile.Stages();
  ASSERT_EQ(stages.size(), 2U);
  EXPECT_GE(stages[0].peak_bytes, kElements * 4);
  EXPECT_LE(stages[1].peak_bytes, stages[0].peak_bytes - kElements * 3);
  EXPECT_GE(profile.PeakMemoryBytes(), stages[0].peak_bytes);
}

TEST(RunProfile, SeesNothingOnceItIsGone) {
  { const RunProfile profile(RunProfile::Detail::kKernels); }
  RECORD_USER_SCOPE("later");
  Multiply(2, 2, 2);
  const RunProfile profile(RunProfile::Detail::kKernels);
  EXPECT_THAT(profile.Stages(), ElementsAre());
}

TEST(OperatorFlop, OfFactorsAndSolves) {
  const std::vector<c10::IValue> factor = {at::ones({30, 30})};
  EXPECT_EQ(OperatorFlop("prismaquant::cholesky_", factor), 30 * 30 * 30 / 3);
  EXPECT_EQ(OperatorFlop("aten::cholesky_inverse", factor), 2 * 30 * 30 * 30 / 3);
  EXPECT_EQ(OperatorFlop("aten::mm", factor), 0);
  const std::vector<c10::IValue> solve = {at::ones({10, 10}), at::ones({10, 4})};
  EXPECT_EQ(OperatorFlop("aten::linalg_solve_triangular", solve), 10 * 10 * 4);
  EXPECT_EQ(OperatorFlop("aten::add", solve), 0);
}

TEST(OperatorFlop, OfBatchesAndAttention) {
  const std::vector<c10::IValue> batch = {at::ones({5, 2, 3}), at::ones({5, 3, 4})};
  EXPECT_EQ(OperatorFlop("aten::bmm", batch), 5 * 2 * 2 * 3 * 4);
  const std::vector<c10::IValue> qkv = {at::ones({1, 2, 6, 8}), at::ones({1, 2, 7, 8})};
  EXPECT_EQ(OperatorFlop("aten::_scaled_dot_product_flash_attention_for_cpu", qkv),
            2 * 2 * (2 * 6 * 7 * 8));
  const std::vector<c10::IValue> rows = {
      at::ones({3, 4}), std::vector<at::Tensor>{at::ones({3, 4}), at::ones({3, 4})}};
  EXPECT_EQ(OperatorFlop("prismaquant::row_products", rows), 2 * 2 * 3 * 4);
}

TEST(KernelName, HasTheDtype) {
  const std::vector<c10::IValue> values = {at::ones({2}, at::kBFloat16)};
  EXPECT_EQ(KernelName("aten::mm", values), "mm bf16");
  EXPECT_EQ(KernelName("prismaquant::gptq_block", {}), "prismaquant::gptq_block");
}

}  // namespace
}  // namespace prismaquant

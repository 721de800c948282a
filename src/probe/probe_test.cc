#include "probe/probe.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstdlib>
#include <memory>

#include "formats/format.h"
#include "io/faulty_file_system.h"
#include "io/temporary_folder.h"
#include "probe/tiny_checkpoint.h"
#include "probe/unit_costs.h"

namespace prismaquant {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

// The bundled model and a few short windows.
class ProbeTest : public ::testing::Test {
 protected:
  void SetUp() override {
    at::set_num_threads(1);
    const char* source = std::getenv("PRISMAQUANT_SOURCE_DIR");
    ASSERT_NE(source, nullptr) << "PRISMAQUANT_SOURCE_DIR is not set; ctest sets it";
    const std::filesystem::path root = source;
    Result<Checkpoint> checkpoint = Checkpoint::Open(root / "examples" / "tiny-qwen3_5");
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().message();
    checkpoint_ = std::make_unique<Checkpoint>(std::move(checkpoint).value());
    model_ = Model::Open(*checkpoint_).value();
    for (int32_t n = 0; n < 3; ++n) {
      std::vector<int32_t>& window = windows_.windows.emplace_back();
      for (int32_t t = 0; t < 20; ++t) window.push_back((n * 31 + t * t * 7 + 100) % 2000);
    }
  }
  RunStore Store(const std::string& name, FileSystem& fs = FileSystem::Default()) const {
    return RunStore::Open(fs, folder_ / name).value();
  }
  Status Run(RunStore& store) const { return RunProbe(*model_, windows_, {}, store); }
  int64_t tokens() const { return LossTokens(windows_, LabelRule::kSampled); }

  TemporaryFolder folder_;
  std::unique_ptr<Checkpoint> checkpoint_;
  std::unique_ptr<Model> model_;
  TokenWindows windows_;
};

void ExpectSame(RunStore& a, RunStore& b) {
  const auto stats_a = a.Stats().value(), stats_b = b.Stats().value();
  ASSERT_EQ(stats_a.size(), stats_b.size());
  for (size_t i = 0; i < stats_a.size(); ++i) {
    EXPECT_EQ(stats_a[i].name, stats_b[i].name);
    EXPECT_EQ(stats_a[i].input_amax, stats_b[i].input_amax);
    EXPECT_EQ(stats_a[i].fisher_trace, stats_b[i].fisher_trace);
  }
  const auto costs_a = a.Costs().value(), costs_b = b.Costs().value();
  ASSERT_EQ(costs_a.size(), costs_b.size());
  for (const auto& [linear, formats] : costs_a) {
    for (const auto& [format, cost] : formats) {
      EXPECT_EQ(cost.directional, costs_b.at(linear).at(format).directional) << linear;
    }
  }
}

TEST_F(ProbeTest, AnInterruptedProbeGoesOnToTheSameNumbers) {
  FaultyFileSystem counting;
  RunStore whole = Store("whole", counting);
  ASSERT_TRUE(Run(whole).ok());
  const int64_t operations = counting.operations();
  int failures = 0;
  for (int64_t n = 3; n < operations; n = n * 3 / 2 + 1) {
    FaultyFileSystem faulty;
    {
      RunStore store = Store("resumed", faulty);
      faulty.FailFrom(faulty.operations() + n);
      if (!Run(store).ok()) ++failures;
    }
  }
  EXPECT_GT(failures, 3);
  RunStore resumed = Store("resumed");
  ASSERT_TRUE(Run(resumed).ok());
  ExpectSame(whole, resumed);
}

TEST_F(ProbeTest, AFinishedProbeIsReusedAndItsTemporaryFilesAreGone) {
  RunStore store = Store("work");
  ASSERT_TRUE(Run(store).ok());
  const std::set<std::string> files = folder_.List();
  for (const std::string& name : files) {
    EXPECT_EQ(name.find("gradient"), std::string::npos) << name;
    EXPECT_EQ(name.find("hidden"), std::string::npos) << name;
  }
  const auto before = std::filesystem::last_write_time(folder_ / "work" / "run.sqlite");
  ASSERT_TRUE(Run(store).ok());
  EXPECT_EQ(std::filesystem::last_write_time(folder_ / "work" / "run.sqlite"), before);
  EXPECT_EQ(folder_.List(), files);
}

TEST_F(ProbeTest, UnitsSumTheirMembersBeforeSquaring) {
  RunStore store = Store("work");
  ASSERT_TRUE(Run(store).ok());
  const auto costs = store.Costs().value();
  const auto units = BuildUnitCosts(*model_, store, tokens(), {.any_kernel = true}).value();
  bool fused = false;
  for (const UnitCosts& unit : units) {
    for (const UnitFormat& format : unit.formats) {
      double squares = 0;
      for (size_t n = 0; n < 3; ++n) {
        double s = 0;
        for (const std::string& linear : unit.linears)
          s += costs.at(linear).at(format.format).directional[n];
        squares += s * s;
      }
      EXPECT_NEAR(format.cost, squares / 2 / 60, 1e-12 * (1 + squares)) << unit.name;
      int64_t bytes = 0;
      for (const LinearInfo& linear : model_->linears()) {
        if (linear.unit != unit.name) continue;
        bytes += FindFormat(format.format)->Bytes(linear.out, linear.in, linear.dtype);
      }
      EXPECT_EQ(format.bytes, bytes);
    }
    fused |= unit.linears.size() > 1;
  }
  EXPECT_TRUE(fused);
}

TEST_F(ProbeTest, JointLossHasTheCrossTermsBetweenUnits) {
  RunStore store = Store("work");
  ASSERT_TRUE(Run(store).ok());
  const auto costs = store.Costs().value();
  std::map<std::string, std::string> choices;
  std::vector<double> sums(3, 0);
  for (const LinearInfo& linear : model_->linears()) {
    if (!linear.allocatable) continue;
    choices[linear.name] = linear.layer % 2 == 0 ? "nvfp4" : "fp8";
    for (size_t n = 0; n < 3; ++n)
      sums[n] += costs.at(linear.name).at(choices[linear.name]).directional[n];
  }
  const double expected = (sums[0] * sums[0] + sums[1] * sums[1] + sums[2] * sums[2]) / 2 / 60;
  EXPECT_NEAR(JointLoss(store, tokens(), choices).value(), expected, 1e-12 * (1 + expected));
}

TEST_F(ProbeTest, KernelRulesTakeFormatsFromNarrowUnits) {
  const auto count = [&](bool any_kernel) {
    int mxfp8 = 0;
    for (const UnitCosts& unit : UnitsWithoutCosts(*model_, any_kernel)) {
      for (const UnitFormat& format : unit.formats) {
        mxfp8 += format.format == "mxfp8";
        EXPECT_EQ(format.cost, 0);
      }
    }
    return mxfp8;
  };
  // Down, output and gate projections of 192 and 640 outputs: 640 is a multiple of 128, 192 is not.
  EXPECT_GT(count(true), count(false));
  EXPECT_GT(count(false), 0);
}

TEST_F(ProbeTest, AnUnfinishedProbeHasNoCosts) {
  RunStore store = Store("work");
  const Status status = BuildUnitCosts(*model_, store, tokens(), {}).status();
  EXPECT_EQ(status.code(), StatusCode::kInvalidInput);
  EXPECT_THAT(status.message(), HasSubstr("prismaquant probe"));
}

TEST(NonFiniteProbe, IsRefusedNamingWhatOverflowed) {
  const std::map<std::string, std::string> cases = {
      {"model.layers.1.mlp.down_proj.weight", "the output of layer 1 "},
      {"model.norm.weight", "the gradient of the loss "},
      {"model.layers.1.mlp.up_proj.weight", "the Fisher trace of model.layers.1.mlp.down_proj "}};
  for (const auto& [scaled, what] : cases) {
    const TinyCheckpoint tiny({{scaled, scaled.ends_with("up_proj.weight") ? 1e19 : 3e38}});
    const TemporaryFolder folder;
    RunStore store = RunStore::Open(FileSystem::Default(), folder / "work").value();
    const Status status = RunProbe(tiny.model(), tiny.windows(), {}, store);
    EXPECT_EQ(status.code(), StatusCode::kInvalidInput) << scaled << ": " << status.message();
    EXPECT_THAT(status.message(), AllOf(HasSubstr(": " + what), HasSubstr("not finite")));
    EXPECT_FALSE(*store.IsDone("backward", 1));
  }
}

TEST_F(ProbeTest, PositionsWithALossAreCounted) {
  EXPECT_EQ(LossTokens(windows_, LabelRule::kSampled), 60);
  EXPECT_EQ(LossTokens(windows_, LabelRule::kData), 57);
}

}  // namespace
}  // namespace prismaquant

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

// The bundled model with a few short windows and two captioned images: all parts of a model.
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
      std::vector<int32_t>& window = calibration_.text.windows.emplace_back();
      for (int32_t t = 0; t < 20; ++t) window.push_back((n * 31 + t * t * 7 + 100) % 2000);
    }
    const ModelConfig& config = model_->config();
    const Tokenizer tokenizer = Tokenizer::Load(checkpoint_->folder()).value();
    calibration_.captions =
        LoadCaptions(checkpoint_->folder() / "samples", checkpoint_->folder(), tokenizer,
                     {.image = static_cast<int32_t>(config.image_token),
                      .start = static_cast<int32_t>(config.vision_start_token),
                      .end = static_cast<int32_t>(config.vision_end_token)},
                     2)
            .value();
  }
  RunStore Store(const std::string& name, FileSystem& fs = FileSystem::Default()) const {
    return RunStore::Open(fs, folder_ / name).value();
  }
  Status Run(RunStore& store, const std::vector<const Format*>& formats = {}) const {
    return RunProbe(*model_, calibration_, {.formats = formats}, store);
  }
  LossTokens tokens() const { return CountLossTokens(*model_, calibration_, LabelRule::kSampled); }
  Part PartOf(const std::string& name) const {
    for (const LinearInfo& linear : model_->linears()) {
      if (linear.name == name) return linear.part;
    }
    return Part::kText;
  }

  TemporaryFolder folder_;
  std::unique_ptr<Checkpoint> checkpoint_;
  std::unique_ptr<Model> model_;
  Calibration calibration_;
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
      EXPECT_EQ(cost.squares, costs_b.at(linear).at(format).squares) << linear;
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

TEST_F(ProbeTest, UnitsSumTheirMembersSquares) {
  RunStore store = Store("work");
  ASSERT_TRUE(Run(store).ok());
  const auto costs = store.Costs().value();
  const auto units = BuildUnitCosts(*model_, store, tokens(),
                                    {.weights = {.text = 2, .caption = 3, .mtp = 5},
                                     .rules = {.any_kernel = true, .vision = true}})
                         .value();
  bool fused = false;
  std::set<Part> parts;
  for (const UnitCosts& unit : units) {
    for (const UnitFormat& format : unit.formats) {
      std::vector<double> squares;
      for (size_t n = 0; n < 5; ++n) {
        double q = 0;
        for (const std::string& linear : unit.linears) {
          ASSERT_EQ(costs.at(linear).at(format.format).squares.size(), 5U) << linear;
          q += costs.at(linear).at(format.format).squares[n];
        }
        squares.push_back(q / 2);
      }
      const double windows = squares[0] + squares[1] + squares[2];
      const double captions = squares[3] + squares[4];
      const Part part = PartOf(unit.linears.front());
      parts.insert(part);
      EXPECT_EQ(part == Part::kVision && windows > 0, false) << unit.name;
      EXPECT_EQ(part == Part::kMtp && captions > 0, false) << unit.name;
      const bool mtp = part == Part::kMtp;
      const double text = mtp ? 0 : windows / 60, caption = captions / tokens().caption;
      const double draft = mtp ? windows / 57 : 0;
      EXPECT_NEAR(format.losses.text, text, 1e-12 * (1 + text)) << unit.name;
      EXPECT_NEAR(format.losses.caption, caption, 1e-12 * (1 + caption)) << unit.name;
      EXPECT_NEAR(format.losses.mtp, draft, 1e-12 * (1 + draft)) << unit.name;
      const double cost = 2 * text + 3 * caption + 5 * draft;
      EXPECT_NEAR(format.cost, cost, 1e-12 * (1 + cost)) << unit.name;
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
  EXPECT_EQ(parts, (std::set<Part>{Part::kText, Part::kMtp, Part::kVision}));
}

TEST_F(ProbeTest, FormatsThatAreAskedForLaterArePricedAlike) {
  const std::vector<const Format*> first = {FindFormat("nvfp4"), FindFormat("bf16")};
  const std::vector<const Format*> second = {FindFormat("int4"), FindFormat("nvfp4")};
  std::vector<const Format*> both = first;
  both.push_back(FindFormat("int4"));
  RunStore at_once = Store("at_once"), in_turn = Store("in_turn");
  ASSERT_TRUE(Run(at_once, both).ok());
  ASSERT_TRUE(Run(in_turn, first).ok());
  const auto before = in_turn.Costs().value();
  for (const auto& [linear, formats] : before) EXPECT_EQ(formats.count("int4"), 0U) << linear;
  ASSERT_TRUE(Run(in_turn, second).ok());
  ExpectSame(at_once, in_turn);
  const auto after = in_turn.Costs().value();
  for (const auto& [linear, formats] : after) {
    EXPECT_EQ(formats.at("nvfp4").directional, before.at(linear).at("nvfp4").directional);
  }
}

TEST_F(ProbeTest, GptqIsPricedByAFurtherPassThatLeavesTheRestAlone) {
  RunStore store = Store("work");
  const std::vector<const Format*> formats = {FindFormat("nvfp4"), FindFormat("bf16")};
  ASSERT_TRUE(Run(store, formats).ok());
  const auto before = store.Costs().value();
  ProbeOptions options{.formats = formats, .gptq_formats = formats};
  ASSERT_TRUE(RunProbe(*model_, calibration_, options, store).ok());
  const auto after = store.Costs().value();
  const auto gptq = store.Costs(Rounding::kGptq).value();
  const auto in_sample = store.Costs(Rounding::kGptqInSample).value();
  int64_t priced = 0;
  for (const LinearInfo& linear : model_->linears()) {
    if (before.count(linear.name) == 0 || before.at(linear.name).count("nvfp4") == 0) continue;
    EXPECT_EQ(after.at(linear.name).at("nvfp4").squares,
              before.at(linear.name).at("nvfp4").squares);
    if (linear.part == Part::kHead) continue;
    ASSERT_EQ(gptq.at(linear.name).size(), 1U) << linear.name;
    ASSERT_EQ(in_sample.at(linear.name).size(), 1U) << linear.name;
    const LinearCost& cost = gptq.at(linear.name).at("nvfp4");
    EXPECT_EQ(cost.squares.size(), before.at(linear.name).at("nvfp4").squares.size());
    priced += cost.squares != before.at(linear.name).at("nvfp4").squares;
  }
  EXPECT_GT(priced, 10);
  EXPECT_EQ(gptq.count("lm_head"), 0U);
}

TEST_F(ProbeTest, TheOutputProjectionIsPricedByItsLogits) {
  RunStore store = Store("work");
  ASSERT_TRUE(Run(store, {FindFormat("fp8"), FindFormat("bf16")}).ok());
  const auto costs = store.Costs().value().at("lm_head");
  EXPECT_EQ(costs.at("bf16").directional, std::vector<double>(5, 0));
  EXPECT_GT(costs.at("fp8").weight_mse, 0);
  for (int n = 0; n < 3; ++n) EXPECT_NE(costs.at("fp8").directional[n], 0);
  const UnitCostOptions chosen{.rules = {.head = FindFormat("fp8"), .formats = {"fp8", "bf16"}}};
  const auto units = BuildUnitCosts(*model_, store, tokens(), chosen).value();
  const auto head = std::find_if(units.begin(), units.end(),
                                 [](const UnitCosts& unit) { return unit.name == "lm_head"; });
  ASSERT_NE(head, units.end());
  EXPECT_EQ(head->chosen, "fp8");
}

TEST_F(ProbeTest, JointLossHasTheCrossTermsBetweenUnits) {
  RunStore store = Store("work");
  ASSERT_TRUE(Run(store).ok());
  const auto costs = store.Costs().value();
  std::map<std::string, std::string> choices;
  std::vector<double> sums(3, 0);
  for (const LinearInfo& linear : model_->linears()) {
    if (!linear.allocatable || linear.part != Part::kText) continue;
    choices[linear.name] = linear.layer % 2 == 0 ? "nvfp4" : "fp8";
    for (size_t n = 0; n < 3; ++n)
      sums[n] += costs.at(linear.name).at(choices[linear.name]).directional[n];
  }
  const double expected = (sums[0] * sums[0] + sums[1] * sums[1] + sums[2] * sums[2]) / 2 / 60;
  const PartLosses found = JointLoss(*model_, store, tokens(), choices).value();
  EXPECT_NEAR(found.text, expected, 1e-12 * (1 + expected));
}

TEST_F(ProbeTest, KernelRulesTakeFormatsFromNarrowUnits) {
  const auto count = [&](bool any_kernel) {
    int mxfp8 = 0;
    for (const UnitCosts& unit : UnitsWithoutCosts(*model_, {.any_kernel = any_kernel})) {
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
    const Status status = RunProbe(tiny.model(), tiny.calibration(), {}, store);
    EXPECT_EQ(status.code(), StatusCode::kInvalidInput) << scaled << ": " << status.message();
    EXPECT_THAT(status.message(), AllOf(HasSubstr(": " + what), HasSubstr("not finite")));
    EXPECT_FALSE(*store.IsDone("backward", 1));
  }
}

TEST_F(ProbeTest, PositionsWithALossAreCounted) {
  const LossTokens sampled = CountLossTokens(*model_, calibration_, LabelRule::kSampled);
  const LossTokens data = CountLossTokens(*model_, calibration_, LabelRule::kData);
  int64_t caption = 0;
  for (const CaptionSequence& sequence : calibration_.captions) {
    caption += static_cast<int64_t>(sequence.ids.size()) - sequence.first_label;
  }
  EXPECT_EQ(sampled.text, 60);
  EXPECT_EQ(data.text, 57);
  EXPECT_EQ(sampled.mtp, 57);
  EXPECT_EQ(data.mtp, 54);
  EXPECT_GT(caption, 10);
  EXPECT_EQ(sampled.caption, caption);
  EXPECT_EQ(data.caption, caption);
  EXPECT_EQ(sampled.windows, 3);
}

}  // namespace
}  // namespace prismaquant

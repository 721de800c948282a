#include "performance/forecast.h"

#include <ATen/record_function.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <map>
#include <string>

#include "io/temporary_folder.h"
#include "performance/layer_shapes.h"
#include "performance/machine_rates.h"
#include "performance/run_profile.h"
#include "probe/probe.h"
#include "probe/tiny_checkpoint.h"
#include "store/run_store.h"

namespace prismaquant {
namespace {

class ForecastTest : public ::testing::Test {
 protected:
  RunSettings Settings() const {
    return {.priced = {FindFormat("nvfp4"), FindFormat("fp8"), &SourceFormat()}};
  }

  std::map<std::string, StageNeeds> Needs(const Calibration& calibration) const {
    std::map<std::string, StageNeeds> needs;
    for (const StageNeeds& stage : Forecast(tiny_.model(), calibration, Settings())) {
      needs[stage.stage] = stage;
    }
    return needs;
  }

  TinyCheckpoint tiny_;
  TemporaryFolder folder_;
};

// FLOP by stage of what really runs.
TEST_F(ForecastTest, FlopIsThatOfTheKernels) {
  RunStore store = RunStore::Open(FileSystem::Default(), folder_ / "work").value();
  ASSERT_TRUE(store.Bind({{"source", "tiny"}}).ok());
  std::map<std::string, double> counted;
  {
    const RunProfile profile(RunProfile::Detail::kKernels);
    const ProbeOptions options{.formats = Settings().priced};
    ASSERT_TRUE(RunProbe(tiny_.model(), tiny_.calibration(), options, store).ok());
    FormatChoice choice;
    for (const LinearInfo& linear : tiny_.model().linears()) {
      choice[linear.name] = FindFormat("nvfp4");
    }
    {
      RECORD_USER_SCOPE("render");
      ASSERT_TRUE(RenderModel(tiny_.model(), tiny_.calibration(), choice, {}, "key", store).ok());
    }
    for (const KernelMeasure& kernel : profile.Kernels()) counted[kernel.stage] += kernel.flop;
  }
  const auto needs = Needs(tiny_.calibration());
  for (const char* stage : {"probe, forward", "probe, head", "probe, backward", "render"}) {
    EXPECT_NEAR(needs.at(stage).Flop() / counted.at(stage), 1, 0.25) << stage;
  }
}

TEST_F(ForecastTest, ProductsOfTheForwardPassAreThoseOfTheLinears) {
  double weights = 0;
  for (const LinearInfo& linear : tiny_.model().linears()) {
    weights += static_cast<double>(linear.out * linear.in);
  }
  constexpr double kTokens = TinyCheckpoint::kSequences * TinyCheckpoint::kTokens;
  constexpr double kPairs =
      TinyCheckpoint::kSequences * TinyCheckpoint::kTokens * TinyCheckpoint::kTokens;
  EXPECT_DOUBLE_EQ(Needs(tiny_.calibration()).at("probe, forward").products,
                   2 * kTokens * weights + TinyCheckpoint::kLayers * 2 * kPairs * 64);
}

TEST_F(ForecastTest, TwiceTheSequencesIsTwiceTheWorkOfTokens) {
  Calibration twice = tiny_.calibration();
  for (const auto& window : tiny_.calibration().text.windows) twice.text.windows.push_back(window);
  const auto once = Needs(tiny_.calibration()), more = Needs(twice);
  EXPECT_DOUBLE_EQ(more.at("probe, forward").products, 2 * once.at("probe, forward").products);
  EXPECT_DOUBLE_EQ(more.at("probe, backward").nearest, once.at("probe, backward").nearest);
  EXPECT_DOUBLE_EQ(more.at("export").written, once.at("export").written);
  EXPECT_GT(more.at("render").resident, once.at("render").resident);
}

TEST_F(ForecastTest, ValidatingRendersAndMeasuresEachPlan) {
  RunSettings settings = Settings();
  settings.evaluation_tokens = settings.validation_tokens = 64;
  settings.evaluation_window = 16;
  std::map<std::string, StageNeeds> once, validating;
  for (const StageNeeds& stage : Forecast(tiny_.model(), tiny_.calibration(), settings)) {
    once[stage.stage] = stage;
  }
  settings.validated_plans = 3;
  for (const StageNeeds& stage : Forecast(tiny_.model(), tiny_.calibration(), settings)) {
    validating[stage.stage] = stage;
  }
  EXPECT_EQ(once.count("validate"), 0U);
  EXPECT_DOUBLE_EQ(validating.at("render").Flop(), 3 * once.at("render").Flop());
  EXPECT_DOUBLE_EQ(validating.at("render").resident, once.at("render").resident);
  EXPECT_DOUBLE_EQ(validating.at("validate").Flop(), 2 * once.at("evaluate").Flop());
  EXPECT_DOUBLE_EQ(validating.at("export").written, once.at("export").written);
  const double quantized = once.at("export").stored - once.at("export").written;
  EXPECT_DOUBLE_EQ(validating.at("render").stored, once.at("render").stored + quantized);
  EXPECT_DOUBLE_EQ(once.at("evaluate").stored, once.at("export").written + 2 * 64 * 64 * 4);
  EXPECT_DOUBLE_EQ(validating.at("validate").stored, 2 * quantized + 2 * 64 * 64 * 4);
}

TEST_F(ForecastTest, ReadsEachLayerOncePerSweep) {
  double stored = 0;
  const PartLayers& body = *tiny_.model().FindPart(Part::kText);
  for (const LayerShape& layer : ShapesOf(tiny_.model(), body)) stored += layer.stored;
  EXPECT_DOUBLE_EQ(Needs(tiny_.calibration()).at("probe, forward").read, stored);
}

TEST_F(ForecastTest, TheDiskHoldsLayerInputsThenRenderedTensorsAndTheCheckpoint) {
  const auto needs = Needs(tiny_.calibration());
  constexpr double kState = TinyCheckpoint::kSequences * TinyCheckpoint::kTokens * 64 * 4;
  EXPECT_DOUBLE_EQ(needs.at("probe, forward").stored, TinyCheckpoint::kLayers * kState);
  EXPECT_DOUBLE_EQ(needs.at("probe, backward").stored, (TinyCheckpoint::kLayers + 2) * kState);
  const double quantized = needs.at("export").stored - needs.at("export").written;
  EXPECT_DOUBLE_EQ(needs.at("render").stored, quantized + 4 * kState);
  EXPECT_GT(quantized, 0);
}

TEST(StageNeeds, SecondsAreOfWorkOrOfReadingWhicheverIsLonger) {
  const MachineRates rates{.product = 2,
                           .float_product = 1,
                           .factor = 1,
                           .nearest = 1,
                           .columns = 1,
                           .memory = 1,
                           .read = 4,
                           .write = 1};
  EXPECT_DOUBLE_EQ((StageNeeds{.products = 6, .memory = 2, .read = 8}.Seconds(rates)), 5 / 0.88);
  EXPECT_DOUBLE_EQ((StageNeeds{.products = 6, .read = 80, .written = 3}.Seconds(rates)), 23);
}

TEST_F(ForecastTest, MeasuredRatesArePlausible) {
  const Result<MachineRates> rates =
      MeasureMachine(TypicalProduct(tiny_.model(), tiny_.calibration()), at::kBFloat16,
                     tiny_.model().checkpoint(), folder_.path());
  ASSERT_TRUE(rates.ok());
  const Json json = rates->ToJson();
  for (const auto& [name, rate] : json.items()) EXPECT_GT(rate.get<double>(), 1e5) << name;
  EXPECT_THAT(folder_.List(), ::testing::IsEmpty());
}

}  // namespace
}  // namespace prismaquant

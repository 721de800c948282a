#include "model/smoothing.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <vector>

namespace prismaquant {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(ChooseExponents, HalvesTheLogarithmRelativeToTheMedianChannel) {
  // Root mean squares 1/16, 1, 1, 1, 16, 2^14 and a channel that is always zero.
  const at::Tensor squares =
      torch::tensor({std::exp2(-8.0), 1.0, 1.0, 1.0, std::exp2(8.0), std::exp2(28.0), 0.0});
  EXPECT_THAT(ChooseExponents(squares), ElementsAre(-2, 0, 0, 0, 2, 6, 0));
  EXPECT_EQ(ChooseExponents(squares * 1e-9), ChooseExponents(squares));
}

TEST(ChooseExponents, LeavesChannelsWithoutTokensAlone) {
  EXPECT_THAT(ChooseExponents(at::zeros({3}, at::kDouble)), ElementsAre(0, 0, 0));
}

TEST(ParseSmoothing, ReadsWhatIsWritten) {
  const SmoothingExponents exponents = {{"a.weight", {-6, 0, 6}}, {"b", {1}}};
  const Json json = SmoothingToJson(exponents);
  EXPECT_EQ(json.dump(), R"({"a.weight":"agm","b":"h"})");
  const Result<SmoothingExponents> parsed = ParseSmoothing(json, "record");
  ASSERT_TRUE(parsed.ok()) << parsed.status().message();
  EXPECT_EQ(*parsed, exponents);
}

TEST(ParseSmoothing, RefusesOtherForms) {
  for (const char* text : {"[]", "3", R"({"a": 3})", R"({"a": "gn"})", R"({"a": "g g"})"}) {
    const Result<SmoothingExponents> parsed = ParseSmoothing(Json::parse(text), "record");
    ASSERT_FALSE(parsed.ok()) << text;
    EXPECT_EQ(parsed.status().code(), StatusCode::kInvalidInput);
    EXPECT_THAT(parsed.status().message(), HasSubstr("record: smoothing is"));
  }
}

}  // namespace
}  // namespace prismaquant

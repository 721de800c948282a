#include "base/progress.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace prismaquant {
namespace {

using ::testing::HasSubstr;
using ::testing::MatchesRegex;
using ::testing::Not;

// A captured standard error is a file, no terminal.
class ProgressTest : public ::testing::Test {
 protected:
  void SetUp() override { ::testing::internal::CaptureStderr(); }
  static std::string Printed() { return ::testing::internal::GetCapturedStderr(); }
};

TEST_F(ProgressTest, AFinishedStageIsOnePlainLine) {
  {
    Progress progress("render, GPTQ", 3, "layers");
    for (int i = 0; i < 3; ++i) progress.Advance();
  }
  const std::string printed = Printed();
  EXPECT_THAT(printed, MatchesRegex("render, GPTQ: 3/3 layers, [0-9.e+]+ layers/s, [0-9.]+ s\n"));
  EXPECT_THAT(printed, Not(HasSubstr("\r")));
  EXPECT_THAT(printed, Not(HasSubstr("\033")));
}

TEST_F(ProgressTest, SkippedStepsAreDoneButHaveNoRate) {
  {
    Progress progress("probe, forward", 4, "layers");
    progress.Skip(4);
  }
  EXPECT_THAT(Printed(), MatchesRegex("probe, forward: 4/4 layers, [0-9.]+ s\n"));
}

TEST_F(ProgressTest, SeveralStepsAtOnce) {
  {
    Progress progress("read", 10, "files");
    progress.Skip(3);
    progress.Advance(7);
  }
  EXPECT_THAT(Printed(), HasSubstr("read: 10/10 files, "));
}

TEST_F(ProgressTest, AStageThatEndsEarlyClaimsNoEnd) {
  {
    Progress progress("render, GPTQ", 3, "layers");
    progress.Advance(2);
  }
  EXPECT_EQ(Printed(), "");
}

TEST(FormatSeconds, TakesTheUnitsThatFit) {
  EXPECT_EQ(FormatSeconds(0), "0.0 s");
  EXPECT_EQ(FormatSeconds(0.44), "0.4 s");
  EXPECT_EQ(FormatSeconds(59.9), "59.9 s");
  EXPECT_EQ(FormatSeconds(60), "1 min 0 s");
  EXPECT_EQ(FormatSeconds(192.9), "3 min 12 s");
  EXPECT_EQ(FormatSeconds(3599.5), "59 min 59 s");
  EXPECT_EQ(FormatSeconds(3600), "1 h 0 min");
  EXPECT_EQ(FormatSeconds(100 * 3600 + 59 * 60), "100 h 59 min");
}

TEST(FormatSeconds, RoundsUpIntoTheNextUnit) {
  EXPECT_EQ(FormatSeconds(59.94), "59.9 s");
  EXPECT_EQ(FormatSeconds(59.96), "1 min 0 s");
}

TEST(FormatBytes, PowersOfTen) {
  EXPECT_EQ(FormatBytes(0), "0 bytes");
  EXPECT_EQ(FormatBytes(999), "999 bytes");
  EXPECT_EQ(FormatBytes(1000), "1.0 kB");
  EXPECT_EQ(FormatBytes(12'345), "12.3 kB");
  EXPECT_EQ(FormatBytes(1'000'000), "1.000 MB");
  EXPECT_EQ(FormatBytes(269'060'552), "269.061 MB");
  EXPECT_EQ(FormatBytes(1'234'567'890), "1.235 GB");
  EXPECT_EQ(FormatBytes(5'000'000'000'000), "5000.000 GB");
}

TEST(FormatBytes, RoundsUpIntoTheNextUnit) {
  EXPECT_EQ(FormatBytes(999'949), "999.9 kB");
  EXPECT_EQ(FormatBytes(999'950), "1.000 MB");
  EXPECT_EQ(FormatBytes(999'999'499), "999.999 MB");
  EXPECT_EQ(FormatBytes(999'999'500), "1.000 GB");
}

TEST(PeakMemoryBytes, IsAtLeastWhatATestNeeds) { EXPECT_GT(PeakMemoryBytes(), 1'000'000); }

}  // namespace
}  // namespace prismaquant

#include "tokenizer/pretokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace prismaquant {
namespace {

using ::testing::ElementsAre;

std::vector<std::string_view> Split(const Json& step, std::string_view text) {
  const Json bytes = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}};
  const Json json = {{"type", "Sequence"}, {"pretokenizers", {step, bytes}}};
  Result<PreTokenizer> pre = PreTokenizer::Parse(json, "test");
  EXPECT_TRUE(pre.ok()) << pre.status().message();
  return pre->Split(text);
}

Json SplitStep(const std::string& behavior, bool invert = false) {
  return {{"type", "Split"},
          {"pattern", {{"String", "-"}}},
          {"behavior", behavior},
          {"invert", invert}};
}

// The examples of the tokenizers library's documentation of split behaviours.
TEST(PreTokenizer, SplitBehaviours) {
  const std::string text = "the-final--countdown";
  EXPECT_THAT(Split(SplitStep("Removed"), text), ElementsAre("the", "final", "countdown"));
  EXPECT_THAT(Split(SplitStep("Isolated"), text),
              ElementsAre("the", "-", "final", "-", "-", "countdown"));
  EXPECT_THAT(Split(SplitStep("MergedWithPrevious"), text),
              ElementsAre("the-", "final-", "-", "countdown"));
  EXPECT_THAT(Split(SplitStep("MergedWithNext"), text),
              ElementsAre("the", "-final", "-", "-countdown"));
  EXPECT_THAT(Split(SplitStep("Contiguous"), text),
              ElementsAre("the", "-", "final", "--", "countdown"));
}

TEST(PreTokenizer, InvertSwapsMatchesAndTheRest) {
  EXPECT_THAT(Split(SplitStep("Removed", /*invert=*/true), "a-b"), ElementsAre("-"));
}

TEST(PreTokenizer, DigitsOneByOneOrTogether) {
  EXPECT_THAT(Split({{"type", "Digits"}, {"individual_digits", true}}, "a12b"),
              ElementsAre("a", "1", "2", "b"));
  EXPECT_THAT(Split({{"type", "Digits"}}, "a12b"), ElementsAre("a", "12", "b"));
}

TEST(PreTokenizer, AlternativesAreTriedInOrder) {
  const Json step = {{"type", "Split"},
                     {"pattern", {{"Regex", R"(\s+(?!\S)|\s+|\S+)"}}},
                     {"behavior", "Isolated"}};
  EXPECT_THAT(Split(step, "a   b "), ElementsAre("a", "  ", " ", "b", " "));
}

TEST(PreTokenizer, EmptyTextHasNoPieces) { EXPECT_TRUE(Split({{"type", "Digits"}}, "").empty()); }

}  // namespace
}  // namespace prismaquant

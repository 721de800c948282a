#include "base/json.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace prismaquant {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

TEST(ParseJson, ReadsADocument) {
  const auto json = ParseJson(R"({"a": [1, -2.5, "x", null, true], "b": {"a": 0}})", "doc.json");
  ASSERT_TRUE(json.ok()) << json.status().message();
  EXPECT_EQ((*json)["a"][1], -2.5);
  EXPECT_EQ((*json)["b"]["a"], 0);
}

TEST(ParseJson, SameKeyInDifferentObjectsIsFine) {
  EXPECT_TRUE(ParseJson(R"({"x": {"k": 1}, "y": {"k": 2}, "z": [{"k": 3}, {"k": 4}]})", "d").ok());
}

TEST(ParseJson, RefusesAKeyGivenTwiceAtAnyDepth) {
  const std::vector<std::string> documents = {
      R"({"twin": 1, "twin": 1})", R"({"a": {"twin": 1, "twin": 2}})",
      R"([{"b": [{"twin": {}, "c": 0, "twin": []}]}])", R"({"twin": 1, "\u0074win": 2})"};
  for (const std::string& text : documents) {
    const auto json = ParseJson(text, "index.json");
    ASSERT_FALSE(json.ok()) << text;
    EXPECT_EQ(json.status().code(), StatusCode::kInvalidInput);
    EXPECT_THAT(json.status().message(), StartsWith("index.json: "));
    EXPECT_THAT(json.status().message(), HasSubstr("\"twin\""));
  }
}

TEST(ParseJson, RefusesWhatIsNestedTooDeep) {
  const auto nested = [](size_t depth) {
    return "{\"a\":" + std::string(depth, '[') + std::string(depth, ']') + "}";
  };
  EXPECT_TRUE(ParseJson(nested(150), "config.json").ok());
  EXPECT_TRUE(ParseJson("[" + nested(100) + "," + nested(100) + "," + nested(100) + "]", "").ok());
  for (const size_t depth : {250, 1'000'000}) {
    const auto json = ParseJson(nested(depth), "config.json");
    ASSERT_FALSE(json.ok());
    EXPECT_EQ(json.status().code(), StatusCode::kInvalidInput);
    EXPECT_EQ(json.status().message(), "config.json: values are nested deeper than 200");
  }
}

TEST(ParseJson, RefusesWhatIsNotJsonInOneLineNamingTheDocument) {
  const std::vector<std::string> documents = {
      "",      "{",      "{\"a\":}", "[1,]", "{\"a\":1} x", "nul",   "{'a':1}",
      "1e999", "\"\xff", "\"\xff\"", "NaN",  "{\"a\"\n:\n", "[\n\n", "\"a\nb\""};
  for (const std::string& text : documents) {
    const auto json = ParseJson(text, "config.json");
    ASSERT_FALSE(json.ok()) << text;
    EXPECT_EQ(json.status().code(), StatusCode::kInvalidInput) << text;
    EXPECT_THAT(json.status().message(), StartsWith("config.json: ")) << text;
    EXPECT_THAT(json.status().message(), Not(HasSubstr("\n"))) << text;
  }
}

TEST(JsonLookups, GiveTheValue) {
  const Json json = {{"i", -3}, {"d", 0.5}, {"s", "text"}};
  EXPECT_EQ(*JsonInt(json, "i", "o"), -3);
  EXPECT_EQ(*JsonDouble(json, "d", "o"), 0.5);
  EXPECT_EQ(*JsonDouble(json, "i", "o"), -3.0);
  EXPECT_EQ(*JsonString(json, "s", "o"), "text");
}

TEST(JsonLookups, NameOriginKeyFoundAndExpected) {
  const Json json = {{"i", -3}, {"d", 0.5}, {"s", "text"}, {"b", true}};
  const std::vector<std::pair<Status, std::vector<std::string>>> cases = {
      {JsonInt(json, "d", "o.json").status(), {"o.json", "\"d\"", "number", "integer"}},
      {JsonInt(json, "b", "o.json").status(), {"o.json", "\"b\"", "boolean", "integer"}},
      {JsonInt(json, "none", "o.json").status(), {"o.json", "\"none\"", "missing", "integer"}},
      {JsonDouble(json, "s", "o.json").status(), {"o.json", "\"s\"", "string", "number"}},
      {JsonString(json, "i", "o.json").status(), {"o.json", "\"i\"", "number", "string"}},
      {JsonString(Json::array(), "i", "o.json").status(), {"o.json", "\"i\"", "missing"}}};
  for (const auto& [status, parts] : cases) {
    EXPECT_EQ(status.code(), StatusCode::kInvalidInput);
    for (const std::string& part : parts) EXPECT_THAT(status.message(), HasSubstr(part));
  }
}

}  // namespace
}  // namespace prismaquant

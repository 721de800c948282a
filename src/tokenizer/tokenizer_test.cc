#include "tokenizer/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/json.h"
#include "io/temporary_folder.h"
#include "tokenizer/bpe.h"

namespace prismaquant {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// Letters of the byte alphabet get ids 0..255, then come the merged tokens.
Json MakeTokenizer(const std::vector<std::pair<std::string, std::string>>& merges) {
  Json vocab = Json::object(), list = Json::array();
  int id = 0;
  for (const std::string& letter : ByteAlphabet()) vocab[letter] = id++;
  for (const auto& [left, right] : merges) {
    vocab[left + right] = id++;
    list.push_back({left, right});
  }
  return {{"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", list}}},
          {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}}}};
}

class TokenizerTest : public ::testing::Test {
 protected:
  Result<Tokenizer> Load(const Json& json) {
    folder_.Put("tokenizer.json", json.dump());
    return Tokenizer::Load(folder_.path());
  }
  std::vector<int32_t> Encode(const Json& json, const std::string& text) {
    const Result<Tokenizer> tokenizer = Load(json);
    EXPECT_TRUE(tokenizer.ok()) << tokenizer.status().message();
    const Result<std::vector<int32_t>> ids = tokenizer->Encode(text);
    EXPECT_TRUE(ids.ok()) << ids.status().message();
    return *ids;
  }
  // The message with which the file is refused.
  std::string Refusal(const Json& json) {
    const Result<Tokenizer> tokenizer = Load(json);
    EXPECT_EQ(tokenizer.status().code(), StatusCode::kInvalidInput);
    EXPECT_THAT(tokenizer.status().message(), HasSubstr("tokenizer.json"));
    EXPECT_EQ(tokenizer.status().message().find('\n'), std::string::npos);
    return tokenizer.status().message();
  }

  TemporaryFolder folder_;
};

TEST_F(TokenizerTest, MergesByRankAndLeftmostFirst) {
  const Json json = MakeTokenizer({{"a", "b"}, {"b", "c"}, {"ab", "c"}, {"a", "a"}});
  EXPECT_THAT(Encode(json, "abc"), ElementsAre(258));
  EXPECT_THAT(Encode(json, "bca"), ElementsAre(257, 'a'));
  EXPECT_THAT(Encode(json, "aaa"), ElementsAre(259, 'a'));
  EXPECT_THAT(Encode(json, ""), IsEmpty());
}

TEST_F(TokenizerTest, MergesAreReadInBothSpellings) {
  Json json = MakeTokenizer({{"a", "b"}});
  json["model"]["merges"] = {"a b"};
  EXPECT_THAT(Encode(json, "ab"), ElementsAre(256));
}

TEST_F(TokenizerTest, IgnoreMergesTakesAWholePieceOfTheVocabulary) {
  Json json = MakeTokenizer({{"a", "b"}});
  json["model"]["vocab"]["xyz"] = 300;
  EXPECT_THAT(Encode(json, "xyz"), ElementsAre('x', 'y', 'z'));
  json["model"]["ignore_merges"] = true;
  EXPECT_THAT(Encode(json, "xyz"), ElementsAre(300));
}

TEST_F(TokenizerTest, BytesOutsideAsciiAreTokensOfTheirOwn) {
  EXPECT_THAT(Encode(MakeTokenizer({}), "é"), ElementsAre(0xc3, 0xa9));
}

TEST_F(TokenizerTest, AddedTokensAreCutOutLongestFirst) {
  Json json = MakeTokenizer({{"a", "b"}});
  json["added_tokens"] = {{{"id", 400}, {"content", "<x>"}}, {{"id", 401}, {"content", "<x>y"}}};
  EXPECT_THAT(Encode(json, "ab<x>yab<x>"), ElementsAre(256, 401, 256, 400));
  EXPECT_EQ(Load(json)->size(), 402);
  EXPECT_EQ(Load(json)->TokenId("<x>"), 400);
}

TEST_F(TokenizerTest, AddedTokensOfTheConfigurationAreKnownToo) {
  folder_.Put("tokenizer_config.json",
              R"({"added_tokens_decoder": {"500": {"content": "<only here>"}}})");
  EXPECT_THAT(Encode(MakeTokenizer({}), "a<only here>"), ElementsAre('a', 500));
}

TEST_F(TokenizerTest, StripsAndWordBoundsOfAddedTokens) {
  Json json = MakeTokenizer({});
  json["added_tokens"] = {{{"id", 400}, {"content", "L"}, {"lstrip", true}},
                          {{"id", 401}, {"content", "R"}, {"rstrip", true}},
                          {{"id", 402}, {"content", "W"}, {"single_word", true}}};
  EXPECT_THAT(Encode(json, "a  L"), ElementsAre('a', 400));
  EXPECT_THAT(Encode(json, "R \n a"), ElementsAre(401, 'a'));
  EXPECT_THAT(Encode(json, "aW"), ElementsAre('a', 'W'));
  EXPECT_THAT(Encode(json, "-W-"), ElementsAre('-', 402, '-'));
}

TEST_F(TokenizerTest, BosIsWhatThePostProcessorPutsFirst) {
  Json json = MakeTokenizer({});
  EXPECT_FALSE(Load(json)->bos().has_value());
  json["added_tokens"] = {{{"id", 400}, {"content", "<s>"}}};
  const Json sequence = {{"Sequence", {{"id", "A"}}}}, start = {{"SpecialToken", {{"id", "<s>"}}}};
  json["post_processor"] = {{"type", "TemplateProcessing"},
                            {"single", Json::array({start, sequence})}};
  EXPECT_EQ(Load(json)->bos(), 400);
  json["post_processor"]["single"] = Json::array({sequence, start});
  EXPECT_FALSE(Load(json)->bos().has_value());
}

TEST_F(TokenizerTest, NfcOnlyIfTheFileAsksForIt) {
  Json json = MakeTokenizer({});
  EXPECT_EQ(Encode(json, "e\u0301").size(), 3U);
  json["normalizer"] = {{"type", "NFC"}};
  EXPECT_THAT(Encode(json, "e\u0301"), ElementsAre(0xc3, 0xa9));
}

TEST_F(TokenizerTest, TextThatIsNotUtf8IsRefusedAtItsByte) {
  const Result<Tokenizer> tokenizer = Load(MakeTokenizer({}));
  const Status status = tokenizer->Encode("ab\xff").status();
  EXPECT_EQ(status.code(), StatusCode::kInvalidInput);
  EXPECT_THAT(status.message(), HasSubstr("byte 2"));
}

TEST_F(TokenizerTest, RefusesWhatItDoesNotImplementByName) {
  const auto with = [](const char* pointer, const Json& value) {
    Json json = MakeTokenizer({{"a", "b"}});
    json[Json::json_pointer(pointer)] = value;
    return json;
  };
  EXPECT_THAT(Refusal(with("/model/type", "Unigram")), HasSubstr("BPE"));
  EXPECT_THAT(Refusal(with("/model/byte_fallback", true)), HasSubstr("byte_fallback"));
  EXPECT_THAT(Refusal(with("/model/dropout", 0.1)), HasSubstr("dropout"));
  EXPECT_THAT(Refusal(with("/normalizer", {{"type", "Lowercase"}})), HasSubstr("Lowercase"));
  EXPECT_THAT(Refusal(with("/pre_tokenizer", {{"type", "Whitespace"}})), HasSubstr("Whitespace"));
  EXPECT_THAT(Refusal(with("/pre_tokenizer/add_prefix_space", true)),
              HasSubstr("add_prefix_space"));
  EXPECT_THAT(
      Refusal(with("/pre_tokenizer",
                   {{"type", "Split"}, {"pattern", {{"Regex", "("}}}, {"behavior", "Isolated"}})),
      HasSubstr("pattern"));
}

TEST_F(TokenizerTest, RefusesMalformedFiles) {
  const auto with = [](const char* pointer, const Json& value) {
    Json json = MakeTokenizer({{"a", "b"}});
    json[Json::json_pointer(pointer)] = value;
    return json;
  };
  EXPECT_THAT(Refusal(Json::object()), HasSubstr("model"));
  EXPECT_THAT(Refusal(with("/model/vocab", 3)), HasSubstr("vocab"));
  EXPECT_THAT(Refusal(with("/model/vocab/ab", -1)), HasSubstr("ab"));
  EXPECT_THAT(Refusal(with("/model/vocab/ab", 0)), HasSubstr("two tokens"));
  EXPECT_THAT(Refusal(with("/model/vocab/ab", int64_t{1} << 40)), HasSubstr("ab"));
  EXPECT_THAT(Refusal(with("/model/merges/0", {"a", "zz"})), HasSubstr("merge"));
  EXPECT_THAT(Refusal(with("/model/merges/0", 5)), HasSubstr("merge"));
  EXPECT_THAT(Refusal(with("/model/ignore_merges", "yes")), HasSubstr("type"));
  EXPECT_THAT(Refusal(with("/added_tokens", {{{"id", "x"}, {"content", "y"}}})), HasSubstr("id"));
  EXPECT_THAT(Refusal(with("/added_tokens", {{{"id", 1}, {"content", 7}}})), HasSubstr("content"));
  EXPECT_THAT(Refusal(with("/added_tokens", {{{"id", 1}, {"content", "y"}, {"lstrip", 3}}})),
              HasSubstr("type"));
  EXPECT_THAT(Refusal(with("/pre_tokenizer/type", 3)), HasSubstr("type"));
  EXPECT_THAT(
      Refusal(with("/post_processor", {{"type", "TemplateProcessing"},
                                       {"single", {{{"SpecialToken", {{"id", "<none>"}}}}}}})),
      HasSubstr("<none>"));
  folder_.Put("tokenizer.json", "{");
  EXPECT_THAT(Tokenizer::Load(folder_.path()).status().message(), HasSubstr("JSON"));
  EXPECT_THAT(Tokenizer::Load(folder_ / "missing").status().message(), HasSubstr("no such file"));
}

}  // namespace
}  // namespace prismaquant

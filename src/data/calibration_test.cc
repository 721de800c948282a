#include "data/calibration.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "base/json.h"
#include "data/bundled_text.h"
#include "data/text_source.h"
#include "io/temporary_folder.h"
#include "tokenizer/bpe.h"

namespace prismaquant {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kVocabulary = 300;

// A checkpoint folder with a tokenizer of one token per byte, <|im_start|> 260, <|im_end|> 261 and
// </s> 262.
class CalibrationTest : public ::testing::Test {
 protected:
  CalibrationTest() {
    Json vocab = Json::object();
    int id = 0;
    for (const std::string& letter : ByteAlphabet()) vocab[letter] = id++;
    json_ = {{"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", Json::array()}}},
             {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}}},
             {"added_tokens",
              {{{"id", 260}, {"content", "<|im_start|>"}},
               {{"id", 261}, {"content", "<|im_end|>"}},
               {{"id", 262}, {"content", "</s>"}}}}};
    folder_.Put("tokenizer_config.json", R"({"eos_token": "</s>"})");
  }
  Tokenizer LoadTokenizer() {
    folder_.Put("tokenizer.json", json_.dump());
    return Tokenizer::Load(folder_.path()).value();
  }
  static std::filesystem::path BundledFile() { return {}; }
  Result<TokenWindows> Sample(const std::filesystem::path& name, int64_t samples, int64_t tokens,
                              uint64_t seed = 0) {
    const CalibrationOptions options{
        .file = Path(name), .samples = samples, .tokens = tokens, .seed = seed};
    return SampleCalibration(options, LoadTokenizer(), folder_.path(), kVocabulary);
  }
  Result<TextSource> Read(const std::filesystem::path& name) {
    return TextSource::Read(Path(name), folder_.path(), kVocabulary);
  }

  std::filesystem::path Path(const std::filesystem::path& name) {
    return name.empty() ? name : folder_.path() / name;
  }

  TemporaryFolder folder_;
  Json json_;
};

std::string Text(const TextDocument& document) { return std::get<std::string>(document.content); }

TEST_F(CalibrationTest, DocumentsEndAtBlankLinesAndJoinedAreTheText) {
  const std::string text = "one\ntwo\n\nthree\n \t\n\nfour";
  folder_.Put("t.txt", text);
  const Result<TextSource> source = Read("t.txt");
  ASSERT_TRUE(source.ok());
  ASSERT_EQ(source->documents.size(), 3U);
  EXPECT_EQ(Text(source->documents[0]), "one\ntwo\n\n");
  EXPECT_EQ(Text(source->documents[1]), "three\n \t\n\n");
  EXPECT_EQ(Text(source->documents[2]), "four");
}

TEST_F(CalibrationTest, WindowsComeFromTheFirstNineTenthsWithoutOverlap) {
  std::string text;
  for (int i = 0; i < 100; ++i) text += fmt::format("{:02}{}\n\n", i, i < 90 ? "aaaa" : "zzzz");
  folder_.Put("t.txt", text);
  const Result<TokenWindows> windows = Sample("t.txt", 40, 16);
  ASSERT_TRUE(windows.ok()) << windows.status().message();
  std::set<std::string> seen;
  for (const auto& window : windows->windows) {
    ASSERT_EQ(window.size(), 16U);
    const std::string piece(window.begin(), window.end());
    EXPECT_EQ(piece.find('z'), std::string::npos);
    EXPECT_TRUE(seen.insert(piece).second) << "window drawn twice";
  }
  const Result<TokenWindows> held_out =
      HeldOutWindows(folder_ / "t.txt", LoadTokenizer(), folder_.path(), kVocabulary, 64, 16);
  ASSERT_TRUE(held_out.ok()) << held_out.status().message();
  for (const auto& window : held_out->windows) {
    EXPECT_EQ(std::count(window.begin(), window.end(), 'a'), 0);
  }
}

TEST_F(CalibrationTest, TheSeedDrawsTheWindows) {
  std::string text;
  for (int i = 0; i < 2000; ++i) text += fmt::format("{} ", i);
  folder_.Put("t.txt", text + "\n\nlast");
  const TokenWindows first = Sample("t.txt", 8, 32, 1).value();
  EXPECT_EQ(first.windows, Sample("t.txt", 8, 32, 1)->windows);
  EXPECT_EQ(first.fingerprint, Sample("t.txt", 8, 32, 1)->fingerprint);
  EXPECT_NE(first.fingerprint, Sample("t.txt", 8, 32, 2)->fingerprint);
}

TEST_F(CalibrationTest, TooShortATextSaysWhatItHasAndNeeds) {
  folder_.Put("t.txt", std::string(100, 'x') + "\n\nlast");
  const Status status = Sample("t.txt", 4, 64).status();
  EXPECT_EQ(status.code(), StatusCode::kInvalidInput);
  EXPECT_THAT(status.message(), HasSubstr("t.txt: 102 tokens"));
  EXPECT_THAT(status.message(), HasSubstr("256"));
  folder_.Put("empty.txt", "");
  EXPECT_THAT(Sample("empty.txt", 1, 8).status().message(), HasSubstr("empty.txt: 0 tokens"));
}

TEST_F(CalibrationTest, EachWindowBeginsWithBosIfThePostProcessorAddsOne) {
  json_["post_processor"] = {{"type", "TemplateProcessing"},
                             {"single", {{{"SpecialToken", {{"id", "</s>"}}}}}}};
  folder_.Put("t.txt", std::string(500, 'x') + "\n\nlast");
  const TokenWindows windows = Sample("t.txt", 5, 10).value();
  for (const auto& window : windows.windows) {
    EXPECT_EQ(window[0], 262);
    EXPECT_EQ(std::count(window.begin(), window.end(), 262), 1);
  }
}

TEST_F(CalibrationTest, RecordsEndWithTheEndOfTextToken) {
  folder_.Put("r.jsonl", "{\"text\": \"ab\"}\n\n{\"input_ids\": [7, 8]}\n");
  const TextSource source = Read("r.jsonl").value();
  const Tokenizer tokenizer = LoadTokenizer();
  const int32_t end = EndOfText(folder_.path(), tokenizer).value();
  EXPECT_EQ(end, 262);
  EXPECT_THAT(*TokenStream(source, 0, 2, tokenizer, end, "r.jsonl"),
              ::testing::ElementsAre('a', 'b', 262, 7, 8));
}

TEST_F(CalibrationTest, MessagesAreRenderedForChatMlTemplatesOnly) {
  folder_.Put(
      "chat.jsonl",
      R"({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]})");
  const Status refused = Read("chat.jsonl").status();
  EXPECT_EQ(refused.code(), StatusCode::kInvalidInput);
  for (const char* words : {"line 1", "ChatML", "apply_chat_template", "input_ids"}) {
    EXPECT_THAT(refused.message(), HasSubstr(words));
  }
  folder_.Put("chat_template.jinja", "{{ '<|im_start|>' + role + content + '<|im_end|>' }}");
  EXPECT_EQ(Text(Read("chat.jsonl")->documents[0]),
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n");
}

TEST_F(CalibrationTest, TheBundledTextNeedsNoFileAndNoChatTemplate) {
  const Result<TextSource> source = Read(BundledFile());
  ASSERT_TRUE(source.ok()) << source.status().message();
  EXPECT_GT(source->documents.size(), 200U);
  for (const TextDocument& document : source->documents) {
    EXPECT_TRUE(document.ends);
    EXPECT_GT(Text(document).size(), 300U);
    EXPECT_LT(Text(document).size(), 6000U);
  }
  const TokenWindows windows = Sample(BundledFile(), 64, 512).value();
  EXPECT_EQ(windows.count(), 64);
  EXPECT_NE(windows.fingerprint, Sample(BundledFile(), 64, 512, 1)->fingerprint);
  const Result<TokenWindows> held_out =
      HeldOutWindows({}, LoadTokenizer(), folder_.path(), kVocabulary, 1024, 512);
  ASSERT_TRUE(held_out.ok()) << held_out.status().message();
  const std::string first = Text(source->documents[source->held_out_begin]);
  EXPECT_EQ(std::string(held_out->windows[0].begin(), held_out->windows[0].end()),
            first.substr(0, 512));
}

TEST_F(CalibrationTest, AnyPartOfTheBundledTextIsMixed) {
  const TextSource source = Read(BundledFile()).value();
  constexpr size_t kPart = 30;
  for (size_t begin = 0; begin + kPart <= source.documents.size(); begin += kPart) {
    std::string part;
    for (size_t d = begin; d < begin + kPart; ++d) part += Text(source.documents[d]);
    for (const char* sign : {"<|im_start|>assistant", "\\frac", "return", " the "}) {
      EXPECT_THAT(part, HasSubstr(sign)) << "documents from " << begin;
    }
    const auto ascii = std::count_if(part.begin(), part.end(), [](char c) { return c >= 0; });
    EXPECT_LT(static_cast<double>(ascii), 0.9 * static_cast<double>(part.size()));
  }
}

TEST_F(CalibrationTest, MessagesAboutTheBundledTextNameIt) {
  EXPECT_THAT(Sample(BundledFile(), 1 << 16, 512).status().message(),
              HasSubstr("the bundled calibration text: "));
  EXPECT_EQ(CalibrationName(BundledFile()), "bundled");
  EXPECT_EQ(CalibrationName("/folder/text.jsonl"), "text.jsonl");
}

TEST_F(CalibrationTest, BadRecordsAreNamedByLine) {
  const auto refusal = [&](const std::string& line) {
    folder_.Put("bad.jsonl", "{\"text\": \"fine\"}\n" + line + "\n");
    const Status status = Read("bad.jsonl").status();
    EXPECT_EQ(status.code(), StatusCode::kInvalidInput) << line;
    EXPECT_THAT(status.message(), HasSubstr("bad.jsonl: line 2"));
    return status.message();
  };
  EXPECT_THAT(refusal("{"), HasSubstr("JSON"));
  EXPECT_THAT(refusal("[]"), HasSubstr("expected a record"));
  EXPECT_THAT(refusal("{\"text\": 5}"), HasSubstr("expected a record"));
  EXPECT_THAT(refusal("{\"input_ids\": [1, 300]}"), HasSubstr("300"));
  EXPECT_THAT(refusal("{\"input_ids\": [1, -1]}"), HasSubstr("-1"));
  EXPECT_THAT(refusal("{\"input_ids\": [1, \"a\"]}"), HasSubstr("input_ids"));
}

TEST_F(CalibrationTest, EvaluationReadsOneStreamInWholeWindowsWithoutBos) {
  folder_.Put("e.txt", "abcdefghij\n\nk");
  const Tokenizer tokenizer = LoadTokenizer();
  const TokenWindows windows = EvaluationWindows(folder_ / "e.txt", tokenizer, 1000, 4).value();
  ASSERT_EQ(windows.count(), 3);
  EXPECT_THAT(windows.windows[2], ::testing::ElementsAre('i', 'j', '\n', '\n'));
  EXPECT_EQ(EvaluationWindows(folder_ / "e.txt", tokenizer, 8, 4)->count(), 2);
  EXPECT_THAT(EvaluationWindows(folder_ / "e.txt", tokenizer, 64, 16).status().message(),
              HasSubstr("13 tokens"));
}

TEST_F(CalibrationTest, IdsBeyondTheModelsVocabularyAreRefused) {
  const CalibrationOptions options{.file = folder_.Put("t.txt", std::string(100, '~') + "\n\nlast"),
                                   .samples = 1,
                                   .tokens = 8,
                                   .seed = 0};
  const Status status = SampleCalibration(options, LoadTokenizer(), folder_.path(), 100).status();
  EXPECT_THAT(status.message(), HasSubstr("126"));
}

}  // namespace
}  // namespace prismaquant

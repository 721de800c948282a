#include "data/captions.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "io/file_system.h"
#include "io/temporary_folder.h"

namespace prismaquant {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

// The bundled model's tokenizer and sample images.
class CaptionsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const char* source = std::getenv("PRISMAQUANT_SOURCE_DIR");
    ASSERT_NE(source, nullptr) << "PRISMAQUANT_SOURCE_DIR is not set; ctest sets it";
    model_ = std::filesystem::path(source) / "examples" / "tiny-qwen3_5";
    tokenizer_ = std::make_unique<Tokenizer>(Tokenizer::Load(model_).value());
    tokens_ = {.image = *tokenizer_->TokenId("<|image_pad|>"),
               .start = *tokenizer_->TokenId("<|vision_start|>"),
               .end = *tokenizer_->TokenId("<|vision_end|>")};
    std::filesystem::copy(model_ / "samples" / "image_0.png", folder_ / "b.png");
    std::filesystem::copy(model_ / "samples" / "image_1.png", folder_ / "a.PNG");
  }
  void Write(const std::string& name, const std::string& text) {
    ASSERT_TRUE(WriteFileAtomically(FileSystem::Default(), folder_ / name, text).ok());
  }
  Result<std::vector<CaptionSequence>> Load(const std::filesystem::path& source,
                                            int64_t limit = 0) const {
    return LoadCaptions(source, model_, *tokenizer_, tokens_, limit);
  }
  std::string Refusal(const std::filesystem::path& source) const {
    const Status status = Load(source).status();
    EXPECT_EQ(status.code(), StatusCode::kInvalidInput);
    EXPECT_EQ(status.message().find('\n'), std::string::npos);
    return status.message();
  }

  TemporaryFolder folder_;
  std::filesystem::path model_;
  std::unique_ptr<Tokenizer> tokenizer_;
  ImageTokens tokens_;
};

TEST_F(CaptionsTest, ASequenceIsAnExchangeWithTheImageInIt) {
  Write("c.jsonl", R"({"image": "b.png", "prompt": "What?", "text": "A shape."})"
                   "\n\n");
  const auto captions = Load(folder_ / "c.jsonl");
  ASSERT_TRUE(captions.ok()) << captions.status().message();
  ASSERT_EQ(captions->size(), 1U);
  const CaptionSequence& caption = captions->front();
  EXPECT_EQ(caption.name, "b.png");
  const int64_t merged = caption.image.patches / 4;
  EXPECT_EQ(caption.image.grid_rows * caption.image.grid_columns, caption.image.patches);
  std::vector<int32_t> expected = tokenizer_->Encode("<|im_start|>user\n").value();
  const auto append = [&](const std::string& text) {
    const auto ids = tokenizer_->Encode(text).value();
    expected.insert(expected.end(), ids.begin(), ids.end());
  };
  append("<|vision_start|>");
  expected.insert(expected.end(), static_cast<size_t>(merged), tokens_.image);
  append("<|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n");
  EXPECT_EQ(caption.first_label, static_cast<int64_t>(expected.size()));
  append("A shape.<|im_end|>");
  EXPECT_EQ(caption.ids, expected);
}

TEST_F(CaptionsTest, AFolderHasTextsBesideItsImagesOrOneList) {
  EXPECT_THAT(Refusal(folder_.path()), HasSubstr("a.PNG: has no caption, expected it in a.txt"));
  Write("a.txt", "First. \n");
  Write("b.txt", "Second.");
  const auto captions = Load(folder_.path());
  ASSERT_TRUE(captions.ok()) << captions.status().message();
  ASSERT_EQ(captions->size(), 2U);
  EXPECT_EQ((*captions)[0].name, "a.PNG");
  EXPECT_EQ((*captions)[1].name, "b.png");
  EXPECT_NE(CaptionsFingerprint({(*captions)[0]}), CaptionsFingerprint({(*captions)[1]}));
  Write("captions.jsonl", R"({"image": "b.png", "caption": "Only this."})");
  EXPECT_EQ(Load(folder_.path())->size(), 1U);
}

TEST_F(CaptionsTest, ALimitTakesThemEvenly) {
  const auto all = Load(model_ / "samples").value();
  ASSERT_EQ(all.size(), 8U);
  const auto some = Load(model_ / "samples", 4).value();
  ASSERT_EQ(some.size(), 4U);
  for (size_t i = 0; i < 4; ++i) EXPECT_EQ(some[i].name, all[2 * i].name);
  EXPECT_EQ(Load(model_ / "samples", 100)->size(), 8U);
}

TEST_F(CaptionsTest, WhatIsWrongIsNamed) {
  Write("c.jsonl", "{\"image\": \"b.png\", \"text\": \"x\"}\n{\"image\": \"b.png\"}\n");
  EXPECT_THAT(Refusal(folder_ / "c.jsonl"), AllOf(HasSubstr("line 2"), HasSubstr("text")));
  Write("c.jsonl", R"({"image": "none.png", "text": "x"})");
  EXPECT_THAT(Refusal(folder_ / "c.jsonl"), HasSubstr("none.png"));
  Write("c.jsonl", R"({"image": "b.png", "text": "an <|image_pad|> more"})");
  EXPECT_THAT(Refusal(folder_ / "c.jsonl"), HasSubstr("holds an image token"));
  Write("c.jsonl", "");
  EXPECT_THAT(Refusal(folder_ / "c.jsonl"), HasSubstr("holds no captioned image"));
  EXPECT_FALSE(Load(folder_ / "missing.jsonl").ok());
  tokens_.image = -1;
  EXPECT_THAT(Refusal(folder_ / "c.jsonl"), HasSubstr("names no image tokens"));
}

}  // namespace
}  // namespace prismaquant

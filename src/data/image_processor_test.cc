#include "data/image_processor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "io/temporary_folder.h"

namespace prismaquant {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

Json Config() {
  return {{"size", {{"shortest_edge", 4096}, {"longest_edge", 262144}}},
          {"patch_size", 16},
          {"temporal_patch_size", 2},
          {"merge_size", 2},
          {"image_mean", {0.5, 0.5, 0.5}},
          {"image_std", {0.5, 0.5, 0.5}},
          {"image_processor_type", "Qwen2VLImageProcessorFast"}};
}

std::string Error(const std::string& key, const Json& value) {
  Json config = Config();
  config[key] = value;
  const Result<ImageProcessor> processor = ImageProcessor::Parse(config, "preprocessor.json");
  EXPECT_EQ(processor.status().code(), StatusCode::kInvalidInput) << key;
  EXPECT_THAT(processor.status().message(), HasSubstr("preprocessor.json"));
  return processor.status().message();
}

std::pair<int64_t, int64_t> Target(int64_t height, int64_t width) {
  const Result<ImageProcessor> processor = ImageProcessor::Parse(Config(), "");
  const Result<ImageProcessor::Size> size = processor->TargetSize(height, width, "image");
  EXPECT_TRUE(size.ok()) << size.status().message();
  return {size->height, size->width};
}

TEST(ImageProcessor, ReadsTheFolder) {
  const TemporaryFolder folder;
  EXPECT_THAT(ImageProcessor::Read(folder.path()).status().message(),
              HasSubstr("preprocessor_config.json"));
  folder.Put("preprocessor_config.json", Config().dump());
  const Result<ImageProcessor> processor = ImageProcessor::Read(folder.path());
  ASSERT_TRUE(processor.ok()) << processor.status().message();
  EXPECT_EQ(processor->settings().min_pixels, 4096);
  EXPECT_EQ(processor->settings().max_pixels, 262144);
  folder.Put("preprocessor_config.json", "[1]");
  EXPECT_THAT(ImageProcessor::Read(folder.path()).status().message(),
              HasSubstr("preprocessor_config.json"));
}

TEST(ImageProcessor, PlainPixelBoundsWin) {
  Json config = Config();
  config["min_pixels"] = 1024;
  config["max_pixels"] = 2048;
  EXPECT_EQ(ImageProcessor::Parse(config, "")->settings().min_pixels, 1024);
  config.erase("size");
  EXPECT_EQ(ImageProcessor::Parse(config, "")->settings().max_pixels, 2048);
}

TEST(ImageProcessor, AMissingSettingIsNamed) {
  for (const char* key :
       {"patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std"}) {
    EXPECT_THAT(Error(key, nullptr), HasSubstr(key));
  }
  EXPECT_THAT(Error("size", {{"shortest_edge", 10}}), HasSubstr("longest_edge"));
  EXPECT_THAT(Error("size", 448), HasSubstr("shortest_edge"));
}

TEST(ImageProcessor, AnotherProcedureIsRefusedByKey) {
  const std::vector<std::pair<const char*, Json>> settings = {{"do_resize", false},
                                                              {"do_rescale", false},
                                                              {"do_normalize", false},
                                                              {"resample", 2},
                                                              {"do_convert_rgb", false},
                                                              {"do_center_crop", true},
                                                              {"do_pad", true},
                                                              {"patch_size", 0},
                                                              {"merge_size", "2"},
                                                              {"rescale_factor", 0},
                                                              {"image_std", {0.5, 0, 0.5}},
                                                              {"image_mean", {0.5, 0.5}},
                                                              {"max_pixels", -1},
                                                              {"min_pixels", 1 << 29},
                                                              {"image_processor_type", "CLIP"}};
  for (const auto& [key, value] : settings) EXPECT_THAT(Error(key, value), HasSubstr(key));
  EXPECT_THAT(Error("size", {{"height", 448}, {"width", 448}}), HasSubstr("height"));
  EXPECT_THAT(Error("size", {{"shortest_edge", 9}, {"longest_edge", 8}}),
              AllOf(HasSubstr("shortest_edge 9"), HasSubstr("longest_edge 8")));
}

TEST(ImageProcessor, SidesAreRoundedHalfToEven) {
  EXPECT_EQ(Target(64, 128), std::pair(int64_t{64}, int64_t{128}));
  EXPECT_EQ(Target(80, 112), std::pair(int64_t{64}, int64_t{128}));
  EXPECT_EQ(Target(79, 81), std::pair(int64_t{64}, int64_t{96}));
}

TEST(ImageProcessor, PixelCountsAreKeptWithinBounds) {
  EXPECT_EQ(Target(1000, 1000), std::pair(int64_t{512}, int64_t{512}));
  EXPECT_EQ(Target(10, 10), std::pair(int64_t{64}, int64_t{64}));
  EXPECT_EQ(Target(10, 2000), std::pair(int64_t{32}, int64_t{928}));
  EXPECT_EQ(Target(100, 20000), std::pair(int64_t{32}, int64_t{7232}));
}

TEST(ImageProcessor, AStripIsRefused) {
  const Result<ImageProcessor> processor = ImageProcessor::Parse(Config(), "");
  const Status status = processor->TargetSize(10, 2001, "strip.png").status();
  EXPECT_EQ(status.code(), StatusCode::kInvalidInput);
  EXPECT_THAT(status.message(), AllOf(HasSubstr("strip.png"), HasSubstr("2001 x 10")));
}

// An image whose red numbers its pixels.
TEST(ImageProcessor, PatchesComeBlockByBlock) {
  Json config = Config();
  config["patch_size"] = 1;
  config["size"]["shortest_edge"] = 1;
  config["rescale_factor"] = 1;
  config["image_mean"] = {0, 5, 0};
  config["image_std"] = {1, 0.5, 1};
  Image image{.height = 2, .width = 4, .rgb = {}};
  for (uint8_t i = 0; i < 8; ++i) image.rgb.insert(image.rgb.end(), {i, 6, 7});
  const Result<ImagePatches> patches = ImageProcessor::Parse(config, "")->Process(image, "");
  ASSERT_TRUE(patches.ok());
  EXPECT_EQ(patches->grid_rows, 2);
  EXPECT_EQ(patches->grid_columns, 4);
  EXPECT_EQ(patches->patches, 8);
  ASSERT_EQ(patches->width, 6);
  std::vector<float> red;
  for (size_t i = 0; i < patches->values.size(); i += 6) red.push_back(patches->values[i]);
  EXPECT_THAT(red, ElementsAre(0, 1, 4, 5, 2, 3, 6, 7));
  EXPECT_THAT(std::vector<float>(patches->values.end() - 6, patches->values.end()),
              ElementsAre(7, 7, 2, 2, 7, 7));
}

}  // namespace
}  // namespace prismaquant

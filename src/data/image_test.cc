#include "data/image.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <random>
#include <string>
#include <string_view>

#include "data/jpeg_structure.h"
#include "io/file_system.h"
#include "io/temporary_folder.h"

namespace prismaquant {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

using namespace std::string_view_literals;

std::string BigEndian(uint32_t value) {
  return {static_cast<char>(value >> 24), static_cast<char>(value >> 16 & 0xFF),
          static_cast<char>(value >> 8 & 0xFF), static_cast<char>(value & 0xFF)};
}

// Decoders of this project do not look at check sums.
std::string Chunk(const std::string& type, std::string_view data) {
  return BigEndian(static_cast<uint32_t>(data.size())) + type + std::string(data) + BigEndian(0);
}

// A PNG whose rows (each with its filter byte) are stored uncompressed.
std::string Png(uint32_t width, uint32_t height, int bits, int colour_type, std::string_view rows,
                const std::string& chunks = "") {
  const auto size = static_cast<uint32_t>(rows.size());
  const std::string header = BigEndian(width) + BigEndian(height) + static_cast<char>(bits) +
                             static_cast<char>(colour_type) + std::string(3, '\0');
  const std::string lengths = {static_cast<char>(size & 0xFF), static_cast<char>(size >> 8),
                               static_cast<char>(~size & 0xFF), static_cast<char>(~size >> 8)};
  const std::string data = "\x78\x01\x01" + lengths + std::string(rows) + BigEndian(0);
  return "\x89PNG\r\n\x1A\n" + Chunk("IHDR", header) + chunks + Chunk("IDAT", data) +
         Chunk("IEND", "");
}

class ImageTest : public ::testing::Test {
 protected:
  std::vector<uint8_t> Load(const std::string& contents) {
    const Result<Image> image = LoadImage(folder_.Put("image", contents));
    EXPECT_TRUE(image.ok()) << image.status().message();
    return image.ok() ? image->rgb : std::vector<uint8_t>();
  }
  std::string Error(const std::string& contents) {
    const Result<Image> image = LoadImage(folder_.Put("image", contents));
    EXPECT_EQ(image.status().code(), StatusCode::kInvalidInput);
    EXPECT_THAT(image.status().message(),
                AllOf(HasSubstr((folder_ / "image").string()), Not(HasSubstr("\n"))));
    return image.status().message();
  }

  TemporaryFolder folder_;
};

TEST_F(ImageTest, EveryKindOfPngBecomesRgb) {
  EXPECT_THAT(Load(Png(1, 2, 8, 2, "\0\1\2\3\0\4\5\6"sv)), ElementsAre(1, 2, 3, 4, 5, 6));
  EXPECT_THAT(Load(Png(2, 1, 8, 0, "\0\7\11"sv)), ElementsAre(7, 7, 7, 9, 9, 9));
  EXPECT_THAT(Load(Png(2, 1, 1, 0, "\0\x40"sv)), ElementsAre(0, 0, 0, 255, 255, 255));
  EXPECT_THAT(Load(Png(1, 1, 8, 6, "\0\1\2\3\0"sv)), ElementsAre(1, 2, 3));
  EXPECT_THAT(Load(Png(1, 1, 8, 4, "\0\5\0"sv)), ElementsAre(5, 5, 5));
  EXPECT_THAT(Load(Png(1, 1, 16, 2, "\0\1\x80\2\x80\3\x80"sv)), ElementsAre(1, 2, 3));
  const std::string palette = Chunk("PLTE", "\1\2\3\4\5\6"sv) + Chunk("tRNS", "\0\0"sv);
  EXPECT_THAT(Load(Png(2, 1, 8, 3, "\0\1\0"sv, palette)), ElementsAre(4, 5, 6, 1, 2, 3));
}

TEST_F(ImageTest, GrayOf16BitsIsRefused) {
  EXPECT_THAT(Error(Png(1, 1, 16, 0, "\0\1\2"sv)), HasSubstr("16 bits"));
}

TEST_F(ImageTest, OtherFilesAreRefused) {
  for (const std::string_view contents : {""sv, "\0\0\0\0"sv, "GIF89a\1\0\1\0"sv, "{}"sv}) {
    EXPECT_THAT(Error(std::string(contents)), HasSubstr("expected PNG or JPEG"));
  }
  EXPECT_THAT(LoadImage(folder_ / "absent.png").status().message(), HasSubstr("absent.png"));
}

TEST_F(ImageTest, AnImmenseImageIsRefusedBeforeItIsDecoded) {
  EXPECT_THAT(Error(Png(20000, 20001, 8, 0, "\0"sv)),
              AllOf(HasSubstr("20000 x 20001"), HasSubstr("at most 178956970")));
  EXPECT_THAT(Error(Png(0x7FFFFFFF, 0x7FFFFFFF, 8, 6, "\0"sv)), HasSubstr("at most 178956970"));
}

TEST_F(ImageTest, APngThatIsCutShortIsRefused) {
  const std::string whole = Png(3, 3, 8, 0, "\0\1\2\3\0\1\2\3\0\1\2\3"sv);
  for (size_t size = 0; size + 12 < whole.size(); ++size) Error(whole.substr(0, size));
  Error(Png(3, 3, 8, 0, "\0\1\2\3\0\1\2\3"sv));
}

TEST_F(ImageTest, DamagedFilesNeverCrash) {
  const std::filesystem::path sample =
      std::filesystem::path(std::getenv("PRISMAQUANT_SOURCE_DIR")) /
      "examples/tiny-qwen3_5/samples/image_0.png";
  const Result<std::string> png = ReadFile(sample);
  ASSERT_TRUE(png.ok());
  std::minstd_rand random(1);
  for (int round = 0; round < 300; ++round) {
    std::string damaged = *png;
    for (int i = 0; i < 4; ++i) damaged[random() % damaged.size()] ^= 1 << random() % 8;
    const Result<Image> image = LoadImage(folder_.Put("image", damaged));
    EXPECT_THAT(image.status().message(), Not(HasSubstr("\n")));
  }
}

constexpr std::string_view kStart = "\xFF\xD8"sv, kEnd = "\xFF\xD9"sv;
constexpr std::string_view kScan = "\xFF\xDA\0\3\1\x12\xFF\0\x34\xFF\xD0\x56"sv;

std::string Exif(std::string_view tiff) {
  const auto length = static_cast<char>(2 + 6 + tiff.size());
  return std::string("\xFF\xE1\0"sv) + length + std::string("Exif\0\0"sv) + std::string(tiff);
}

std::string Join(std::initializer_list<std::string_view> parts) {
  std::string joined;
  for (const std::string_view part : parts) joined += part;
  return joined;
}

TEST(JpegStructure, AFileIsCompleteWithItsEndMarker) {
  EXPECT_TRUE(ScanJpeg(Join({kStart, kScan, kEnd})).complete);
  EXPECT_TRUE(ScanJpeg(Join({kStart, kScan, "\xFF"sv, kScan, "\xFF"sv, kEnd, "more"sv})).complete);
  EXPECT_FALSE(ScanJpeg(Join({kStart, kScan})).complete);
  // An end marker inside a segment, as thumbnails have it, does not count.
  EXPECT_FALSE(ScanJpeg(Join({kStart, "\xFF\xE2\0\6\xFF\xD8\xFF\xD9"sv, kScan})).complete);
  const std::string whole = Join({kStart, Exif("II*\0"sv), kScan, kEnd});
  for (size_t size = 0; size < whole.size(); ++size) {
    EXPECT_FALSE(ScanJpeg(std::string_view(whole).substr(0, size)).complete) << size;
  }
}

TEST(JpegStructure, OrientationIsReadInBothByteOrders) {
  const std::string little = Exif("II*\0\10\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0"sv);
  const std::string big = Exif("MM\0*\0\0\0\10\0\1\1\x12\0\3\0\0\0\1\0\10\0\0"sv);
  EXPECT_EQ(ScanJpeg(Join({kStart, little, kEnd})).orientation, 6);
  EXPECT_EQ(ScanJpeg(Join({kStart, big, kEnd})).orientation, 8);
}

TEST(JpegStructure, MalformedExifLeavesTheImageUpright) {
  for (const std::string_view tiff :
       {""sv, "II"sv, "XX*\0\10\0\0\0"sv, "II*\0\xFF\xFF\xFF\xFF"sv, "II*\0\10\0\0\0\xFF\xFF"sv,
        "II*\0\10\0\0\0\1\0\x12\1\3\0\1\0\0\0\11\0\0\0"sv,
        "II*\0\10\0\0\0\1\0\x12\1\4\0\1\0\0\0\6\0\0\0"sv}) {
    EXPECT_EQ(ScanJpeg(Join({kStart, Exif(tiff), kEnd})).orientation, 1);
  }
}

TEST(ResizeBicubic, AConstantImageStaysConstant) {
  const Image image{.height = 5, .width = 7, .rgb = std::vector<uint8_t>(105, 200)};
  for (const auto& [height, width] : {std::pair(5, 7), {64, 3}, {1, 1}, {2, 90}}) {
    const Image resized = ResizeBicubic(image, height, width);
    EXPECT_EQ(resized.height, height);
    EXPECT_EQ(resized.width, width);
    EXPECT_EQ(resized.rgb, std::vector<uint8_t>(static_cast<size_t>(height * width * 3), 200));
  }
}

TEST(ResizeBicubic, AStepOvershootsAndIsClipped) {
  const Image step{.height = 1, .width = 4, .rgb = {0, 9, 0, 0, 9, 0, 255, 9, 0, 255, 9, 0}};
  std::vector<int> red;
  const Image wide = ResizeBicubic(step, 1, 8);
  for (size_t i = 0; i < wide.rgb.size(); i += 3) red.push_back(wide.rgb[i]);
  EXPECT_THAT(red, ElementsAre(0, 0, 0, 52, 203, 255, 255, 255));
}

}  // namespace
}  // namespace prismaquant

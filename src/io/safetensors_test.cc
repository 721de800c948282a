#include "io/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "io/dtype.h"
#include "io/faulty_file_system.h"
#include "io/temporary_folder.h"

namespace prismaquant {
namespace {

using namespace std::string_literals;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

std::string Length(uint64_t value) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += static_cast<char>(value >> (8 * i) & 0xff);
  return bytes;
}

std::string File(const std::string& header, const std::string& data) {
  return Length(header.size()) + header + data;
}

std::span<const std::byte> Bytes(std::string_view text) { return std::as_bytes(std::span(text)); }

std::string Text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

const std::string kReferenceData = "\x80\x3f\x00\x40\x40\x40\x80\x40\x01\x02\x03\x07"s;

// What the Python library (0.8.0) saves for bfloat16 a = [[1, 2], [3, 4]], uint8 b = [1, 2, 3] and
// the uint8 scalar c = 7 with the metadata {"format": "pt"}.
std::string Reference() {
  return File(
      R"({"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]},)"
      R"("b":{"dtype":"U8","shape":[3],"data_offsets":[8,11]},)"
      R"("c":{"dtype":"U8","shape":[],"data_offsets":[11,12]}}      )",
      kReferenceData);
}

std::vector<TensorSpec> ReferenceSpecs() {
  return {{"a", DType::kBF16, {2, 2}}, {"b", DType::kU8, {3}}, {"c", DType::kU8, {}}};
}

class SafetensorsTest : public ::testing::Test {
 protected:
  Result<SafetensorsFile> Open(const std::string& contents) {
    return SafetensorsFile::Open(folder_.Put("x.safetensors", contents));
  }
  void ExpectRefused(const std::string& contents, const std::vector<std::string>& parts) {
    const auto file = Open(contents);
    ASSERT_FALSE(file.ok()) << contents.substr(0, 200);
    EXPECT_EQ(file.status().code(), StatusCode::kInvalidInput);
    EXPECT_THAT(file.status().message(), StartsWith((folder_ / "x.safetensors").string() + ": "));
    EXPECT_THAT(file.status().message(), Not(HasSubstr("\n")));
    for (const std::string& part : parts) EXPECT_THAT(file.status().message(), HasSubstr(part));
  }
  // A file whose only tensor "t" has this header entry, and `bytes` bytes of data.
  void ExpectEntryRefused(const std::string& entry, size_t bytes, std::vector<std::string> parts) {
    parts.push_back("tensor t");
    ExpectRefused(File("{\"t\":" + entry + "}", std::string(bytes, 'x')), parts);
  }

  TemporaryFolder folder_;
};

TEST(DType, NamesAndWidthsRoundTrip) {
  const std::vector<std::pair<std::string, int64_t>> types = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1},
      {"U16", 2},  {"I16", 2}, {"F16", 2}, {"BF16", 2},    {"U32", 4},     {"I32", 4},
      {"F32", 4},  {"U64", 8}, {"I64", 8}, {"F64", 8},     {"C64", 8}};
  for (const auto& [name, bytes] : types) {
    const auto dtype = ParseDType(name);
    ASSERT_TRUE(dtype.has_value()) << name;
    EXPECT_EQ(DTypeName(*dtype), name);
    EXPECT_EQ(DTypeBytes(*dtype), bytes) << name;
  }
  for (const char* name : {"", "bf16", "BF16 ", "F4", "F6_E2M3", "F8_E4M3FNUZ", "FLOAT"}) {
    EXPECT_FALSE(ParseDType(name).has_value()) << name;
  }
}

TEST_F(SafetensorsTest, ReadsAFileOfTheReferenceLibrary) {
  const auto file = Open(Reference());
  ASSERT_TRUE(file.ok()) << file.status().message();
  ASSERT_EQ(file->tensors().size(), 3u);
  const TensorView* a = file->Find("a");
  ASSERT_NE(a, nullptr);
  EXPECT_EQ(a->dtype, DType::kBF16);
  EXPECT_EQ(a->shape, (std::vector<int64_t>{2, 2}));
  EXPECT_EQ(Text(a->bytes), kReferenceData.substr(0, 8));
  EXPECT_EQ(file->Find("c")->elements(), 1);
  EXPECT_EQ(Text(file->Find("c")->bytes), "\x07");
  EXPECT_EQ(file->Find("d"), nullptr);
  EXPECT_EQ(file->metadata(), (std::map<std::string, std::string>{{"format", "pt"}}));
}

TEST_F(SafetensorsTest, KeepsTheOrderOfTheDataAndTakesEmptyTensors) {
  const auto file = Open(File(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[1,3]},)"
                              R"("e":{"dtype":"F32","shape":[0,5],"data_offsets":[1,1]},)"
                              R"("z":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}})",
                              "zab"));
  ASSERT_TRUE(file.ok()) << file.status().message();
  std::vector<std::string> names;
  for (const TensorView& tensor : file->tensors()) names.push_back(tensor.name);
  EXPECT_EQ(names, (std::vector<std::string>{"z", "e", "a"}));
  EXPECT_EQ(Text(file->Find("a")->bytes), "ab");
  EXPECT_EQ(file->Find("e")->elements(), 0);
  EXPECT_TRUE(Open(File("{}", "")).ok());
}

TEST_F(SafetensorsTest, ViewsOutliveAMoveOfTheFile) {
  auto opened = Open(Reference());
  ASSERT_TRUE(opened.ok());
  const SafetensorsFile file = std::move(opened).value();
  EXPECT_EQ(Text(file.Find("b")->bytes), "\x01\x02\x03");
}

TEST_F(SafetensorsTest, RefusesAWrongHeaderLength) {
  ExpectRefused("", {"0 bytes", "too short"});
  ExpectRefused("1234567", {"7 bytes", "too short"});
  ExpectRefused(Length(0), {"does not begin with '{'"});
  ExpectRefused(Length(3) + "{}", {"header of 3 bytes", "file of 10 bytes"});
  ExpectRefused(Length(100'000'001) + "{}", {"header of 100000001 bytes"});
  ExpectRefused(Length(std::numeric_limits<uint64_t>::max()) + "{}", {"18446744073709551615"});
  ExpectRefused(Length(std::numeric_limits<uint64_t>::max() - 7) + "{}", {"header of"});
  for (size_t size = 0; size < Reference().size(); ++size) {
    EXPECT_FALSE(Open(Reference().substr(0, size)).ok()) << size;
  }
}

TEST_F(SafetensorsTest, RefusesAHeaderThatIsNotAJsonObject) {
  ExpectRefused(File("[]", ""), {"does not begin with '{'"});
  ExpectRefused(File(" {}", ""), {"does not begin with '{'"});
  ExpectRefused(File("{", ""), {"not valid JSON"});
  ExpectRefused(File("{\"\xff\":1}", ""), {"not valid JSON"});
  ExpectRefused(File("{} x", ""), {"not valid JSON"});
  ExpectRefused(File("{}\0\0"s, ""), {"NUL at byte 2"});
  ExpectRefused(File("{}\0garbage"s, ""), {"NUL at byte 2"});
  EXPECT_TRUE(Open(File("{}      ", "")).ok());
}

TEST_F(SafetensorsTest, RefusesATensorGivenTwice) {
  ExpectRefused(File(R"({"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                     R"("t":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
                     "xx"),
                {"\"t\"", "twice"});
}

TEST_F(SafetensorsTest, RefusesAMalformedEntry) {
  ExpectEntryRefused("3", 0, {"is 3", "expected an object"});
  ExpectEntryRefused(R"({"shape":[1],"data_offsets":[0,1]})", 1, {"dtype is missing"});
  ExpectEntryRefused(R"({"dtype":"U8","data_offsets":[0,1]})", 1, {"shape is missing"});
  ExpectEntryRefused(R"({"dtype":"U8","shape":[1]})", 1, {"data_offsets is missing"});
  ExpectEntryRefused(R"({"dtype":"F4","shape":[2],"data_offsets":[0,1]})", 1,
                     {"unknown dtype \"F4\""});
  ExpectEntryRefused(R"({"dtype":7,"shape":[1],"data_offsets":[0,1]})", 1, {"unknown dtype 7"});
  ExpectEntryRefused(R"({"dtype":"U8","shape":1,"data_offsets":[0,1]})", 1, {"shape is 1"});
  ExpectEntryRefused(R"({"dtype":"U8","shape":[1.0],"data_offsets":[0,1]})", 1, {"shape is [1.0]"});
  ExpectEntryRefused(R"({"dtype":"U8","shape":["1"],"data_offsets":[0,1]})", 1,
                     {"list of integers"});
  ExpectEntryRefused(R"({"dtype":"U8","shape":[true],"data_offsets":[0,1]})", 1, {"[true]"});
  ExpectEntryRefused(R"({"dtype":"U8","shape":[1],"data_offsets":[0]})", 1,
                     {"[0]", "two integers"});
  ExpectEntryRefused(R"({"dtype":"U8","shape":[1],"data_offsets":[0,1,2]})", 1, {"two integers"});
  ExpectEntryRefused(R"({"dtype":"U8","shape":[1],"data_offsets":{"0":0}})", 1, {"two integers"});
}

TEST_F(SafetensorsTest, RefusesSizesThatDoNotMatchOrOverflow) {
  ExpectEntryRefused(R"({"dtype":"F32","shape":[2,3],"data_offsets":[0,12]})", 12,
                     {"[0, 12] hold 12 bytes", "expected 24", "F32 [2, 3]"});
  ExpectEntryRefused(R"({"dtype":"U8","shape":[],"data_offsets":[0,0]})", 0, {"expected 1"});
  ExpectEntryRefused(R"({"dtype":"U8","shape":[-1],"data_offsets":[0,1]})", 1,
                     {"[-1]", "negative"});
  ExpectEntryRefused(R"({"dtype":"U8","shape":[0,-1],"data_offsets":[0,0]})", 0, {"negative"});
  ExpectEntryRefused(R"({"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]})", 0,
                     {"too large"});
  ExpectEntryRefused(R"({"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]})", 0,
                     {"too large"});
  ExpectEntryRefused(R"({"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,1]})", 1,
                     {"18446744073709551615", "list of integers"});
  ExpectEntryRefused(R"({"dtype":"U8","shape":[1],"data_offsets":[0,18446744073709551617]})", 1,
                     {"data_offsets"});
  ExpectEntryRefused(R"({"dtype":"U8","shape":[1],"data_offsets":[1,0]})", 1, {"[1,0]", "ascend"});
  ExpectEntryRefused(R"({"dtype":"U8","shape":[1],"data_offsets":[-1,0]})", 1, {"ascend"});
  ExpectEntryRefused(R"({"dtype":"U8","shape":[1],)"
                     R"("data_offsets":[-9223372036854775808,9223372036854775807]})",
                     1, {"ascend"});
}

TEST_F(SafetensorsTest, RefusesHolesOverlapsAndTrailingBytes) {
  const auto two = [](int begin, int end, size_t data) {
    return File(
        R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[)" +
            std::to_string(end - begin) + R"(],"data_offsets":[)" + std::to_string(begin) + "," +
            std::to_string(end) + "]}}",
        std::string(data, 'x'));
  };
  EXPECT_TRUE(Open(two(2, 4, 4)).ok());
  ExpectRefused(two(3, 5, 5), {"tensor b begins at byte 3", "expected 2"});
  ExpectRefused(two(1, 3, 3), {"tensor b begins at byte 1", "expected 2"});
  ExpectRefused(two(0, 2, 2), {"begins at byte 0", "expected 2"});
  ExpectRefused(two(2, 4, 5), {"holds 5 bytes", "describes 4"});
  ExpectRefused(two(2, 4, 3), {"holds 3 bytes", "describes 4"});
  ExpectEntryRefused(R"({"dtype":"U8","shape":[1],"data_offsets":[1,2]})", 2, {"expected 0"});
  ExpectRefused(File("{}", "x"), {"holds 1 bytes", "describes 0"});
}

TEST_F(SafetensorsTest, RefusesMetadataOtherThanStrings) {
  ExpectRefused(File(R"({"__metadata__":[]})", ""), {"__metadata__ is []", "object"});
  ExpectRefused(File(R"({"__metadata__":{"format":3}})", ""), {"\"format\" is 3", "string"});
  ExpectRefused(File(R"({"__metadata__":{"format":null}})", ""), {"\"format\" is null", "string"});
  EXPECT_TRUE(Open(File(R"({"__metadata__":{}})", "")).ok());
}

TEST_F(SafetensorsTest, ErrorsStayShortWhateverTheHeaderHolds) {
  std::string shape = "[true";
  for (int i = 0; i < 10000; ++i) shape += ",1";
  const auto file =
      Open(File(R"({"t":{"dtype":"U8","data_offsets":[0,1],"shape":)" + shape + "]}}", "x"));
  ASSERT_FALSE(file.ok());
  EXPECT_LT(file.status().message().size(), 400u);
}

class SafetensorsWriterTest : public SafetensorsTest {
 protected:
  Result<SafetensorsWriter> Create(std::vector<TensorSpec> specs) {
    return SafetensorsWriter::Create(FileSystem::Default(), folder_ / "out.safetensors",
                                     std::move(specs), {{"format", "pt"}});
  }
};

TEST_F(SafetensorsWriterTest, WritesTheBytesOfTheReferenceLibrary) {
  auto writer = Create(ReferenceSpecs());
  ASSERT_TRUE(writer.ok()) << writer.status().message();
  for (const char& byte : kReferenceData) {
    ASSERT_TRUE(writer->Append(Bytes(std::string_view(&byte, 1))).ok());
  }
  ASSERT_TRUE(writer->Close().ok());
  EXPECT_EQ(*ReadFile(folder_ / "out.safetensors"), Reference());
}

TEST_F(SafetensorsWriterTest, HeaderIsPaddedWithSpacesToEightBytes) {
  for (size_t length = 0; length < 9; ++length) {
    const std::string header =
        SafetensorsHeader({{std::string(length, 'n'), DType::kF32, {3}}}, {});
    EXPECT_EQ(header.size() % 8, 0u);
    const std::string json = header.substr(8);
    EXPECT_EQ(header.substr(0, 8), Length(json.size()));
    EXPECT_EQ(json.find_last_not_of(' '), json.rfind('}'));
    EXPECT_TRUE(Open(header + std::string(12, 'x')).ok());
  }
}

TEST_F(SafetensorsWriterTest, NamesAndMetadataSurviveAnyCharacters) {
  const std::string name = "a \"quoted\"\\name\n\t\x01 \xc3\xa9 {}/%";
  const std::map<std::string, std::string> metadata = {{"k\"ey", "v\n{}"}, {"", ""}};
  const auto file = Open(SafetensorsHeader({{name, DType::kU8, {1}}}, metadata) + "x");
  ASSERT_TRUE(file.ok()) << file.status().message();
  EXPECT_NE(file->Find(name), nullptr);
  EXPECT_EQ(file->metadata(), metadata);
}

TEST_F(SafetensorsWriterTest, RefusesSpecsThatAReaderWouldRefuse) {
  constexpr int64_t kHuge = int64_t{1} << 40;
  const std::vector<std::pair<std::vector<TensorSpec>, std::string>> cases = {
      {{{"t", DType::kU8, {1}}, {"u", DType::kU8, {1}}, {"t", DType::kU8, {2}}}, "taken"},
      {{{"__metadata__", DType::kU8, {1}}}, "reserved"},
      {{{"t", DType::kU8, {-1}}}, "[-1]"},
      {{{"t", DType::kF32, {kHuge, kHuge}}}, "too large"},
      {{{"s", DType::kF64, {kHuge, 1 << 19}}, {"t", DType::kF64, {kHuge, 1 << 19}}}, "too large"}};
  for (const auto& [specs, what] : cases) {
    const auto writer = Create(specs);
    ASSERT_FALSE(writer.ok()) << what;
    EXPECT_THAT(writer.status().message(), HasSubstr("out.safetensors"));
    EXPECT_THAT(writer.status().message(), HasSubstr(what));
    EXPECT_TRUE(folder_.List().empty());
  }
}

TEST_F(SafetensorsWriterTest, TooManyOrTooFewBytesAreErrors) {
  auto full = Create(ReferenceSpecs());
  ASSERT_TRUE(full.ok());
  ASSERT_TRUE(full->Append(Bytes(kReferenceData)).ok());
  const Status more = full->Append(Bytes("xy"));
  ASSERT_FALSE(more.ok());
  EXPECT_THAT(more.message(), HasSubstr("2 bytes more"));

  auto partial = Create(ReferenceSpecs());
  ASSERT_TRUE(partial.ok());
  ASSERT_TRUE(partial->Append(Bytes("12345")).ok());
  const Status fewer = partial->Close();
  ASSERT_FALSE(fewer.ok());
  EXPECT_THAT(fewer.message(), HasSubstr("7 bytes fewer"));
}

TEST_F(SafetensorsWriterTest, EveryFailedOperationIsReported) {
  for (int64_t n = 0; n < 4; ++n) {
    FaultyFileSystem faulty;
    faulty.FailAt(n);
    auto writer = SafetensorsWriter::Create(faulty, folder_ / "f", ReferenceSpecs(), {});
    Status status = writer.status();
    if (status.ok()) status = writer->Append(Bytes(kReferenceData));
    if (status.ok()) status = writer->Close();
    EXPECT_EQ(status.code(), StatusCode::kSystem) << n;
    EXPECT_THAT(status.message(), HasSubstr("Input/output error")) << n;
  }
}

}  // namespace
}  // namespace prismaquant

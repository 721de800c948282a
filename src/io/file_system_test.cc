#include "io/file_system.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <limits>
#include <string>
#include <utility>

#include "io/faulty_file_system.h"
#include "io/temporary_folder.h"

namespace prismaquant {
namespace {

namespace stdfs = std::filesystem;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

std::span<const std::byte> Bytes(std::string_view text) { return std::as_bytes(std::span(text)); }

std::string Text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

void ExpectError(const Status& status, StatusCode code, const stdfs::path& path,
                 const std::string& what) {
  EXPECT_EQ(status.code(), code) << status.message();
  EXPECT_THAT(status.message(), StartsWith(path.string() + ": "));
  EXPECT_THAT(status.message(), HasSubstr(what));
  EXPECT_THAT(status.message(), Not(HasSubstr("\n")));
}

class FileSystemTest : public ::testing::Test {
 protected:
  TemporaryFolder folder_;
  FileSystem& fs_ = FileSystem::Default();
};

TEST_F(FileSystemTest, WritesPiecesOfAnySizeInOrder) {
  std::string expected;
  auto file = fs_.Create(folder_ / "f");
  ASSERT_TRUE(file.ok()) << file.status().message();
  for (const size_t size : {0, 1, 1000, 1 << 20, 7, (1 << 20) - 1, (1 << 20) + 1, 3}) {
    const std::string piece(size, static_cast<char>('a' + expected.size() % 26));
    ASSERT_TRUE((*file)->Append(Bytes(piece)).ok());
    expected += piece;
  }
  ASSERT_TRUE((*file)->Close().ok());
  const auto contents = ReadFile(folder_ / "f");
  ASSERT_TRUE(contents.ok());
  EXPECT_TRUE(*contents == expected);
}

TEST_F(FileSystemTest, CreateTruncates) {
  folder_.Put("f", "a long old text");
  auto file = fs_.Create(folder_ / "f");
  ASSERT_TRUE(file.ok());
  ASSERT_TRUE((*file)->Append(Bytes("new")).ok());
  ASSERT_TRUE((*file)->Close().ok());
  EXPECT_EQ(*ReadFile(folder_ / "f"), "new");
}

TEST_F(FileSystemTest, ReadFileSaysWhatIsWrongWithAnInput) {
  folder_.Put("plain", "x");
  ExpectError(ReadFile(folder_ / "none").status(), StatusCode::kInvalidInput, folder_ / "none",
              "no such file");
  ExpectError(ReadFile(folder_.path()).status(), StatusCode::kInvalidInput, folder_.path(),
              "not a regular file");
  ExpectError(ReadFile(folder_ / "plain/below").status(), StatusCode::kInvalidInput,
              folder_ / "plain/below", "Not a directory");
  EXPECT_EQ(*ReadFile(folder_.Put("empty", "")), "");
  EXPECT_EQ(*ReadFile(folder_.Put("nul", std::string_view("a\0b", 3))), std::string("a\0b", 3));
}

TEST_F(FileSystemTest, EveryFailureIsASystemErrorThatNamesThePath) {
  folder_.Put("plain", "x");
  ExpectError(fs_.Create(folder_ / "none/f").status(), StatusCode::kSystem, folder_ / "none/f",
              "No such file");
  ExpectError(fs_.CreateDirectories(folder_ / "plain/below"), StatusCode::kSystem,
              folder_ / "plain/below", "Not a directory");
  ExpectError(fs_.Rename(folder_ / "none", folder_ / "to"), StatusCode::kSystem, folder_ / "to",
              "No such file");
  ExpectError(fs_.SyncDirectory(folder_ / "none"), StatusCode::kSystem, folder_ / "none",
              "No such file");
  EXPECT_TRUE(fs_.RemoveAll(folder_ / "none").ok());
}

TEST_F(FileSystemTest, FullDeviceIsASystemError) {
  auto file = fs_.Create("/dev/full");
  if (!file.ok()) GTEST_SKIP() << file.status().message();
  ASSERT_TRUE((*file)->Append(Bytes("small enough to be buffered")).ok());
  ExpectError((*file)->Close(), StatusCode::kSystem, "/dev/full", "No space left on device");
  auto large = fs_.Create("/dev/full");
  ASSERT_TRUE(large.ok());
  ExpectError((*large)->Append(Bytes(std::string(3 << 20, 'x'))), StatusCode::kSystem, "/dev/full",
              "No space left on device");
}

TEST_F(FileSystemTest, ShortWriteGoesOnUntilTheSystemSaysWhy) {
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit limit{.rlim_cur = 1000, .rlim_max = before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &limit), 0);
  auto file = fs_.Create(folder_ / "f");
  Status status = file.status();
  if (status.ok()) status = (*file)->Append(Bytes(std::string(2 << 20, 'x')));
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  std::signal(SIGXFSZ, handler);
  ExpectError(status, StatusCode::kSystem, folder_ / "f", "File too large");
  EXPECT_EQ(stdfs::file_size(folder_ / "f"), 1000u);
}

TEST_F(FileSystemTest, KnowsTheRoomOfAFolderThatIsNotThereYet) {
  constexpr int64_t kUnknown = std::numeric_limits<int64_t>::max();
  EXPECT_EQ(ExistingFolder(folder_ / "a/b"), folder_.path());
  EXPECT_LT(fs_.FreeBytes(folder_ / "a/b"), kUnknown);
  EXPECT_TRUE(std::filesystem::is_directory(ExistingFolder("")));
  EXPECT_LT(fs_.FreeBytes(""), kUnknown) << "the folder of a name alone";
}

TEST_F(FileSystemTest, WriteFileAtomicallyReplaces) {
  folder_.Put("f", "old");
  ASSERT_TRUE(WriteFileAtomically(fs_, folder_ / "f", "new").ok());
  EXPECT_EQ(*ReadFile(folder_ / "f"), "new");
  EXPECT_EQ(folder_.List(), (std::set<std::string>{"f"}));
}

TEST_F(FileSystemTest, WriteFileAtomicallyLeavesOldOrNewAndNothingBeside) {
  int64_t count = 0;
  {
    FaultyFileSystem counting;
    ASSERT_TRUE(WriteFileAtomically(counting, folder_ / "f", "x").ok());
    count = counting.operations();
  }
  ASSERT_EQ(count, 5);
  for (int64_t n = 0; n < count; ++n) {
    folder_.Put("f", "old");
    FaultyFileSystem faulty;
    faulty.FailAt(n);
    const Status status = WriteFileAtomically(faulty, folder_ / "f", "new");
    EXPECT_EQ(status.code(), StatusCode::kSystem) << n;
    EXPECT_EQ(*ReadFile(folder_ / "f"), n < 4 ? "old" : "new") << n;
    EXPECT_EQ(folder_.List(), (std::set<std::string>{"f"})) << n;
  }
}

TEST_F(FileSystemTest, MappedFileShowsTheBytesAndMoves) {
  auto opened = MappedFile::Open(folder_.Put("f", "contents"));
  ASSERT_TRUE(opened.ok());
  MappedFile first = std::move(opened).value();
  MappedFile second = std::move(first);
  EXPECT_EQ(Text(second.bytes()), "contents");
  EXPECT_TRUE(first.bytes().empty());
  second.WillNeed(second.bytes().subspan(3));
  second.DontNeed(second.bytes());
  EXPECT_EQ(Text(second.bytes()), "contents");
  auto other = MappedFile::Open(folder_.Put("g", "other"));
  ASSERT_TRUE(other.ok());
  second = std::move(other).value();
  EXPECT_EQ(Text(second.bytes()), "other");
}

TEST_F(FileSystemTest, MappedFileRefusesWhatIsNoFile) {
  ExpectError(MappedFile::Open(folder_ / "none").status(), StatusCode::kInvalidInput,
              folder_ / "none", "no such file");
  ExpectError(MappedFile::Open(folder_.path()).status(), StatusCode::kInvalidInput, folder_.path(),
              "not a regular file");
  const auto empty = MappedFile::Open(folder_.Put("empty", ""));
  ASSERT_TRUE(empty.ok());
  EXPECT_TRUE(empty->bytes().empty());
}

class FaultyFileSystemTest : public FileSystemTest {
 protected:
  FaultyFileSystem faulty_;
};

TEST_F(FaultyFileSystemTest, FailsExactlyTheNamedOperation) {
  faulty_.FailAt(1);
  EXPECT_TRUE(faulty_.CreateDirectories(folder_ / "a").ok());
  ExpectError(faulty_.CreateDirectories(folder_ / "b"), StatusCode::kSystem, folder_ / "b",
              "Input/output error");
  EXPECT_TRUE(faulty_.CreateDirectories(folder_ / "c").ok());
  EXPECT_EQ(faulty_.operations(), 3);
  EXPECT_EQ(folder_.List(), (std::set<std::string>{"a", "c"}));
}

TEST_F(FaultyFileSystemTest, FailsAllFromTheNamedOperation) {
  faulty_.FailFrom(1);
  auto file = faulty_.Create(folder_ / "f");
  ASSERT_TRUE(file.ok());
  EXPECT_FALSE((*file)->Append(Bytes("x")).ok());
  EXPECT_FALSE((*file)->Close().ok());
  EXPECT_FALSE(faulty_.Rename(folder_ / "f", folder_ / "g").ok());
  EXPECT_FALSE(faulty_.RemoveAll(folder_ / "f").ok());
  EXPECT_FALSE(faulty_.SyncDirectory(folder_.path()).ok());
  EXPECT_EQ(faulty_.operations(), 6);
  EXPECT_EQ(folder_.List(), (std::set<std::string>{"f"}));
}

TEST_F(FaultyFileSystemTest, FullDiskKeepsWhatFits) {
  faulty_.LimitBytes(5);
  auto file = faulty_.Create(folder_ / "f");
  ASSERT_TRUE(file.ok());
  EXPECT_TRUE((*file)->Append(Bytes("abc")).ok());
  ExpectError((*file)->Append(Bytes("defg")), StatusCode::kSystem, folder_ / "f",
              "No space left on device");
  EXPECT_TRUE((*file)->Close().ok());
  EXPECT_EQ(*ReadFile(folder_ / "f"), "abcde");
}

}  // namespace
}  // namespace prismaquant

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "io/checkpoint.h"
#include "io/faulty_file_system.h"
#include "io/temporary_folder.h"

namespace prismaquant {
namespace {

namespace stdfs = std::filesystem;
using ::testing::HasSubstr;
using Tensors = std::vector<CheckpointWriter::Tensor>;

// A U8 tensor of `size` bytes whose source hands out `given` in pieces of 3.
CheckpointWriter::Tensor Tensor(const std::string& name, int64_t size, const std::string& given) {
  return {{name, DType::kU8, {size}}, [given](const CheckpointWriter::Sink& sink) -> Status {
            for (size_t at = 0; at < given.size(); at += 3) {
              const std::string piece = given.substr(at, 3);
              PQ_RETURN_IF_ERROR(sink(std::as_bytes(std::span(piece))));
            }
            return {};
          }};
}

CheckpointWriter::Tensor Tensor(const std::string& name, const std::string& contents) {
  return Tensor(name, static_cast<int64_t>(contents.size()), contents);
}

class CheckpointWriterTest : public ::testing::Test {
 protected:
  static constexpr char kConfig[] = "{\"model_type\":\"new\"}";

  static Tensors Plan() {
    return {Tensor("z", "zzzz"), Tensor("b", "bbbbb"), Tensor("a", "a"), Tensor("m", "mmmmmm")};
  }
  static std::map<std::string, std::string> Files() {
    return {{"config.json", kConfig}, {"tokenizer.json", "{}"}};
  }
  stdfs::path out() const { return folder_ / "out"; }

  Status Write(FileSystem& fs, const CheckpointWriter::Options& options,
               const Tensors& tensors = Plan()) const {
    return CheckpointWriter::Write(fs, out(), options, tensors, Files());
  }
  Status Write(const CheckpointWriter::Options& options, const Tensors& tensors = Plan()) const {
    return Write(FileSystem::Default(), options, tensors);
  }
  void PutOld() const {
    folder_.Put("out/config.json", "{\"model_type\":\"old\"}");
    folder_.Put("out/model.safetensors", SafetensorsHeader({}, {}));
    folder_.Put("out/notes", "kept with the old one");
  }
  static std::set<std::string> OldFiles() {
    return {"out", "out/config.json", "out/model.safetensors", "out/notes"};
  }
  static std::set<std::string> NewFiles() {
    return {"out",
            "out/config.json",
            "out/model-00001-of-00002.safetensors",
            "out/model-00002-of-00002.safetensors",
            "out/model.safetensors.index.json",
            "out/tokenizer.json"};
  }
  void ExpectRefused(const Status& status, StatusCode code,
                     const std::vector<std::string>& parts) const {
    EXPECT_EQ(status.code(), code) << status.message();
    for (const std::string& part : parts) EXPECT_THAT(status.message(), HasSubstr(part));
  }
  void ExpectComplete() const {
    const auto checkpoint = Checkpoint::Open(out());
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().message();
    EXPECT_EQ(checkpoint->names(), (std::vector<std::string>{"z", "b", "a", "m"}));
    EXPECT_EQ(checkpoint->config()["model_type"], "new");
    const auto bytes = checkpoint->Get("b")->bytes;
    EXPECT_EQ(std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()), "bbbbb");
  }

  // Two shards: z and b, a and m.
  const CheckpointWriter::Options sharded_{.shard_bytes = 9, .overwrite = false, .check = {}};
  const CheckpointWriter::Options replacing_{.shard_bytes = 9, .overwrite = true, .check = {}};
  TemporaryFolder folder_;
};

TEST_F(CheckpointWriterTest, OneShardIsModelSafetensorsInPlanOrder) {
  const Status status = Write({});
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(folder_.List(), (std::set<std::string>{"out", "out/config.json", "out/tokenizer.json",
                                                   "out/model.safetensors"}));
  EXPECT_EQ(*ReadFile(out() / "config.json"), kConfig);
  ExpectComplete();
  const auto file = SafetensorsFile::Open(out() / "model.safetensors");
  ASSERT_TRUE(file.ok());
  EXPECT_EQ(file->metadata().at("format"), "pt");
}

TEST_F(CheckpointWriterTest, SeveralShardsHaveAnIndex) {
  const Status status = Write(sharded_);
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(folder_.List(), NewFiles());
  EXPECT_EQ(*ReadFile(out() / "model.safetensors.index.json"),
            R"({
  "metadata": {
    "total_size": 16
  },
  "weight_map": {
    "a": "model-00002-of-00002.safetensors",
    "b": "model-00001-of-00002.safetensors",
    "m": "model-00002-of-00002.safetensors",
    "z": "model-00001-of-00002.safetensors"
  }
}
)");
  ExpectComplete();
}

TEST_F(CheckpointWriterTest, FileBytesIsWhatIsWritten) {
  std::vector<TensorSpec> specs;
  for (const auto& tensor : Plan()) specs.push_back(tensor.spec);
  for (const int64_t shard_bytes : {1, 5, 9, 15, 16, 1000}) {
    CheckpointWriter::Options options = replacing_;
    options.shard_bytes = shard_bytes;
    ASSERT_TRUE(Write(options).ok());
    const auto written = Checkpoint::Open(out());
    ASSERT_TRUE(written.ok()) << written.status().message();
    EXPECT_EQ(CheckpointWriter::FileBytes(specs, options), written->file_bytes()) << shard_bytes;
  }
}

TEST_F(CheckpointWriterTest, SameInputGivesTheSameBytes) {
  ASSERT_TRUE(Write(sharded_).ok());
  const auto first = *ReadFile(out() / "model-00002-of-00002.safetensors");
  ASSERT_TRUE(Write(replacing_).ok());
  EXPECT_EQ(*ReadFile(out() / "model-00002-of-00002.safetensors"), first);
}

TEST_F(CheckpointWriterTest, TrailingSeparatorAndMissingParentsAreFine) {
  const Status status = CheckpointWriter::Write(FileSystem::Default(), folder_ / "new/deep/out/",
                                                {}, Plan(), Files());
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(folder_.List(), (std::set<std::string>{
                                "new", "new/deep", "new/deep/out", "new/deep/out/config.json",
                                "new/deep/out/tokenizer.json", "new/deep/out/model.safetensors"}));
}

TEST_F(CheckpointWriterTest, RefusesAnExistingFolderWithoutOverwrite) {
  PutOld();
  ExpectRefused(Write(sharded_), StatusCode::kInvalidInput, {out().string(), "--overwrite"});
  EXPECT_EQ(folder_.List(), OldFiles());
}

TEST_F(CheckpointWriterTest, OverwriteReplacesAllOfTheOldFolder) {
  PutOld();
  const Status status = Write(replacing_);
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(folder_.List(), NewFiles());
  ExpectComplete();
}

TEST_F(CheckpointWriterTest, OverwriteSparesWhatIsNoCheckpoint) {
  folder_.Put("out/thesis.txt", "precious");
  ExpectRefused(Write(replacing_), StatusCode::kInvalidInput, {out().string(), "config.json"});
  EXPECT_EQ(folder_.List(), (std::set<std::string>{"out", "out/thesis.txt"}));
  stdfs::remove_all(out());
  folder_.Put("out", "a plain file");
  ExpectRefused(Write(replacing_), StatusCode::kInvalidInput, {out().string(), "config.json"});
  EXPECT_EQ(*ReadFile(out()), "a plain file");
  for (const char* name : {"/", ".", "..", "out/.."}) {
    ExpectRefused(CheckpointWriter::Write(FileSystem::Default(), name, replacing_, Plan(), Files()),
                  StatusCode::kInvalidInput, {"no name"});
  }
}

TEST_F(CheckpointWriterTest, RemovesAStalePartialFolder) {
  folder_.Put(".out.partial/model.safetensors", "stale");
  ASSERT_TRUE(Write(sharded_).ok());
  EXPECT_EQ(folder_.List(), NewFiles());
}

TEST_F(CheckpointWriterTest, WrongSourcesAreErrorsThatNameTheTensor) {
  const Status failing = Status::Unmet("no bytes for you");
  const std::vector<std::pair<CheckpointWriter::Tensor, std::string>> cases = {
      {Tensor("bad", 5, "1234"), "tensor bad: 4 bytes"},
      {Tensor("bad", 5, "123456"), "tensor bad: 6 bytes"},
      {Tensor("bad", 5, ""), "tensor bad: 0 bytes"},
      {Tensor("z", "again"), "tensor z"},
      {{{"bad", DType::kU8, {1}}, [&](const CheckpointWriter::Sink&) { return failing; }},
       "no bytes for you"}};
  for (const auto& [tensor, message] : cases) {
    for (const int64_t shard_bytes : {4, 1000}) {
      Tensors tensors = Plan();
      tensors.push_back(tensor);
      CheckpointWriter::Options options;
      options.shard_bytes = shard_bytes;
      const Status status = Write(options, tensors);
      ASSERT_FALSE(status.ok());
      EXPECT_THAT(status.message(), HasSubstr(message));
      EXPECT_TRUE(folder_.List().empty()) << message;
    }
  }
}

TEST_F(CheckpointWriterTest, FailedCheckAbandonsTheNewFolder) {
  PutOld();
  CheckpointWriter::Options options = replacing_;
  options.check = [&](const stdfs::path& folder) {
    EXPECT_TRUE(Checkpoint::Open(folder).ok());
    return Status::Unmet("verification failed");
  };
  ExpectRefused(Write(options), StatusCode::kUnmet, {"verification failed"});
  EXPECT_EQ(folder_.List(), OldFiles());
}

// Write, from an old folder or from nothing, with one failure.
class CheckpointWriterFaultTest : public CheckpointWriterTest,
                                  public ::testing::WithParamInterface<bool> {
 protected:
  bool replaces() const { return GetParam(); }
  const CheckpointWriter::Options& options() const { return replaces() ? replacing_ : sharded_; }
  std::set<std::string> Before() const { return replaces() ? OldFiles() : std::set<std::string>(); }
  void Reset() const {
    for (const auto& entry : stdfs::directory_iterator(folder_.path())) {
      stdfs::remove_all(entry.path());
    }
    if (replaces()) PutOld();
  }
  int64_t Operations() const {
    Reset();
    FaultyFileSystem counting;
    EXPECT_TRUE(Write(counting, options()).ok());
    return counting.operations();
  }
};

TEST_P(CheckpointWriterFaultTest, AnyFailedOperationLeavesTheOldFolderOrTheNew) {
  const int64_t operations = Operations();
  ASSERT_GT(operations, 20);
  for (int64_t n = 0; n < operations; ++n) {
    Reset();
    FaultyFileSystem faulty;
    faulty.FailAt(n);
    const Status status = Write(faulty, options());
    ExpectRefused(status, StatusCode::kSystem, {"Input/output error"});
    std::set<std::string> now = folder_.List();
    const bool removal_of_old = replaces() && n == operations - 1;
    if (!removal_of_old) {
      EXPECT_EQ(now, Before()) << "operation " << n << ": " << status.message();
      continue;
    }
    EXPECT_THAT(status.message(), HasSubstr(".out.old"));
    ExpectComplete();
    ASSERT_TRUE(Write(replacing_).ok());
    EXPECT_EQ(folder_.List(), NewFiles());
  }
}

TEST_P(CheckpointWriterFaultTest, AfterAStopAtAnyOperationTheSameCommandEndsTheSame) {
  const int64_t operations = Operations();
  for (int64_t n = 0; n < operations; ++n) {
    Reset();
    FaultyFileSystem stopping;
    stopping.FailFrom(n);
    EXPECT_FALSE(Write(stopping, options()).ok()) << n;
    const auto found = Checkpoint::Open(out());
    if (replaces()) {
      const bool aside = stdfs::exists(folder_ / ".out.old/notes");
      EXPECT_TRUE(aside || stdfs::exists(out() / "notes")) << n;
    }
    if (found.ok() && found->config()["model_type"] == "new") ExpectComplete();
    const Status status = Write(replacing_);
    ASSERT_TRUE(status.ok()) << n << ": " << status.message();
    EXPECT_EQ(folder_.List(), NewFiles()) << n;
    ExpectComplete();
  }
}

TEST_P(CheckpointWriterFaultTest, DiskThatFillsUpLeavesTheOldFolder) {
  Reset();
  int64_t needed = 0;
  for (;; needed += 17) {
    Reset();
    FaultyFileSystem full;
    full.LimitBytes(needed);
    const Status status = Write(full, options());
    if (status.ok()) break;
    ExpectRefused(status, StatusCode::kSystem, {"No space left on device"});
    EXPECT_EQ(folder_.List(), Before()) << needed;
  }
  EXPECT_GT(needed, 300);
  ExpectComplete();
}

TEST_P(CheckpointWriterFaultTest, DiskThatIsTooSmallIsNotWrittenTo) {
  Reset();
  FaultyFileSystem full;
  full.ReportFree(1);
  ExpectRefused(Write(full, options()), StatusCode::kSystem, {"no space left", "are missing"});
  EXPECT_EQ(folder_.List(), Before());
}

INSTANTIATE_TEST_SUITE_P(Fresh, CheckpointWriterFaultTest, ::testing::Values(false));
INSTANTIATE_TEST_SUITE_P(Replacing, CheckpointWriterFaultTest, ::testing::Values(true));

TEST_F(CheckpointWriterTest, LeftoversAreRemovedOnceTheNewFolderIsThere) {
  folder_.Put(".out.old/notes", "kept with the old one");
  ASSERT_TRUE(CheckpointWriter::RemoveLeftovers(FileSystem::Default(), out()).ok());
  EXPECT_TRUE(stdfs::exists(folder_ / ".out.old/notes")) << "the only one that there is";
  folder_.Put("out/config.json", kConfig);
  ASSERT_TRUE(CheckpointWriter::RemoveLeftovers(FileSystem::Default(), out()).ok());
  EXPECT_EQ(folder_.List(), (std::set<std::string>{"out", "out/config.json"}));
}

TEST_F(CheckpointWriterTest, DestinationHoldsNothingThatIsNeeded) {
  PutOld();
  folder_.Put("out/inner/config.json", kConfig);
  folder_.Put("outer/config.json", kConfig);
  stdfs::create_directory_symlink(out(), folder_ / "link");
  for (const stdfs::path& needed : {out(), out() / "", out() / "inner", folder_ / "link",
                                    folder_ / "outer/../out", out() / "not/yet"}) {
    ExpectRefused(CheckDestination(out(), {folder_ / "outer", needed}), StatusCode::kInvalidInput,
                  {out().string(), needed.string()});
  }
  EXPECT_TRUE(CheckDestination(out(), {folder_ / "outer", folder_ / "other"}).ok());
  EXPECT_TRUE(CheckDestination(out() / "new", {out()}).ok());
  EXPECT_TRUE(CheckDestination(folder_ / "new", {out()}).ok());
}

TEST_F(CheckpointWriterTest, KilledBetweenTheRenamesGivesTheOldFolderBack) {
  PutOld();
  stdfs::rename(out(), folder_ / ".out.old");
  folder_.Put(".out.partial/config.json", kConfig);
  ExpectRefused(Write(sharded_), StatusCode::kInvalidInput, {"--overwrite"});
  EXPECT_TRUE(stdfs::exists(out() / "notes"));
  ASSERT_TRUE(Write(replacing_).ok());
  EXPECT_EQ(folder_.List(), NewFiles());
}

}  // namespace
}  // namespace prismaquant

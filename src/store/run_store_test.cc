#include "store/run_store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <fstream>
#include <limits>

#include "io/faulty_file_system.h"
#include "io/temporary_folder.h"

namespace prismaquant {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

const std::map<std::string, std::string> kIdentity = {{"seed", "0"}, {"tokens", "512"}};

class RunStoreTest : public ::testing::Test {
 protected:
  Result<RunStore> Open() { return RunStore::Open(FileSystem::Default(), folder_ / "work"); }
  // Opens or ends the test.
  RunStore Must() {
    Result<RunStore> store = Open();
    EXPECT_TRUE(store.ok()) << store.status().message();
    return std::move(store).value();
  }
  static Status Put(RunStore& store, const std::string& name, const std::string& contents) {
    const TensorSpec spec{"t", DType::kU8, {static_cast<int64_t>(contents.size())}};
    return store.PutBlob(name, {{spec, std::as_bytes(std::span(contents))}});
  }
  static std::string Get(const RunStore& store, const std::string& name) {
    const Result<SafetensorsFile> file = store.Blob(name);
    if (!file.ok()) return "";
    const auto bytes = file->tensors().front().bytes;
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }

  TemporaryFolder folder_;
};

TEST_F(RunStoreTest, BelongsToOneIdentityAndNamesEveryDifference) {
  RunStore store = Must();
  ASSERT_TRUE(store.Bind(kIdentity).ok());
  EXPECT_TRUE(store.Bind(kIdentity).ok());
  EXPECT_EQ(*store.Identity(), kIdentity);
  const Status status = store.Bind({{"seed", "7"}, {"tokens", "256"}});
  EXPECT_EQ(status.code(), StatusCode::kInvalidInput);
  EXPECT_THAT(status.message(), AllOf(HasSubstr("seed 0 (this run: 7)"),
                                      HasSubstr("tokens 512 (this run: 256)"), HasSubstr("work")));
  EXPECT_THAT(store.Bind({{"seed", "7"}, {"tokens", "512"}}).message(), Not(HasSubstr("tokens")));
  EXPECT_THAT(store.Bind({{"seed", "0"}, {"tokens", "512"}, {"new", "x"}}).message(),
              HasSubstr("new (none)"));
  EXPECT_THAT(store.Bind({{"seed", "0"}}).message(), HasSubstr("tokens 512 (this run: (none))"));
}

TEST_F(RunStoreTest, IsLockedWhileItLives) {
  {
    const RunStore store = Must();
    const Status second = Open().status();
    EXPECT_EQ(second.code(), StatusCode::kInvalidInput);
    EXPECT_THAT(second.message(), HasSubstr("in use"));
  }
  EXPECT_TRUE(Open().ok());
}

TEST_F(RunStoreTest, LeavesAForeignFolderAlone) {
  folder_.Put("work/precious.txt", "text");
  const Status status = Open().status();
  EXPECT_EQ(status.code(), StatusCode::kInvalidInput);
  EXPECT_THAT(status.message(), HasSubstr("not a run store"));
  EXPECT_EQ(folder_.List(), (std::set<std::string>{"work", "work/precious.txt"}));
}

TEST_F(RunStoreTest, ALockAloneIsAStoreInTheMaking) {
  folder_.Put("work/lock", "");
  ASSERT_TRUE(Open().ok());
  std::filesystem::remove(folder_ / "work/run.sqlite");
  folder_.Put("work/precious.txt", "text");
  EXPECT_EQ(Open().status().code(), StatusCode::kInvalidInput);
  EXPECT_EQ(folder_.List(), (std::set<std::string>{"work", "work/lock", "work/precious.txt"}));
}

TEST_F(RunStoreTest, AFileInPlaceOfTheFolderIsRefused) {
  folder_.Put("work", "");
  const Status status = Open().status();
  EXPECT_EQ(status.code(), StatusCode::kInvalidInput);
  EXPECT_THAT(status.message(), HasSubstr("is not a folder"));
}

TEST_F(RunStoreTest, OpenExistingNeedsAStore) {
  const auto status = RunStore::OpenExisting(FileSystem::Default(), folder_ / "nothing").status();
  EXPECT_EQ(status.code(), StatusCode::kInvalidInput);
  EXPECT_FALSE(std::filesystem::exists(folder_ / "nothing"));
}

TEST_F(RunStoreTest, ADamagedDatabaseIsOneLineThatNamesIt) {
  { const RunStore store = Must(); }
  const std::filesystem::path file = folder_ / "work" / "run.sqlite";
  const auto refuse = [&] {
    const Status status = Open().status();
    EXPECT_EQ(status.code(), StatusCode::kInvalidInput) << status.message();
    EXPECT_THAT(status.message(), AllOf(HasSubstr("run.sqlite"), Not(HasSubstr("\n"))));
  };
  std::filesystem::resize_file(file, 1000);
  refuse();
  folder_.Put("work/run.sqlite", std::string(5000, 'x'));
  refuse();
}

TEST_F(RunStoreTest, ATruncatedDatabaseIsRefusedWheneverItIsRead) {
  {
    RunStore store = Must();
    ASSERT_TRUE(store.Bind(kIdentity).ok());
    for (int layer = 0; layer < 50; ++layer) {
      const std::string linear = "linear" + std::to_string(layer);
      ASSERT_TRUE(
          store
              .Commit("backward", layer, {{.name = linear, .layer = layer}},
                      {{linear, "nvfp4", Rounding::kNearest, 0.5, std::vector<double>(100, 1.5)}})
              .ok());
    }
  }
  const std::filesystem::path file = folder_ / "work" / "run.sqlite";
  std::filesystem::copy_file(file, folder_ / "whole");
  const auto use = [&]() -> Status {
    PQ_ASSIGN_OR_RETURN(RunStore store, Open());
    PQ_RETURN_IF_ERROR(store.Bind(kIdentity));
    PQ_ASSIGN_OR_RETURN(const auto stats, store.Stats());
    PQ_ASSIGN_OR_RETURN(const auto costs, store.Costs());
    EXPECT_EQ(stats.size() + costs.size(), 100U);
    return {};
  };
  ASSERT_TRUE(use().ok());
  const auto size = static_cast<int64_t>(std::filesystem::file_size(file));
  ASSERT_GT(size, 10 * 4096);
  for (int64_t kept = 2; kept < size; kept += 1024) {
    std::filesystem::copy_file(folder_ / "whole", file,
                               std::filesystem::copy_options::overwrite_existing);
    std::filesystem::resize_file(file, kept);
    const Status status = use();
    EXPECT_EQ(status.code(), StatusCode::kInvalidInput) << kept << ": " << status.message();
    EXPECT_THAT(status.message(),
                AllOf(HasSubstr("run.sqlite: "), Not(HasSubstr("\n")), Not(HasSubstr(": : "))));
  }
}

TEST_F(RunStoreTest, AnotherSchemaIsRefused) {
  { const RunStore store = Must(); }
  {
    Database database = Database::Open(folder_ / "work" / "run.sqlite").value();
    ASSERT_TRUE(database.Execute("PRAGMA user_version = 99").ok());
  }
  EXPECT_THAT(Open().status().message(), HasSubstr("schema 99"));
}

TEST_F(RunStoreTest, CommitKeepsRowsAndMarkTogether) {
  const LinearStats stats{.name = "a.q",
                          .layer = 3,
                          .weight_amax = 1.5,
                          .input_amax = 0.1,
                          .fisher_trace = 1e-30,
                          .grad_square = 7,
                          .tokens = 12};
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const LinearCost cost{.linear = "a.q",
                        .format = "nvfp4",
                        .weight_mse = 0.25,
                        .directional = {0.1, -0.0, 1e-310, nan, 3}};
  {
    RunStore store = Must();
    EXPECT_FALSE(*store.IsDone("backward", 3));
    ASSERT_TRUE(store.Commit("backward", 3, {stats}, {cost}).ok());
  }
  RunStore store = Must();
  EXPECT_TRUE(*store.IsDone("backward", 3));
  EXPECT_FALSE(*store.IsDone("backward", 2));
  EXPECT_FALSE(*store.IsDone("forward", 3));
  const std::vector<LinearStats> found = store.Stats().value();
  ASSERT_EQ(found.size(), 1U);
  EXPECT_EQ(found[0].name, "a.q");
  EXPECT_EQ(found[0].layer, 3);
  EXPECT_EQ(found[0].input_amax, 0.1);
  EXPECT_EQ(found[0].fisher_trace, 1e-30);
  EXPECT_EQ(found[0].tokens, 12);
  const auto costs = store.Costs().value();
  const std::vector<double>& s = costs.at("a.q").at("nvfp4").directional;
  ASSERT_EQ(s.size(), cost.directional.size());
  for (size_t i = 0; i < s.size(); ++i) {
    EXPECT_EQ(std::bit_cast<uint64_t>(s[i]), std::bit_cast<uint64_t>(cost.directional[i]));
  }
}

TEST_F(RunStoreTest, ALaterCommitReplacesRowsOfTheSameLinear) {
  RunStore store = Must();
  ASSERT_TRUE(store.Commit("forward", 0, {{.name = "a", .layer = 0, .input_amax = 1}}).ok());
  ASSERT_TRUE(store.Commit("backward", 0, {{.name = "a", .layer = 0, .input_amax = 2}}).ok());
  ASSERT_EQ(store.Stats()->size(), 1U);
  EXPECT_EQ(store.Stats()->front().input_amax, 2);
}

TEST_F(RunStoreTest, ACommitThatFailsLeavesNeitherRowsNorMark) {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  RunStore store = Must();
  const LinearStats good{.name = "a"}, bad{.name = "b", .fisher_trace = kNan};
  const Status status = store.Commit("backward", 1, {good, bad});
  EXPECT_EQ(status.code(), StatusCode::kSystem);
  EXPECT_THAT(status.message(), AllOf(HasSubstr("run.sqlite"), HasSubstr("NaN")));
  EXPECT_FALSE(
      store.Commit("backward", 1, {good}, {{"a", "fp8", Rounding::kNearest, kNan, {}}}).ok());
  EXPECT_FALSE(*store.IsDone("backward", 1));
  EXPECT_TRUE(store.Stats()->empty());
  EXPECT_TRUE(store.Costs()->empty());
  ASSERT_TRUE(store.Commit("backward", 1, {good}).ok());
  EXPECT_EQ(store.Stats()->size(), 1U);
}

TEST_F(RunStoreTest, CostsOfOneRoundingLeaveTheOthersAlone) {
  RunStore store = Must();
  const LinearCost nearest{.linear = "a", .format = "fp8", .weight_mse = 1};
  LinearCost gptq = nearest;
  gptq.rounding = Rounding::kGptq;
  gptq.weight_mse = 2;
  ASSERT_TRUE(store.Commit("backward", 0, {}, {nearest}).ok());
  ASSERT_TRUE(store.Commit("backward/1", 0, {}, {gptq}).ok());
  EXPECT_EQ(store.Costs()->at("a").at("fp8").weight_mse, 1);
  EXPECT_EQ(store.Costs(Rounding::kGptq)->at("a").at("fp8").weight_mse, 2);
  EXPECT_TRUE(store.Costs(Rounding::kGptqInSample)->empty());
}

TEST_F(RunStoreTest, InfiniteNumbersSurvive) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  RunStore store = Must();
  const LinearStats stats{.name = "a", .input_amax = kInfinity, .fisher_trace = -kInfinity};
  ASSERT_TRUE(
      store.Commit("backward", 0, {stats}, {{"a", "fp8", Rounding::kNearest, kInfinity, {}}}).ok());
  EXPECT_EQ(store.Stats()->front().input_amax, kInfinity);
  EXPECT_EQ(store.Stats()->front().fisher_trace, -kInfinity);
  EXPECT_EQ(store.Costs()->at("a").at("fp8").weight_mse, kInfinity);
}

TEST_F(RunStoreTest, ListsStagesAndPricedFormats) {
  RunStore store = Must();
  EXPECT_TRUE(store.Stages()->empty());
  for (const int64_t layer : {0, 1}) ASSERT_TRUE(store.Commit("forward", layer).ok());
  ASSERT_TRUE(store
                  .Commit("backward", 1, {},
                          {{"q", "nvfp4", Rounding::kNearest},
                           {"q", "fp8", Rounding::kNearest},
                           {"k", "fp8", Rounding::kGptq}})
                  .ok());
  EXPECT_EQ(*store.Stages(), (std::map<std::string, int64_t>{{"backward", 1}, {"forward", 2}}));
  EXPECT_EQ(*store.PricedFormats(Rounding::kNearest), (std::set<std::string>{"fp8", "nvfp4"}));
  EXPECT_EQ(*store.PricedFormats(Rounding::kGptq), std::set<std::string>{"fp8"});
}

TEST_F(RunStoreTest, ForgetTakesBackTheMarksOfOneStage) {
  RunStore store = Must();
  ASSERT_TRUE(store.Commit("a", 0).ok());
  ASSERT_TRUE(store.Commit("a", 1).ok());
  ASSERT_TRUE(store.Commit("b", 0).ok());
  ASSERT_TRUE(store.Forget("a").ok());
  EXPECT_FALSE(*store.IsDone("a", 0));
  EXPECT_FALSE(*store.IsDone("a", 1));
  EXPECT_TRUE(*store.IsDone("b", 0));
}

TEST_F(RunStoreTest, NotesAreReplacedByKey) {
  RunStore store = Must();
  EXPECT_FALSE(store.Note("k")->has_value());
  ASSERT_TRUE(store.PutNote("k", "one").ok());
  ASSERT_TRUE(store.PutNote("k", "two").ok());
  EXPECT_EQ(**store.Note("k"), "two");
}

TEST_F(RunStoreTest, BlobsComeBackAndGo) {
  RunStore store = Must();
  ASSERT_TRUE(Put(store, "hidden/3", "abc").ok());
  EXPECT_EQ(Get(store, "hidden/3"), "abc");
  ASSERT_TRUE(Put(store, "hidden/3", "other").ok());
  EXPECT_EQ(Get(store, "hidden/3"), "other");
  ASSERT_TRUE(store.RemoveBlob("hidden/3").ok());
  EXPECT_FALSE(store.Blob("hidden/3").ok());
  EXPECT_FALSE(store.HasBlob("hidden/3"));
  ASSERT_TRUE(store.RemoveBlob("hidden/3").ok()) << "removing what is gone is no error";
}

TEST_F(RunStoreTest, WhatAKilledWriteLeftIsOverwritten) {
  RunStore store = Must();
  folder_.Put("work/hidden/3.safetensors.partial", "half a file");
  ASSERT_TRUE(Put(store, "hidden/3", "abc").ok());
  EXPECT_EQ(Get(store, "hidden/3"), "abc");
  EXPECT_FALSE(std::filesystem::exists(folder_ / "work/hidden/3.safetensors.partial"));
}

TEST_F(RunStoreTest, WhatAKilledWriteLeftTakesNoRoom) {
  FaultyFileSystem full;
  RunStore store = RunStore::Open(full, folder_ / "work").value();
  folder_.Put("work/hidden/3.safetensors.partial", "half a file");
  full.ReportFree(0);
  EXPECT_FALSE(Put(store, "hidden/3", "abc").ok());
  EXPECT_FALSE(std::filesystem::exists(folder_ / "work/hidden/3.safetensors.partial"));
}

TEST_F(RunStoreTest, AFailureAtAnyMomentOfAWriteKeepsTheOldBlob) {
  int64_t operations = 0;
  {
    FaultyFileSystem counting;
    RunStore store = RunStore::Open(counting, folder_ / "work").value();
    ASSERT_TRUE(Put(store, "b", "old").ok());
    const int64_t before = counting.operations();
    ASSERT_TRUE(Put(store, "b", "old").ok());
    operations = counting.operations() - before;
  }
  ASSERT_GT(operations, 3);
  for (int64_t n = 0; n < operations; ++n) {
    // Only syncing the folder comes after the rename.
    const std::string expected = n + 1 < operations ? "old" : "new";
    {
      FaultyFileSystem faulty;
      RunStore store = RunStore::Open(faulty, folder_ / "work").value();
      faulty.FailFrom(faulty.operations() + n);
      const Status status = Put(store, "b", "new");
      EXPECT_EQ(status.code(), StatusCode::kSystem);
      EXPECT_EQ(Get(store, "b"), expected) << "failing operation " << n;
    }
    EXPECT_EQ(Get(Must(), "b"), expected) << "reopened after failing operation " << n;
  }
}

TEST_F(RunStoreTest, AFullDiskIsASystemError) {
  FaultyFileSystem full;
  RunStore store = RunStore::Open(full, folder_ / "work").value();
  full.LimitBytes(100);
  const Status status = Put(store, "b", std::string(1000, 'x'));
  EXPECT_EQ(status.code(), StatusCode::kSystem);
  EXPECT_THAT(status.message(), HasSubstr("No space left"));
  EXPECT_FALSE(store.Blob("b").ok());
}

TEST_F(RunStoreTest, WhatDoesNotFitIsNotBegun) {
  FaultyFileSystem full;
  RunStore store = RunStore::Open(full, folder_ / "work").value();
  full.ReportFree(400);
  const Status status = Put(store, "b", std::string(1000, 'x'));
  EXPECT_EQ(status.code(), StatusCode::kSystem);
  EXPECT_THAT(status.message(),
              HasSubstr("1.0 kB are to be written, 400 bytes are free, 600 bytes are missing"));
  EXPECT_FALSE(store.Blob("b").ok());
  full.ReportFree(1000);
  EXPECT_TRUE(Put(store, "b", std::string(1000, 'x')).ok());
  EXPECT_EQ(Get(store, "b"), std::string(1000, 'x'));
}

}  // namespace
}  // namespace prismaquant

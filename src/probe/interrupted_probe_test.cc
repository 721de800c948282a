#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "io/faulty_file_system.h"
#include "io/temporary_folder.h"
#include "probe/probe.h"
#include "probe/tiny_checkpoint.h"
#include "round/output_hessian.h"

namespace prismaquant {
namespace {

using ::testing::HasSubstr;

// Copies the store before every operation: what a kill at that moment leaves.
class SnapshotFileSystem : public FileSystem {
 public:
  SnapshotFileSystem(std::filesystem::path store, std::filesystem::path snapshots)
      : store_(std::move(store)), snapshots_(std::move(snapshots)) {}
  int count() const { return count_; }
  std::filesystem::path snapshot(int n) const { return snapshots_ / std::to_string(n); }

  Result<std::unique_ptr<WritableFile>> Create(const std::filesystem::path& path) override {
    Snap();
    return base_.Create(path);
  }
  Status CreateDirectories(const std::filesystem::path& path) override {
    Snap();
    return base_.CreateDirectories(path);
  }
  Status Rename(const std::filesystem::path& from, const std::filesystem::path& to) override {
    Snap();
    return base_.Rename(from, to);
  }
  Status RemoveAll(const std::filesystem::path& path) override {
    Snap();
    return base_.RemoveAll(path);
  }
  Status SyncDirectory(const std::filesystem::path& path) override {
    Snap();
    return base_.SyncDirectory(path);
  }
  int64_t FreeBytes(const std::filesystem::path& path) override { return base_.FreeBytes(path); }

 private:
  void Snap() {
    if (!std::filesystem::exists(store_)) return;
    std::filesystem::copy(store_, snapshot(count_++), std::filesystem::copy_options::recursive);
  }

  FileSystem& base_ = FileSystem::Default();
  std::filesystem::path store_, snapshots_;
  int count_ = 0;
};

// Everything that a finished probe leaves, with numbers as bits.
struct Outcome {
  std::vector<std::string> stats;
  std::map<std::string, std::vector<uint64_t>> costs;
  std::map<std::string, std::string> token_weights, output_factors;
  std::set<std::string> files;
  bool operator==(const Outcome&) const = default;
};

uint64_t Bits(double value) { return std::bit_cast<uint64_t>(value); }

class InterruptedProbeTest : public ::testing::Test {
 protected:
  void SetUp() override { std::filesystem::create_directories(folder_ / "snapshots"); }

  Status Run(const std::filesystem::path& folder, FileSystem& fs = FileSystem::Default(),
             const std::vector<const Format*>& formats = {}) const {
    PQ_ASSIGN_OR_RETURN(RunStore store, RunStore::Open(fs, folder));
    return RunProbe(tiny_.model(), tiny_.calibration(), {.seed = 3, .formats = formats}, store);
  }

  Outcome Read(const std::filesystem::path& folder) const {
    Outcome outcome;
    RunStore store = RunStore::OpenExisting(FileSystem::Default(), folder).value();
    const std::vector<LinearStats> stats = store.Stats().value();
    for (const LinearStats& s : stats) {
      outcome.stats.push_back(fmt::format("{} {} {} {} {} {} {}", s.name, s.layer,
                                          Bits(s.weight_amax), Bits(s.input_amax),
                                          Bits(s.fisher_trace), Bits(s.grad_square), s.tokens));
    }
    const auto costs = store.Costs().value();
    for (const auto& [linear, formats] : costs) {
      for (const auto& [format, cost] : formats) {
        std::vector<uint64_t>& bits = outcome.costs[fmt::format("{} {}", linear, format)];
        bits.push_back(Bits(cost.weight_mse));
        for (const double s : cost.directional) bits.push_back(Bits(s));
      }
    }
    for (int layer = 0; layer < TinyCheckpoint::kLayers; ++layer) {
      const auto read = [&](const std::string& blob, std::map<std::string, std::string>& all) {
        const SafetensorsFile file = store.Blob(blob).value();
        for (const TensorView& view : file.tensors()) {
          all[view.name] = {reinterpret_cast<const char*>(view.bytes.data()), view.bytes.size()};
        }
      };
      read(TokenWeightBlob(layer), outcome.token_weights);
      read(OutputFactorBlob(layer), outcome.output_factors);
    }
    for (const auto& entry : std::filesystem::recursive_directory_iterator(folder))
      outcome.files.insert(entry.path().lexically_relative(folder).string());
    return outcome;
  }

  TinyCheckpoint tiny_;
  TemporaryFolder folder_;
};

TEST_F(InterruptedProbeTest, OnlyWhatIsNeededLaterRemains) {
  ASSERT_TRUE(Run(folder_ / "whole").ok());
  const Outcome outcome = Read(folder_ / "whole");
  EXPECT_EQ(outcome.files,
            (std::set<std::string>{"lock", "output_factor", "output_factor/0.safetensors",
                                   "output_factor/1.safetensors", "run.sqlite", "token_weight",
                                   "token_weight/0.safetensors", "token_weight/1.safetensors"}));
  EXPECT_EQ(outcome.stats.size(), tiny_.model().linears().size());
  EXPECT_EQ(outcome.token_weights.size(), tiny_.model().linears().size());
  for (const auto& [name, bytes] : outcome.token_weights)
    EXPECT_EQ(bytes.size(), TinyCheckpoint::kSequences * TinyCheckpoint::kTokens * sizeof(float));
  for (const LinearInfo& linear : tiny_.model().linears()) {
    const auto rank = static_cast<size_t>(std::min(linear.out, OutputSketch::kRank));
    EXPECT_EQ(outcome.output_factors.at(linear.name).size(),
              2 * rank * static_cast<size_t>(linear.out));
  }
  ASSERT_TRUE(Run(folder_ / "whole").ok());
  EXPECT_TRUE(Read(folder_ / "whole") == outcome) << "a second run changed something";
}

TEST_F(InterruptedProbeTest, AKillAtAnyMomentChangesNothing) {
  SnapshotFileSystem snapshots(folder_ / "whole", folder_ / "snapshots");
  ASSERT_TRUE(Run(folder_ / "whole", snapshots).ok());
  const Outcome whole = Read(folder_ / "whole");
  ASSERT_GT(snapshots.count(), 20);
  for (int n = 0; n < snapshots.count(); ++n) {
    const Status status = Run(snapshots.snapshot(n));
    ASSERT_TRUE(status.ok()) << "killed before operation " << n << ": " << status.message();
    EXPECT_TRUE(Read(snapshots.snapshot(n)) == whole) << "killed before operation " << n;
  }
}

TEST_F(InterruptedProbeTest, AKillInAFurtherPassChangesNothing) {
  ASSERT_TRUE(Run(folder_ / "whole").ok());
  const Outcome whole = Read(folder_ / "whole");
  const std::filesystem::path store = folder_ / "store";
  ASSERT_TRUE(Run(store, FileSystem::Default(), {FindFormat("nvfp4"), FindFormat("bf16")}).ok());
  SnapshotFileSystem snapshots(store, folder_ / "snapshots");
  ASSERT_TRUE(Run(store, snapshots).ok());
  EXPECT_TRUE(Read(store) == whole);
  ASSERT_GT(snapshots.count(), 20);
  for (int n = 0; n < snapshots.count(); ++n) {
    const Status status = Run(snapshots.snapshot(n));
    ASSERT_TRUE(status.ok()) << "killed before operation " << n << ": " << status.message();
    EXPECT_TRUE(Read(snapshots.snapshot(n)) == whole) << "killed before operation " << n;
  }
}

TEST_F(InterruptedProbeTest, AFailedOperationIsReportedAndRepaired) {
  FaultyFileSystem counting;
  ASSERT_TRUE(Run(folder_ / "whole", counting).ok());
  const Outcome whole = Read(folder_ / "whole");
  for (int64_t n = 1; n < counting.operations(); n += 5) {
    FaultyFileSystem faulty;
    faulty.FailAt(n);
    const std::filesystem::path folder = folder_ / std::to_string(n);
    const Status status = Run(folder, faulty);
    EXPECT_EQ(status.code(), StatusCode::kSystem) << "operation " << n;
    EXPECT_THAT(status.message(), HasSubstr("Input/output error"));
    ASSERT_TRUE(Run(folder).ok()) << "operation " << n;
    EXPECT_TRUE(Read(folder) == whole) << "operation " << n;
  }
}

}  // namespace
}  // namespace prismaquant

#ifndef PRISMAQUANT_STORE_RUN_STORE_H_
#define PRISMAQUANT_STORE_RUN_STORE_H_

// RunStore: the folder of one run (docs/run-store.md). An SQLite database says what is finished and
// holds the statistics; tensors lie beside it as safetensors blobs. A unit of work (stage, layer)
// first writes its blobs, each under a temporary name that is renamed when it is complete, and then
// commits its rows and its completion mark in one transaction. So after a kill at any moment a
// stage is either done with all its data or not done, and repeating it gives the same bytes.
//
// A store belongs to one identity (source, calibration, seed, ...); another one is refused. The
// folder is locked while the object lives. One thread.

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "base/status.h"
#include "io/safetensors.h"
#include "store/database.h"

namespace prismaquant {

// What the probe learned of one Linear; sums run over all calibration tokens.
struct LinearStats {
  std::string name;
  int64_t layer = 0;
  double weight_amax = 0;   // largest |w|
  double input_amax = 0;    // largest |x|
  double fisher_trace = 0;  // sum_t |g_t|^2 |x_t|^2, not divided by tokens
  double grad_square = 0;   // sum_t |g_t|^2
  int64_t tokens = 0;       // that passed through the Linear
};

// How the weights were rounded whose errors are priced.
enum class Rounding {
  kNearest,
  kGptq,          // by the inputs of the other half of the sequences
  kGptqInSample,  // by the inputs of the same half: too good, for comparison
};

// What one format costs one Linear.
struct LinearCost {
  std::string linear;
  std::string format;
  Rounding rounding = Rounding::kNearest;
  double weight_mse = 0;            // mean of (W_f - W)^2
  std::vector<double> directional;  // s_nf, one per calibration sequence
  std::vector<double> squares;      // q_nf, what s_nf^2 is on average over rounding errors
};

struct BlobTensor {
  TensorSpec spec;
  std::span<const std::byte> bytes;
};

class RunStore {
 public:
  // Opens or creates the folder. A folder in use by another process, or one that holds other files,
  // is kInvalidInput.
  static Result<RunStore> Open(FileSystem& fs, const std::filesystem::path& folder);
  // Opens an existing store; kInvalidInput if there is none.
  static Result<RunStore> OpenExisting(FileSystem& fs, const std::filesystem::path& folder);

  // Records the identity of the run, or refuses a store made by another one, naming the keys that
  // differ.
  Status Bind(const std::map<std::string, std::string>& identity);
  Result<std::map<std::string, std::string>> Identity();

  Result<bool> IsDone(const std::string& stage, int64_t layer);
  // Marks (stage, layer) done together with its rows. A NaN among the numbers of a row, except in
  // those per sequence, is kSystem, and nothing is committed.
  Status Commit(const std::string& stage, int64_t layer, const std::vector<LinearStats>& stats = {},
                const std::vector<LinearCost>& costs = {});
  // Forgets all marks of a stage.
  Status Forget(const std::string& stage);
  // Stage -> how many of its layers are done.
  Result<std::map<std::string, int64_t>> Stages();

  Result<std::vector<LinearStats>> Stats();
  // Linear name -> format name -> cost, of weights rounded in this way.
  Result<std::map<std::string, std::map<std::string, LinearCost>>> Costs(
      Rounding rounding = Rounding::kNearest);

  // Formats that some Linear has such a cost for.
  Result<std::set<std::string>> PricedFormats(Rounding rounding);

  // Small texts by key (JSON of the last allocation, measured results).
  Status PutNote(const std::string& key, const std::string& text);
  Result<std::optional<std::string>> Note(const std::string& key);

  // Blobs, named by relative path without extension, as "hidden/3".
  Status PutBlob(const std::string& name, const std::vector<BlobTensor>& tensors);
  bool HasBlob(const std::string& name) const;
  Result<SafetensorsFile> Blob(const std::string& name) const;
  Status RemoveBlob(const std::string& name);
  Status RemoveBlobs(const std::string& folder);

  const std::filesystem::path& folder() const { return folder_; }

 private:
  class Lock;
  RunStore(FileSystem& fs, std::filesystem::path folder, std::shared_ptr<Lock> lock,
           Database database);
  std::filesystem::path BlobPath(const std::string& name) const;

  FileSystem* fs_;
  std::filesystem::path folder_;
  std::shared_ptr<Lock> lock_;
  Database database_;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_STORE_RUN_STORE_H_

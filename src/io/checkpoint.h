#ifndef PRISMAQUANT_IO_CHECKPOINT_H_
#define PRISMAQUANT_IO_CHECKPOINT_H_

// Checkpoint: a Hugging Face model folder, opened read-only: config.json and every tensor of its
// single file or of the shards that its index lists. Opening checks headers and index (each listed
// file exists and lies in the folder, each listed tensor is in its file, none is in two) but reads
// no weights. Immutable and thread-safe.
//
// CheckpointWriter: writes such a folder shard by shard into a temporary sibling folder that is
// synced and renamed at the end, so that a reader never sees half a checkpoint. The bytes written
// depend on the plan alone.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/json.h"
#include "base/status.h"
#include "io/safetensors.h"

namespace prismaquant {

class Checkpoint {
 public:
  // Fails with kInvalidInput if the folder, its config.json or its weights are missing or
  // malformed.
  static Result<Checkpoint> Open(const std::filesystem::path& folder);

  const std::filesystem::path& folder() const { return folder_; }
  const Json& config() const { return config_; }
  // All tensor names in file order.
  const std::vector<std::string>& names() const { return names_; }
  // Null if absent.
  const TensorView* Find(const std::string& name) const;
  // Fails naming folder and tensor.
  Result<TensorView> Get(const std::string& name) const;
  // Read-ahead for the named tensors; unknown names are ignored.
  void WillNeed(const std::vector<std::string>& names) const;
  void DontNeed(const std::vector<std::string>& names) const;
  // Of `bytes` bytes of a tensor, from its byte `begin` on.
  void DontNeed(const TensorView& tensor, size_t begin, size_t bytes) const;
  // Hands out the bytes of a tensor in pieces, in order, and gives back the memory of each piece
  // when `visit` is done with it. Stops at the first failure.
  using Visit = std::function<Status(std::span<const std::byte>)>;
  Status ForEachPiece(const TensorView& tensor, const Visit& visit) const;
  // Bytes of all its *.safetensors files, headers included.
  int64_t file_bytes() const { return file_bytes_; }
  // Number of elements of all tensors.
  int64_t parameters() const { return parameters_; }
  // Hex SHA-256 over config.json, tokenizer.json (if any) and, of every weights file, the size, the
  // header and the first, middle and last 64 KiB of data: two checkpoints with the same fingerprint
  // are the same for all that the run store cares about.
  Result<std::string> Fingerprint() const;
  // Hex SHA-256 over every byte of the weights files, which takes as long as reading them.
  Result<std::string> ContentHash() const;

 private:
  Checkpoint() = default;
  // Opens a file of the folder; `index` (empty: none) places its tensors.
  Status AddFile(const std::string& name, const std::map<std::string, std::string>& index);

  std::filesystem::path folder_;
  Json config_;
  std::vector<std::shared_ptr<const SafetensorsFile>> files_;
  std::vector<std::string> names_;
  std::map<std::string, const TensorView*> index_;
  std::map<std::string, const SafetensorsFile*> file_of_;
  int64_t file_bytes_ = 0;
  int64_t parameters_ = 0;
};

// Refuses a checkpoint that is already quantized, naming its scheme.
Status RequireUnquantized(const Checkpoint& checkpoint);

// The kInvalidInput for an `out` that exists and was not to be replaced.
Status ExistsAlready(const std::filesystem::path& out);

// kInvalidInput unless a checkpoint can be written to `out`: it names a folder in which none of the
// folders `kept` lies, and what is there now, if anything, is an empty folder or a checkpoint.
Status CheckDestination(const std::filesystem::path& out,
                        const std::vector<std::filesystem::path>& kept);

class CheckpointWriter {
 public:
  struct Options {
    int64_t shard_bytes = 5'000'000'000;  // a shard ends before the tensor that would pass this
    bool overwrite = false;               // replace an existing `out`
    // Called with the finished temporary folder before it is renamed; a failure abandons it.
    std::function<Status(const std::filesystem::path&)> check = {};
  };
  // Hands the bytes of one tensor to the writer, in one or several pieces.
  using Sink = std::function<Status(std::span<const std::byte>)>;
  using Source = std::function<Status(const Sink&)>;
  struct Tensor {
    TensorSpec spec;
    Source write;  // called once, in plan order
  };

  // Writes tensors (in the given order, cut into shards), an index if there is more than one shard,
  // and `files` (name -> contents); finishes by renaming the temporary folder `.<name>.partial` to
  // `out`. On any failure the temporary folder is removed and `out` is as it was; only missing
  // parents of `out` that were made stay. With overwrite the old folder waits as `.<name>.old`
  // until the new one is in place; a later Write finishes what a killed one left. kInvalidInput:
  // `out` exists without overwrite, or CheckDestination refuses it.
  static Status Write(FileSystem& fs, const std::filesystem::path& out, const Options& options,
                      const std::vector<Tensor>& tensors,
                      const std::map<std::string, std::string>& files);
  // Removes what a Write that was killed when `out` was in place left beside it.
  static Status RemoveLeftovers(FileSystem& fs, const std::filesystem::path& out);
  // The bytes of all *.safetensors that Write would make, headers included.
  static int64_t FileBytes(const std::vector<TensorSpec>& specs, const Options& options);
};

// The files that are copied unchanged from a source checkpoint (tokenizer, processor, chat
// template, generation settings, model code, licence): name -> contents. Neither config.json nor
// README.md, nor hidden files, folders and files above 64 MiB.
Result<std::map<std::string, std::string>> PassthroughFiles(const std::filesystem::path& folder);

}  // namespace prismaquant

#endif  // PRISMAQUANT_IO_CHECKPOINT_H_

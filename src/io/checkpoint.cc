#include "io/checkpoint.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>
#include <utility>

#include "base/sha256.h"

namespace prismaquant {
namespace {

namespace stdfs = std::filesystem;

constexpr char kSingleFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";
constexpr size_t kSampleBytes = 64 * 1024;

// The shard that the index gives each tensor, checked to be plain file names.
Result<std::map<std::string, std::string>> ReadIndex(const stdfs::path& path) {
  PQ_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  PQ_ASSIGN_OR_RETURN(const Json index, ParseJson(text, path.string()));
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) {
    return Status::InvalidInput(fmt::format("{}: no weight_map object", path.string()));
  }
  std::map<std::string, std::string> shards;
  for (const auto& [tensor, file] : index["weight_map"].items()) {
    if (!file.is_string()) {
      return Status::InvalidInput(
          fmt::format("{}: the file of tensor {} is not a string", path.string(), tensor));
    }
    const auto name = file.get<std::string>();
    if (name.empty() || name == "." || name == ".." || stdfs::path(name).filename() != name) {
      return Status::InvalidInput(
          fmt::format("{}: tensor {} is said to be in \"{}\", expected a file of this folder",
                      path.string(), tensor, name));
    }
    shards[tensor] = name;
  }
  return shards;
}

std::string ShardName(size_t shard, size_t count) {
  return count == 1 ? kSingleFile
                    : fmt::format("model-{:05}-of-{:05}.safetensors", shard + 1, count);
}

// [first, last) tensor of each shard.
std::vector<std::pair<size_t, size_t>> CutShards(const std::vector<TensorSpec>& specs,
                                                 int64_t shard_bytes) {
  std::vector<std::pair<size_t, size_t>> shards;
  size_t first = 0;
  int64_t bytes = 0;
  for (size_t i = 0; i < specs.size(); ++i) {
    const int64_t size = specs[i].bytes();
    if (i > first && bytes + size > shard_bytes) {
      shards.emplace_back(first, i);
      first = i;
      bytes = 0;
    }
    bytes += size;
  }
  shards.emplace_back(first, specs.size());
  return shards;
}

const std::map<std::string, std::string>& ShardMetadata() {
  static const std::map<std::string, std::string> metadata = {{"format", "pt"}};
  return metadata;
}

std::vector<TensorSpec> Specs(const std::vector<CheckpointWriter::Tensor>& tensors) {
  std::vector<TensorSpec> specs;
  for (const CheckpointWriter::Tensor& tensor : tensors) specs.push_back(tensor.spec);
  return specs;
}

Status WriteTensor(SafetensorsWriter& writer, const CheckpointWriter::Tensor& tensor) {
  int64_t written = 0;
  const int64_t expected = tensor.spec.bytes();
  PQ_RETURN_IF_ERROR(tensor.write([&](std::span<const std::byte> bytes) -> Status {
    written += static_cast<int64_t>(bytes.size());
    return written > expected ? Status() : writer.Append(bytes);
  }));
  if (written != expected) {
    return Status::System(fmt::format("tensor {}: {} bytes were supplied, expected {}",
                                      tensor.spec.name, written, expected));
  }
  return {};
}

Status WriteFile(FileSystem& fs, const stdfs::path& path, std::string_view contents) {
  PQ_ASSIGN_OR_RETURN(const std::unique_ptr<WritableFile> file, fs.Create(path));
  PQ_RETURN_IF_ERROR(file->Append(std::as_bytes(std::span(contents))));
  return file->Close();
}

Status WriteFolder(FileSystem& fs, const stdfs::path& folder, int64_t shard_bytes,
                   const std::vector<CheckpointWriter::Tensor>& tensors,
                   const std::map<std::string, std::string>& files) {
  PQ_RETURN_IF_ERROR(fs.CreateDirectories(folder));
  const std::vector<TensorSpec> all = Specs(tensors);
  const auto shards = CutShards(all, shard_bytes);
  Json weight_map = Json::object();
  int64_t total = 0;
  for (size_t s = 0; s < shards.size(); ++s) {
    const std::string name = ShardName(s, shards.size());
    std::vector<TensorSpec> specs(all.begin() + static_cast<std::ptrdiff_t>(shards[s].first),
                                  all.begin() + static_cast<std::ptrdiff_t>(shards[s].second));
    for (const TensorSpec& spec : specs) {
      weight_map[spec.name] = name;
      total += spec.bytes();
    }
    PQ_ASSIGN_OR_RETURN(
        SafetensorsWriter writer,
        SafetensorsWriter::Create(fs, folder / name, std::move(specs), ShardMetadata()));
    for (size_t i = shards[s].first; i < shards[s].second; ++i) {
      PQ_RETURN_IF_ERROR(WriteTensor(writer, tensors[i]));
    }
    PQ_RETURN_IF_ERROR(writer.Close());
  }
  if (shards.size() > 1) {
    const Json index = {{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}};
    PQ_RETURN_IF_ERROR(WriteFile(fs, folder / kIndexFile, index.dump(2) + "\n"));
  }
  for (const auto& [name, contents] : files)
    PQ_RETURN_IF_ERROR(WriteFile(fs, folder / name, contents));
  return fs.SyncDirectory(folder);
}

// Puts the finished folder at `out`; an old `out` is set aside first and restored if the rename
// fails.
Status Install(FileSystem& fs, const stdfs::path& partial, const stdfs::path& out) {
  std::error_code error;
  const stdfs::path parent = out.parent_path().empty() ? "." : out.parent_path();
  if (!stdfs::exists(out, error)) {
    PQ_RETURN_IF_ERROR(fs.Rename(partial, out));
    return fs.SyncDirectory(parent);
  }
  const stdfs::path old = parent / ("." + out.filename().string() + ".old");
  PQ_RETURN_IF_ERROR(fs.RemoveAll(old));
  PQ_RETURN_IF_ERROR(fs.Rename(out, old));
  if (Status status = fs.Rename(partial, out); !status.ok()) {
    std::error_code restore;
    stdfs::rename(old, out, restore);
    return status;
  }
  PQ_RETURN_IF_ERROR(fs.SyncDirectory(parent));
  return fs.RemoveAll(old);
}

Status CheckDestination(const stdfs::path& out, bool overwrite) {
  std::error_code error;
  if (!stdfs::exists(out, error)) return {};
  if (!overwrite) {
    return Status::InvalidInput(
        fmt::format("{}: exists already; --overwrite replaces it", out.string()));
  }
  if (stdfs::is_directory(out, error) &&
      (stdfs::is_empty(out, error) || stdfs::exists(out / "config.json", error))) {
    return {};
  }
  return Status::InvalidInput(fmt::format(
      "{}: is no checkpoint folder (no config.json), so --overwrite does not replace it",
      out.string()));
}

bool IsPassthroughName(const std::string& name) {
  static const std::set<std::string> kNames = {"tokenizer.json",
                                               "tokenizer_config.json",
                                               "tokenizer.model",
                                               "vocab.json",
                                               "merges.txt",
                                               "special_tokens_map.json",
                                               "added_tokens.json",
                                               "generation_config.json",
                                               "preprocessor_config.json",
                                               "video_preprocessor_config.json",
                                               "processor_config.json",
                                               "configuration.json",
                                               "chat_template.json"};
  return kNames.count(name) > 0 || name.ends_with(".jinja") || name.ends_with(".py") ||
         name.starts_with("LICENSE") || name.starts_with("NOTICE");
}

}  // namespace

Result<Checkpoint> Checkpoint::Open(const stdfs::path& folder) {
  std::error_code error;
  if (!stdfs::is_directory(folder, error)) {
    return Status::InvalidInput(fmt::format("{}: no such folder", folder.string()));
  }
  Checkpoint checkpoint;
  checkpoint.folder_ = folder;
  PQ_ASSIGN_OR_RETURN(const std::string config, ReadFile(folder / "config.json"));
  PQ_ASSIGN_OR_RETURN(checkpoint.config_, ParseJson(config, (folder / "config.json").string()));

  std::map<std::string, std::string> index;
  std::set<std::string> shard_names;
  if (stdfs::exists(folder / kIndexFile, error)) {
    PQ_ASSIGN_OR_RETURN(index, ReadIndex(folder / kIndexFile));
    for (const auto& [tensor, file] : index) shard_names.insert(file);
  } else if (stdfs::exists(folder / kSingleFile, error)) {
    shard_names.insert(kSingleFile);
  } else {
    return Status::InvalidInput(fmt::format("{}: no weights (neither {} nor {})", folder.string(),
                                            kSingleFile, kIndexFile));
  }
  for (const std::string& name : shard_names) {
    if (!stdfs::exists(folder / name, error)) {
      return Status::InvalidInput(
          fmt::format("{}: lists {}, which does not exist", (folder / kIndexFile).string(), name));
    }
    PQ_ASSIGN_OR_RETURN(SafetensorsFile opened, SafetensorsFile::Open(folder / name));
    auto file = std::make_shared<const SafetensorsFile>(std::move(opened));
    checkpoint.file_bytes_ += static_cast<int64_t>(file->mapping().bytes().size());
    for (const TensorView& tensor : file->tensors()) {
      if (!index.empty() && (!index.count(tensor.name) || index[tensor.name] != name)) {
        const std::string said = index.count(tensor.name) ? "in " + index[tensor.name] : "nowhere";
        return Status::InvalidInput(fmt::format("{}: holds tensor {}, which the index places {}",
                                                (folder / name).string(), tensor.name, said));
      }
      checkpoint.index_[tensor.name] = &tensor;
      checkpoint.file_of_[tensor.name] = file.get();
      checkpoint.names_.push_back(tensor.name);
      checkpoint.parameters_ += tensor.elements();
    }
    checkpoint.files_.push_back(std::move(file));
  }
  for (const auto& [tensor, file] : index) {
    if (!checkpoint.index_.count(tensor)) {
      return Status::InvalidInput(fmt::format("{}: tensor {} is missing, though the index lists it",
                                              (folder / file).string(), tensor));
    }
  }
  return checkpoint;
}

const TensorView* Checkpoint::Find(const std::string& name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : found->second;
}

Result<TensorView> Checkpoint::Get(const std::string& name) const {
  if (const TensorView* view = Find(name)) return *view;
  return Status::InvalidInput(fmt::format("{}: tensor {} is missing", folder_.string(), name));
}

void Checkpoint::WillNeed(const std::vector<std::string>& names) const {
  for (const std::string& name : names) {
    if (const TensorView* view = Find(name)) file_of_.at(name)->mapping().WillNeed(view->bytes);
  }
}

void Checkpoint::DontNeed(const std::vector<std::string>& names) const {
  for (const std::string& name : names) {
    if (const TensorView* view = Find(name)) file_of_.at(name)->mapping().DontNeed(view->bytes);
  }
}

Result<std::string> Checkpoint::Fingerprint() const {
  Sha256 hash;
  hash.Update(config_.dump());
  std::error_code error;
  if (stdfs::exists(folder_ / "tokenizer.json", error)) {
    PQ_ASSIGN_OR_RETURN(const std::string tokenizer, ReadFile(folder_ / "tokenizer.json"));
    hash.Update(tokenizer);
  }
  for (const auto& file : files_) {
    const std::span<const std::byte> bytes = file->mapping().bytes();
    int64_t data_bytes = 0;
    for (const TensorView& tensor : file->tensors())
      data_bytes += static_cast<int64_t>(tensor.bytes.size());
    hash.Update(fmt::format("{} ", bytes.size()));
    hash.Update(bytes.first(bytes.size() - static_cast<size_t>(data_bytes)));
    const size_t sample = std::min(kSampleBytes, bytes.size());
    for (const size_t begin : {size_t{0}, (bytes.size() - sample) / 2, bytes.size() - sample}) {
      hash.Update(bytes.subspan(begin, sample));
    }
  }
  return hash.Hex();
}

Status RequireUnquantized(const Checkpoint& checkpoint) {
  const Json& config = checkpoint.config();
  const Json* found = nullptr;
  for (const char* key : {"quantization_config", "compression_config"}) {
    if (config.contains(key)) found = &config[key];
    if (config.contains("text_config") && config["text_config"].contains(key))
      found = &config["text_config"][key];
  }
  if (found == nullptr || found->is_null()) return {};
  const auto text = [&](const char* key) {
    return found->is_object() && found->contains(key) && (*found)[key].is_string()
               ? (*found)[key].get<std::string>()
               : std::string("unknown");
  };
  return Status::InvalidInput(fmt::format(
      "{}: is already quantized ({}, format {}); start from the unquantized checkpoint",
      (checkpoint.folder() / "config.json").string(), text("quant_method"), text("format")));
}

Status CheckpointWriter::Write(FileSystem& fs, const stdfs::path& out, const Options& options,
                               const std::vector<Tensor>& tensors,
                               const std::map<std::string, std::string>& files) {
  PQ_RETURN_IF_ERROR(CheckDestination(out, options.overwrite));
  const stdfs::path parent = out.parent_path().empty() ? "." : out.parent_path();
  const stdfs::path partial = parent / ("." + out.filename().string() + ".partial");
  PQ_RETURN_IF_ERROR(fs.RemoveAll(partial));
  Status status = WriteFolder(fs, partial, options.shard_bytes, tensors, files);
  if (status.ok() && options.check) status = options.check(partial);
  if (status.ok()) status = Install(fs, partial, out);
  if (!status.ok()) {
    std::error_code ignored;
    stdfs::remove_all(partial, ignored);
  }
  return status;
}

int64_t CheckpointWriter::FileBytes(const std::vector<TensorSpec>& specs, const Options& options) {
  int64_t bytes = 0;
  for (const auto& [first, last] : CutShards(specs, options.shard_bytes)) {
    const std::vector<TensorSpec> shard(specs.begin() + static_cast<std::ptrdiff_t>(first),
                                        specs.begin() + static_cast<std::ptrdiff_t>(last));
    bytes += static_cast<int64_t>(SafetensorsHeader(shard, ShardMetadata()).size());
    for (const TensorSpec& spec : shard) bytes += spec.bytes();
  }
  return bytes;
}

Result<std::map<std::string, std::string>> PassthroughFiles(const stdfs::path& folder) {
  std::map<std::string, std::string> files;
  std::error_code error;
  for (const auto& entry : stdfs::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename().string();
    if (!entry.is_regular_file(error) || !IsPassthroughName(name)) continue;
    PQ_ASSIGN_OR_RETURN(files[name], ReadFile(entry.path()));
  }
  if (error)
    return Status::System(fmt::format("{}: listing: {}", folder.string(), error.message()));
  return files;
}

}  // namespace prismaquant

#include "io/checkpoint.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>
#include <utility>

#include "base/interrupt.h"
#include "base/sha256.h"

namespace prismaquant {
namespace {

namespace stdfs = std::filesystem;

constexpr char kSingleFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";
constexpr size_t kSampleBytes = 64 * 1024;
// Of what is read through once.
constexpr size_t kPieceBytes = size_t{64} << 20;
constexpr uintmax_t kLargestPassthrough = 64 * 1024 * 1024;

// Tensor -> name of the file that holds it.
using Placement = std::map<std::string, std::string>;

// The shard that the index gives each tensor, checked to be plain file names.
Result<Placement> ReadIndex(const stdfs::path& path) {
  PQ_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  PQ_ASSIGN_OR_RETURN(const Json index, ParseJson(text, path.string()));
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) {
    return Status::InvalidInput(fmt::format("{}: no weight_map object", path.string()));
  }
  if (index["weight_map"].empty()) {
    return Status::InvalidInput(fmt::format("{}: weight_map lists no tensor", path.string()));
  }
  Placement shards;
  for (const auto& [tensor, file] : index["weight_map"].items()) {
    if (!file.is_string()) {
      return Status::InvalidInput(
          fmt::format("{}: the file of tensor {} is not a string", path.string(), tensor));
    }
    const auto name = file.get<std::string>();
    if (name.empty() || name == "." || name == ".." || stdfs::path(name).filename() != name ||
        name.find('\0') != std::string::npos) {
      return Status::InvalidInput(
          fmt::format("{}: tensor {} is said to be in \"{}\", expected a file of this folder",
                      path.string(), tensor, name));
    }
    shards[tensor] = name;
  }
  return shards;
}

// Where the weights of a folder are: the index, or nothing if all are in the single file.
Result<Placement> PlaceTensors(const stdfs::path& folder) {
  std::error_code error;
  const bool single = stdfs::exists(folder / kSingleFile, error);
  if (!stdfs::exists(folder / kIndexFile, error)) {
    if (single) return Placement();
    return Status::InvalidInput(fmt::format("{}: no weights (neither {} nor {})", folder.string(),
                                            kSingleFile, kIndexFile));
  }
  PQ_ASSIGN_OR_RETURN(Placement index, ReadIndex(folder / kIndexFile));
  const bool listed = std::any_of(index.begin(), index.end(),
                                  [](const auto& place) { return place.second == kSingleFile; });
  if (single && !listed) {
    return Status::InvalidInput(
        fmt::format("{}: holds {} and {}, which does not list it; remove one", folder.string(),
                    kSingleFile, kIndexFile));
  }
  return index;
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
  PQ_RETURN_IF_ERROR(CheckInterrupted());
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
    const std::vector<TensorSpec> specs(
        all.begin() + static_cast<std::ptrdiff_t>(shards[s].first),
        all.begin() + static_cast<std::ptrdiff_t>(shards[s].second));
    for (const TensorSpec& spec : specs) {
      if (!weight_map.emplace(spec.name, name).second) {
        return Status::InvalidInput(
            fmt::format("{}: tensor {} is planned twice", (folder / name).string(), spec.name));
      }
      total += spec.bytes();
    }
    PQ_ASSIGN_OR_RETURN(SafetensorsWriter writer,
                        SafetensorsWriter::Create(fs, folder / name, specs, ShardMetadata()));
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

// The folder that holds `out`, and the temporary names beside it.
struct Siblings {
  explicit Siblings(const stdfs::path& out)
      : parent(out.parent_path().empty() ? "." : out.parent_path()),
        partial(parent / ("." + out.filename().string() + ".partial")),
        old(parent / ("." + out.filename().string() + ".old")) {}
  stdfs::path parent, partial, old;
};

bool Exists(const stdfs::path& path) {
  std::error_code error;
  return stdfs::exists(stdfs::symlink_status(path, error));
}

// Puts the finished folder at `out`. An old `out` is set aside first; a failure moves both back.
Status Install(FileSystem& fs, const Siblings& siblings, const stdfs::path& out) {
  const bool replaces = Exists(out);
  if (replaces) {
    PQ_RETURN_IF_ERROR(fs.RemoveAll(siblings.old));
    PQ_RETURN_IF_ERROR(fs.Rename(out, siblings.old));
  }
  Status status = fs.Rename(siblings.partial, out);
  const bool moved = status.ok();
  if (moved) status = fs.SyncDirectory(siblings.parent);
  if (status.ok()) return replaces ? fs.RemoveAll(siblings.old) : Status();
  Status undone = moved ? fs.Rename(out, siblings.partial) : Status();
  if (undone.ok() && replaces) undone = fs.Rename(siblings.old, out);
  if (undone.ok()) return status;
  return Status::System(fmt::format("{}; then {}", status.message(), undone.message()));
}

// A run that was killed between Install's two renames left no `out`: its old folder goes back.
Status Recover(FileSystem& fs, const Siblings& siblings, const stdfs::path& out) {
  if (Exists(out) || !Exists(siblings.old)) return {};
  PQ_RETURN_IF_ERROR(fs.Rename(siblings.old, out));
  return fs.SyncDirectory(siblings.parent);
}

// Absolute, links followed as far as there is something.
stdfs::path Canonical(const stdfs::path& path) {
  std::error_code error;
  return stdfs::weakly_canonical(stdfs::absolute(WithoutSeparator(path), error), error);
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
  if (name.starts_with(".")) return false;
  return kNames.count(name) > 0 || name.ends_with(".jinja") || name.ends_with(".py") ||
         name.starts_with("LICENSE") || name.starts_with("NOTICE");
}

Status VisitPieces(const MappedFile& mapping, std::span<const std::byte> bytes,
                   const Checkpoint::Visit& visit) {
  for (size_t begin = 0; begin < bytes.size(); begin += kPieceBytes) {
    const auto piece = bytes.subspan(begin, std::min(kPieceBytes, bytes.size() - begin));
    PQ_RETURN_IF_ERROR(visit(piece));
    mapping.DontNeed(piece);
  }
  return {};
}

}  // namespace

Result<Checkpoint> Checkpoint::Open(const stdfs::path& folder) {
  std::error_code error;
  if (!stdfs::is_directory(folder, error)) {
    return Status::InvalidInput(fmt::format("{}: no such folder", folder.string()));
  }
  Checkpoint checkpoint;
  checkpoint.folder_ = folder;
  const std::string config_path = (folder / "config.json").string();
  PQ_ASSIGN_OR_RETURN(const std::string config, ReadFile(config_path));
  PQ_ASSIGN_OR_RETURN(checkpoint.config_, ParseJson(config, config_path));
  if (!checkpoint.config_.is_object()) {
    return Status::InvalidInput(
        fmt::format("{}: is {}, expected an object", config_path, checkpoint.config_.type_name()));
  }
  Placement index;
  PQ_ASSIGN_OR_RETURN(index, PlaceTensors(folder));
  std::set<std::string> names;
  for (const auto& [tensor, file] : index) names.insert(file);
  if (index.empty()) names.insert(kSingleFile);
  for (const std::string& name : names) PQ_RETURN_IF_ERROR(checkpoint.AddFile(name, index));
  for (const auto& [tensor, file] : index) {
    if (!checkpoint.index_.count(tensor)) {
      return Status::InvalidInput(fmt::format("{}: tensor {} is missing, though the index lists it",
                                              (folder / file).string(), tensor));
    }
  }
  return checkpoint;
}

Status Checkpoint::AddFile(const std::string& name,
                           const std::map<std::string, std::string>& index) {
  const stdfs::path path = folder_ / name;
  std::error_code error;
  if (!stdfs::exists(path, error)) {
    return Status::InvalidInput(
        fmt::format("{}: lists {}, which does not exist", (folder_ / kIndexFile).string(), name));
  }
  PQ_ASSIGN_OR_RETURN(SafetensorsFile opened, SafetensorsFile::Open(path));
  const auto file = std::make_shared<const SafetensorsFile>(std::move(opened));
  for (const TensorView& tensor : file->tensors()) {
    const auto place = index.find(tensor.name);
    if (!index.empty() && (place == index.end() || place->second != name)) {
      const std::string said = place == index.end() ? "nowhere" : "in " + place->second;
      return Status::InvalidInput(fmt::format("{}: holds tensor {}, which the index places {}",
                                              path.string(), tensor.name, said));
    }
    index_[tensor.name] = &tensor;
    file_of_[tensor.name] = file.get();
    names_.push_back(tensor.name);
    parameters_ += tensor.elements();
  }
  file_bytes_ += static_cast<int64_t>(file->mapping().bytes().size());
  files_.push_back(file);
  return {};
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

void Checkpoint::DontNeed(const TensorView& tensor, size_t begin, size_t bytes) const {
  file_of_.at(tensor.name)->mapping().DontNeed(tensor.bytes.subspan(begin, bytes));
}

Status Checkpoint::ForEachPiece(const TensorView& tensor, const Visit& visit) const {
  return VisitPieces(file_of_.at(tensor.name)->mapping(), tensor.bytes, visit);
}

Result<std::string> Checkpoint::ContentHash() const {
  Sha256 hash;
  const Visit add = [&](std::span<const std::byte> piece) {
    hash.Update(piece);
    return CheckInterrupted();
  };
  for (const auto& file : files_) {
    PQ_RETURN_IF_ERROR(VisitPieces(file->mapping(), file->mapping().bytes(), add));
  }
  return hash.Hex();
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
    const std::span<const std::byte> data = bytes.last(static_cast<size_t>(data_bytes));
    const size_t sample = std::min(kSampleBytes, data.size());
    for (const size_t begin : {size_t{0}, (data.size() - sample) / 2, data.size() - sample}) {
      hash.Update(data.subspan(begin, sample));
    }
  }
  return hash.Hex();
}

Status RequireUnquantized(const Checkpoint& checkpoint) {
  const Json& config = checkpoint.config();
  const auto text_config = config.find("text_config");
  const Json* found = nullptr;
  for (const Json* owner : {&config, text_config == config.end() ? &config : &*text_config}) {
    for (const char* key : {"quantization_config", "compression_config"}) {
      if (owner->contains(key) && !(*owner)[key].is_null()) found = &(*owner)[key];
    }
  }
  if (found == nullptr) return {};
  const auto text = [&](const char* key) {
    return found->is_object() && found->contains(key) && (*found)[key].is_string()
               ? (*found)[key].get<std::string>()
               : std::string("unknown");
  };
  return Status::InvalidInput(fmt::format(
      "{}: is already quantized ({}, format {}); start from the unquantized checkpoint",
      (checkpoint.folder() / "config.json").string(), text("quant_method"), text("format")));
}

Status ExistsAlready(const stdfs::path& out) {
  return Status::InvalidInput(
      fmt::format("{}: exists already; --overwrite replaces it", out.string()));
}

Status CheckDestination(const stdfs::path& out, const std::vector<stdfs::path>& kept) {
  if (out.filename().empty() || out.filename() == "." || out.filename() == "..") {
    return Status::InvalidInput(
        fmt::format("{}: is no name for a folder to be written", out.string()));
  }
  const stdfs::path target = Canonical(out);
  for (const stdfs::path& folder : kept) {
    const stdfs::path needed = Canonical(folder);
    const auto apart =
        std::mismatch(target.begin(), target.end(), needed.begin(), needed.end()).first;
    if (apart != target.end()) continue;
    return Status::InvalidInput(fmt::format(
        "{}: holds {}, which is needed; expected another folder", out.string(), folder.string()));
  }
  std::error_code error;
  if (!Exists(out) ||
      (stdfs::is_directory(out, error) &&
       (stdfs::is_empty(out, error) || stdfs::exists(out / "config.json", error)))) {
    return {};
  }
  return Status::InvalidInput(fmt::format(
      "{}: is no checkpoint folder (no config.json), so --overwrite does not replace it",
      out.string()));
}

Status CheckpointWriter::Write(FileSystem& fs, const stdfs::path& out, const Options& options,
                               const std::vector<Tensor>& tensors,
                               const std::map<std::string, std::string>& files) {
  const stdfs::path target = WithoutSeparator(out);
  const Siblings siblings(target);
  PQ_RETURN_IF_ERROR(Recover(fs, siblings, target));
  PQ_RETURN_IF_ERROR(CheckDestination(target, {}));
  if (Exists(target) && !options.overwrite) return ExistsAlready(target);
  PQ_RETURN_IF_ERROR(fs.RemoveAll(siblings.partial));
  std::vector<TensorSpec> specs;
  for (const Tensor& tensor : tensors) specs.push_back(tensor.spec);
  PQ_RETURN_IF_ERROR(RequireRoom(fs, siblings.parent, FileBytes(specs, options)));
  Status status = WriteFolder(fs, siblings.partial, options.shard_bytes, tensors, files);
  if (status.ok() && options.check) status = options.check(siblings.partial);
  if (status.ok()) status = Install(fs, siblings, target);
  if (status.ok()) return status;
  const Status cleanup = fs.RemoveAll(siblings.partial);
  if (cleanup.ok()) return status;
  return Status::System(fmt::format("{}; then {}", status.message(), cleanup.message()));
}

Status CheckpointWriter::RemoveLeftovers(FileSystem& fs, const stdfs::path& out) {
  const Siblings siblings(out);
  if (!Exists(out) || !Exists(siblings.old)) return {};
  return fs.RemoveAll(siblings.old);
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
  std::error_code listing;
  for (stdfs::directory_iterator entry(folder, listing), end; !listing && entry != end;
       entry.increment(listing)) {
    const std::string name = entry->path().filename().string();
    if (!IsPassthroughName(name)) continue;
    std::error_code unknown;
    if (!entry->is_regular_file(unknown)) continue;
    const uintmax_t size = entry->file_size(unknown);
    if (unknown || size > kLargestPassthrough) continue;
    PQ_ASSIGN_OR_RETURN(files[name], ReadFile(entry->path()));
  }
  if (listing) {
    return Status::System(fmt::format("{}: listing: {}", folder.string(), listing.message()));
  }
  return files;
}

}  // namespace prismaquant

#include "cli/stored_pass.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <utility>
#include <vector>

#include "base/sha256.h"
#include "base/version.h"
#include "formats/format.h"
#include "probe/blob_tensors.h"

namespace prismaquant {
namespace {

using Clock = std::chrono::steady_clock;

constexpr char kFolder[] = "evaluate";
constexpr auto kInterval = std::chrono::seconds(60);
// Tensors of the blob: how many layers are finished, and by sequence and layer what they left.
constexpr char kLayers[] = "layers";

std::string HiddenName(size_t sequence) { return fmt::format("hidden.{}", sequence); }
std::string RoutingName(size_t layer) { return fmt::format("routing.{}", layer); }

// The tensors of these names from the first on, as long as there are any.
template <typename Name>
std::vector<at::Tensor> Numbered(const SafetensorsFile& file, Name name) {
  std::vector<at::Tensor> tensors;
  while (const TensorView* view = file.Find(name(tensors.size()))) {
    tensors.push_back(TensorFromView(*view).clone());
  }
  return tensors;
}

}  // namespace

Status StoredPass::DropAll(RunStore& store) { return store.RemoveBlobs(kFolder); }

StoredPass::StoredPass(RunStore& store, const std::string& identity)
    : store_(store),
      blob_(fmt::format("{}/{}", kFolder, Sha256Hex(kVersion + identity).substr(0, 16))),
      kept_(Clock::now()) {}

Result<std::optional<PassState>> StoredPass::Load() {
  if (!store_.HasBlob(blob_)) return std::optional<PassState>();
  PassState state;
  PQ_ASSIGN_OR_RETURN(const SafetensorsFile file, store_.Blob(blob_));
  const TensorView* layers = file.Find(kLayers);
  if (layers == nullptr || layers->dtype != DType::kI64 || layers->elements() != 1) {
    return Status::InvalidInput(
        fmt::format("{}: {}: no number of layers, expected one I64; remove the blob",
                    store_.folder().string(), blob_));
  }
  state.layers = TensorFromView(*layers).item<int64_t>();
  state.outputs.hidden = Numbered(file, HiddenName);
  state.outputs.routing = Numbered(file, RoutingName);
  return std::optional(std::move(state));
}

Status StoredPass::Keep(const PassState& state, bool now) {
  if (!now && Clock::now() - kept_ < kInterval) return {};
  const std::vector<at::Tensor>& hidden = state.outputs.hidden;
  const std::vector<at::Tensor>& routing = state.outputs.routing;
  std::vector<std::pair<std::string, at::Tensor>> tensors = {
      {kLayers, at::full({1}, state.layers, at::kLong)}};
  for (size_t n = 0; n < hidden.size(); ++n) tensors.emplace_back(HiddenName(n), hidden[n]);
  for (size_t i = 0; i < routing.size(); ++i) tensors.emplace_back(RoutingName(i), routing[i]);
  PQ_RETURN_IF_ERROR(PutTensors(store_, blob_, tensors));
  kept_ = Clock::now();
  return {};
}

}  // namespace prismaquant

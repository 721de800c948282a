#include "probe/probe.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>

#include "base/progress.h"
#include "formats/tensor_bytes.h"
#include "formats/torch_guard.h"
#include "probe/linear_probe.h"
#include "probe/loss.h"
#include "probe/statistics.h"

namespace prismaquant {
namespace {

constexpr char kForward[] = "forward";
constexpr char kHead[] = "head";
constexpr char kBackward[] = "backward";

constexpr char kHiddenFolder[] = "hidden";
constexpr char kGradientFolder[] = "gradient";

std::string GradientBlob(int64_t layer) { return fmt::format("{}/{}", kGradientFolder, layer); }

Status PutTensor(RunStore& store, const std::string& blob, const at::Tensor& tensor) {
  const TensorSpec spec{blob, FromScalarType(tensor.scalar_type()), tensor.sizes().vec()};
  return store.PutBlob(blob, {{spec, TensorBytes(tensor)}});
}

// The one tensor of a blob, mapped; `file` keeps it alive.
struct MappedTensor {
  SafetensorsFile file;
  at::Tensor tensor;
};

Result<MappedTensor> GetTensor(const RunStore& store, const std::string& blob) {
  PQ_ASSIGN_OR_RETURN(SafetensorsFile file, store.Blob(blob));
  at::Tensor tensor = TensorFromView(file.tensors().front());
  return MappedTensor{std::move(file), std::move(tensor)};
}

bool AllFinite(const at::Tensor& tensor) { return tensor.isfinite().all().item<bool>(); }

bool AllFinite(const LinearStats& stats) {
  return std::isfinite(stats.fisher_trace) && std::isfinite(stats.grad_square);
}

bool AllFinite(const LinearCost& cost) {
  return std::isfinite(cost.weight_mse) &&
         std::all_of(cost.directional.begin(), cost.directional.end(),
                     [](double s) { return std::isfinite(s); });
}

// Weights of one layer in the compute dtype, by Linear name.
struct LayerWeights {
  std::map<std::string, at::Tensor> weight, bias;

  static Result<LayerWeights> Load(const Model& model, int layer, const ComputeOptions& compute) {
    LayerWeights weights;
    for (const LinearInfo& linear : model.LayerLinears(layer)) {
      PQ_ASSIGN_OR_RETURN(const at::Tensor weight, model.LoadWeight(linear));
      PQ_ASSIGN_OR_RETURN(const at::Tensor bias, model.LoadBias(linear));
      weights.weight[linear.name] = weight.to(compute.dtype);
      weights.bias[linear.name] = bias.defined() ? bias.to(compute.dtype) : bias;
    }
    return weights;
  }
};

// Multiplies, and remembers the largest input of each Linear.
class MaximaRunner : public LinearRunner {
 public:
  explicit MaximaRunner(const LayerWeights& weights) : weights_(weights) {}
  at::Tensor Apply(const LinearInfo& linear, const at::Tensor& x) override {
    double& amax = maxima_[linear.name];
    amax = std::max(amax, x.abs().max().item<double>());
    const at::Tensor& bias = weights_.bias.at(linear.name);
    return at::linear(x, weights_.weight.at(linear.name),
                      bias.defined() ? std::optional<at::Tensor>(bias) : std::nullopt);
  }
  double maximum(const std::string& name) const { return maxima_.at(name); }

 private:
  const LayerWeights& weights_;
  std::map<std::string, double> maxima_;
};

// Multiplies through LinearProbe and hands observations to the statistics of the layer's Linears.
class ProbedRunner : public LinearRunner, public LinearObserver {
 public:
  ProbedRunner(const LayerWeights& weights, std::vector<LinearInfo> linears,
               const std::map<std::string, SharedScales>& scales,
               const std::map<std::string, at::Tensor>& stored_weights)
      : weights_(weights), linears_(std::move(linears)) {
    statistics_.reserve(linears_.size());
    for (const LinearInfo& linear : linears_) {
      index_[linear.name] = static_cast<int>(statistics_.size());
      statistics_.emplace_back(linear, stored_weights.at(linear.name), scales.at(linear.name));
    }
  }
  at::Tensor Apply(const LinearInfo& linear, const at::Tensor& x) override {
    return ApplyProbed(x, weights_.weight.at(linear.name), weights_.bias.at(linear.name),
                       index_.at(linear.name), *this);
  }
  void Observe(int id, const at::Tensor& x, const at::Tensor& g, const at::Tensor& dx) override {
    const at::NoGradGuard no_grad;
    statistics_[id].AddSequence(x, g, dx, activations_);
  }
  const std::vector<LinearStatistics>& statistics() const { return statistics_; }

 private:
  const LayerWeights& weights_;
  std::vector<LinearInfo> linears_;
  std::map<std::string, int> index_;
  std::vector<LinearStatistics> statistics_;
  ActivationErrors activations_;
};

class Probe {
 public:
  Probe(const Model& model, const TokenWindows& windows, const ProbeOptions& options,
        RunStore& store)
      : model_(model),
        windows_(windows),
        options_(options),
        store_(store),
        layers_(static_cast<int>(model.config().num_layers)),
        context_(model.Context(windows.length(), options.compute)) {}

  Status Run() {
    PQ_ASSIGN_OR_RETURN(const bool finished, store_.IsDone(kBackward, 0));
    if (!finished) PQ_RETURN_IF_ERROR(RunStages());
    // Also what a run left that was killed between a mark and the removals that follow it.
    PQ_RETURN_IF_ERROR(store_.RemoveBlobs(kGradientFolder));
    return store_.RemoveBlobs(kHiddenFolder);
  }

 private:
  Status RunStages() {
    PQ_ASSIGN_OR_RETURN(const bool head_done, store_.IsDone(kHead, 0));
    if (!head_done) {
      PQ_RETURN_IF_ERROR(Forward());
      PQ_RETURN_IF_ERROR(Head());
    }
    return Backward();
  }

  Status NotFinite(const std::string& what) const {
    return Status::InvalidInput(fmt::format("{}: {} is not finite on the calibration text",
                                            model_.checkpoint().folder().string(), what));
  }

  // Input of `layer` for all sequences.
  Result<MappedTensor> Hidden(int layer) const { return GetTensor(store_, HiddenBlob(layer)); }

  Status EmbedInputs() {
    std::vector<at::Tensor> rows;
    for (const auto& window : windows_.windows) {
      const at::Tensor ids =
          at::tensor(std::vector<int64_t>(window.begin(), window.end())).unsqueeze(0);
      PQ_ASSIGN_OR_RETURN(at::Tensor embedded, model_.Embed(ids, options_.compute));
      rows.push_back(std::move(embedded));
    }
    return PutTensor(store_, HiddenBlob(0), at::cat(rows).contiguous());
  }

  Status Forward() {
    const at::NoGradGuard no_grad;
    Progress progress("probe, forward", layers_, "layers");
    for (int layer = 0; layer < layers_; ++layer) {
      PQ_ASSIGN_OR_RETURN(const bool done, store_.IsDone(kForward, layer));
      if (done) {
        progress.Skip(1);
        continue;
      }
      if (layer == 0) PQ_RETURN_IF_ERROR(EmbedInputs());
      PQ_RETURN_IF_ERROR(ForwardLayer(layer));
      progress.Advance();
    }
    return {};
  }

  Status ForwardLayer(int layer) {
    PQ_ASSIGN_OR_RETURN(const auto block, model_.LoadLayer(layer, options_.compute));
    PQ_ASSIGN_OR_RETURN(const LayerWeights weights,
                        LayerWeights::Load(model_, layer, options_.compute));
    model_.checkpoint().WillNeed(model_.LayerTensors(layer + 1));
    PQ_ASSIGN_OR_RETURN(const MappedTensor input, Hidden(layer));
    at::Tensor output = at::empty_like(input.tensor);
    MaximaRunner runner(weights);
    for (int64_t n = 0; n < windows_.count(); ++n) {
      output[n].copy_(RunLayer(*block, context_, input.tensor.narrow(0, n, 1), runner)[0]);
    }
    if (!AllFinite(output)) return NotFinite(fmt::format("the output of layer {}", layer));
    PQ_RETURN_IF_ERROR(PutTensor(store_, HiddenBlob(layer + 1), output));
    std::vector<LinearStats> maxima;
    for (const LinearInfo& linear : model_.LayerLinears(layer)) {
      maxima.push_back(
          {.name = linear.name, .layer = layer, .input_amax = runner.maximum(linear.name)});
    }
    return store_.Commit(kForward, layer, maxima);
  }

  Status Head() {
    PQ_ASSIGN_OR_RETURN(const auto head, model_.LoadHead(options_.compute));
    PQ_ASSIGN_OR_RETURN(const MappedTensor hidden, Hidden(layers_));
    at::Tensor gradient = at::empty_like(hidden.tensor);
    Progress progress("probe, head", windows_.count(), "sequences");
    for (int64_t n = 0; n < windows_.count(); ++n) {
      gradient[n].copy_(
          LossAndGradient(*head, hidden.tensor[n], windows_.windows[n], n, options_).gradient);
      progress.Advance();
    }
    if (!AllFinite(gradient)) return NotFinite("the gradient of the loss");
    PQ_RETURN_IF_ERROR(PutTensor(store_, GradientBlob(layers_), gradient));
    return store_.Commit(kHead, 0);
  }

  Status Backward() {
    Progress progress("probe, backward", layers_, "layers");
    for (int layer = layers_ - 1; layer >= 0; --layer) {
      PQ_ASSIGN_OR_RETURN(const bool done, store_.IsDone(kBackward, layer));
      if (done) {
        progress.Skip(1);
        continue;
      }
      PQ_RETURN_IF_ERROR(BackwardLayer(layer));
      progress.Advance();
    }
    return {};
  }

  // Fused siblings share the largest weight; Linears of a stage share the largest input.
  Result<std::map<std::string, SharedScales>> Scales(
      int layer, const std::map<std::string, at::Tensor>& stored_weights) {
    std::map<std::string, double> unit_amax, input_amax;
    PQ_ASSIGN_OR_RETURN(const std::vector<LinearStats> all, store_.Stats());
    for (const LinearStats& stats : all) input_amax[stats.name] = stats.input_amax;
    const std::vector<LinearInfo> linears = model_.LayerLinears(layer);
    for (const LinearInfo& linear : linears) {
      double& amax = unit_amax[linear.unit];
      amax = std::max(amax, stored_weights.at(linear.name).abs().max().item<double>());
    }
    std::map<std::string, SharedScales> scales;
    for (const LinearInfo& linear : linears) {
      scales[linear.name] = {.weight_amax = unit_amax.at(linear.unit),
                             .input_amax = input_amax.at(linear.name)};
    }
    return scales;
  }

  Status BackwardLayer(int layer) {
    PQ_ASSIGN_OR_RETURN(const auto block, model_.LoadLayer(layer, options_.compute));
    PQ_ASSIGN_OR_RETURN(const LayerWeights weights,
                        LayerWeights::Load(model_, layer, options_.compute));
    if (layer > 0) model_.checkpoint().WillNeed(model_.LayerTensors(layer - 1));
    std::map<std::string, at::Tensor> stored;
    for (const LinearInfo& linear : model_.LayerLinears(layer)) {
      PQ_ASSIGN_OR_RETURN(stored[linear.name], model_.LoadWeight(linear));
    }
    PQ_ASSIGN_OR_RETURN(const auto scales, Scales(layer, stored));
    PQ_ASSIGN_OR_RETURN(const MappedTensor input, Hidden(layer));
    PQ_ASSIGN_OR_RETURN(const MappedTensor upstream, GetTensor(store_, GradientBlob(layer + 1)));
    ProbedRunner runner(weights, model_.LayerLinears(layer), scales, stored);
    at::Tensor gradient = at::empty_like(input.tensor);
    for (int64_t n = 0; n < windows_.count(); ++n) {
      const at::Tensor x = input.tensor.narrow(0, n, 1).detach().clone().requires_grad_(true);
      const at::Tensor y = RunLayer(*block, context_, x, runner);
      gradient.narrow(0, n, 1).copy_(
          torch::autograd::grad({y}, {x}, {upstream.tensor.narrow(0, n, 1)})[0]);
    }
    return CommitBackward(layer, runner.statistics(), gradient);
  }

  Status CommitBackward(int layer, const std::vector<LinearStatistics>& statistics,
                        const at::Tensor& gradient) {
    std::vector<LinearStats> stats;
    std::vector<LinearCost> costs;
    std::vector<at::Tensor> weights;
    std::vector<BlobTensor> blob;
    for (const LinearStatistics& linear : statistics) {
      stats.push_back(linear.Stats());
      if (!AllFinite(stats.back())) {
        return NotFinite(fmt::format("the Fisher trace of {}", stats.back().name));
      }
      for (LinearCost& cost : linear.Costs()) {
        if (!AllFinite(cost)) {
          return NotFinite(fmt::format("the cost of {} for {}", cost.format, cost.linear));
        }
        costs.push_back(std::move(cost));
      }
      weights.push_back(linear.TokenWeights());
      blob.push_back({{stats.back().name, DType::kF32, weights.back().sizes().vec()},
                      TensorBytes(weights.back())});
    }
    if (!AllFinite(gradient)) {
      return NotFinite(fmt::format("the gradient at the input of layer {}", layer));
    }
    PQ_RETURN_IF_ERROR(store_.PutBlob(TokenWeightBlob(layer), blob));
    if (layer > 0) PQ_RETURN_IF_ERROR(PutTensor(store_, GradientBlob(layer), gradient));
    PQ_RETURN_IF_ERROR(store_.Commit(kBackward, layer, stats, costs));
    PQ_RETURN_IF_ERROR(store_.RemoveBlob(GradientBlob(layer + 1)));
    return store_.RemoveBlob(HiddenBlob(layer + 1));
  }

  const Model& model_;
  const TokenWindows& windows_;
  const ProbeOptions& options_;
  RunStore& store_;
  int layers_;
  SequenceContext context_;
};

}  // namespace

std::string HiddenBlob(int64_t layer) { return fmt::format("{}/{}", kHiddenFolder, layer); }

std::string TokenWeightBlob(int64_t layer) { return fmt::format("token_weight/{}", layer); }

int64_t LossTokens(const TokenWindows& windows, LabelRule labels) {
  return windows.count() * (labels == LabelRule::kData ? windows.length() - 1 : windows.length());
}

Status RunProbe(const Model& model, const TokenWindows& windows, const ProbeOptions& options,
                RunStore& store) {
  return GuardTorch("probe", [&] { return Probe(model, windows, options, store).Run(); });
}

}  // namespace prismaquant

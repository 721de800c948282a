#include "probe/measure_smoothing.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "formats/torch_guard.h"
#include "model/sequences.h"
#include "probe/forward_pass.h"
#include "round/input_moments.h"

namespace prismaquant {
namespace {

constexpr char kStage[] = "smooth";
// Set when all layers are through.
constexpr char kSmoothedNote[] = "smoothed";

std::string LayerNote(int layer) { return fmt::format("smoothing/{}", layer); }

// Sums the squares of the inputs of some Linears.
class SquaresRunner : public LinearRunner {
 public:
  SquaresRunner(const LayerWeights& weights, std::set<std::string> observed)
      : weights_(weights), observed_(std::move(observed)) {}

  at::Tensor Apply(const LinearInfo& linear, const at::Tensor& x) override {
    if (observed_.count(linear.name) > 0 && x.numel() > 0) {
      const at::Tensor squares = x.reshape({-1, linear.in}).to(at::kFloat).square().sum(0);
      auto& [sum, tokens] = sums_[linear.name];
      sum = sum.defined() ? sum + squares : squares.to(at::kDouble);
      tokens += x.numel() / linear.in;
    }
    return Multiply(weights_, linear.name, x);
  }
  // Float64 [in]; undefined for a Linear that too few tokens reached.
  at::Tensor sums(const std::string& linear) const {
    const auto found = sums_.find(linear);
    const bool enough = found != sums_.end() && found->second.second >= kFewestInputs;
    return enough ? found->second.first : at::Tensor();
  }

 private:
  const LayerWeights& weights_;
  std::set<std::string> observed_;
  std::map<std::string, std::pair<at::Tensor, int64_t>> sums_;  // with the tokens in each
};

class SmoothingPass {
 public:
  SmoothingPass(const Model& model, const Sequences& sequences, const ComputeOptions& compute,
                RunStore& store)
      : model_(model), forward_(model, sequences, compute, kStage, store), store_(store) {}

  Status Run(bool images) {
    const auto visit = [this](int layer, const LayerWeights& weights,
                              const ForwardPass::Through& through) {
      return Visit(layer, weights, through);
    };
    if (images) {
      PQ_RETURN_IF_ERROR(forward_.Run(*model_.FindPart(Part::kVision), "smooth, vision", visit));
    }
    PQ_RETURN_IF_ERROR(forward_.Run(*model_.FindPart(Part::kText), "smooth, body", visit));
    const PartLayers* mtp = model_.FindPart(Part::kMtp);
    if (mtp != nullptr) PQ_RETURN_IF_ERROR(forward_.Run(*mtp, "smooth, MTP", visit));
    PQ_RETURN_IF_ERROR(store_.RemoveBlobs(kHiddenFolder));
    return store_.PutNote(kSmoothedNote, "1");
  }

 private:
  Status Visit(int layer, const LayerWeights& weights, const ForwardPass::Through& through) {
    const std::vector<SmoothingSite> sites = model_.SmoothingSites(layer);
    std::set<std::string> observed;
    for (const SmoothingSite& site : sites) observed.insert(site.readers.front());
    SquaresRunner runner(weights, std::move(observed));
    PQ_RETURN_IF_ERROR(through(runner));
    SmoothingExponents exponents;
    for (const SmoothingSite& site : sites) {
      const at::Tensor sums = runner.sums(site.readers.front());
      if (!sums.defined()) continue;
      // Each channel goes to equally many inputs, so sums serve as means.
      exponents[site.key()] = ChooseExponents(
          site.channel_of.defined()
              ? at::zeros({site.channels}, at::kDouble).index_add(0, site.channel_of, sums)
              : sums);
    }
    PQ_RETURN_IF_ERROR(store_.PutNote(LayerNote(layer), SmoothingToJson(exponents).dump()));
    return store_.Commit(kStage, layer);
  }

  const Model& model_;
  ForwardPass forward_;
  RunStore& store_;
};

Status Measure(const Model& model, const Calibration& calibration, const ComputeOptions& compute,
               RunStore& store) {
  PQ_ASSIGN_OR_RETURN(const auto smoothed, store.Note(kSmoothedNote));
  if (smoothed) return {};
  PQ_ASSIGN_OR_RETURN(const Sequences sequences, Sequences::Make(model, calibration, compute));
  return SmoothingPass(model, sequences, compute, store).Run(!calibration.captions.empty());
}

}  // namespace

Result<SmoothingExponents> MeasureSmoothing(const Model& model, const Calibration& calibration,
                                            const ComputeOptions& compute, RunStore& store) {
  PQ_RETURN_IF_ERROR(
      GuardTorch("smoothing", [&] { return Measure(model, calibration, compute, store); }));
  SmoothingExponents exponents;
  for (int layer = 0; layer < model.num_layers(); ++layer) {
    PQ_ASSIGN_OR_RETURN(const auto note, store.Note(LayerNote(layer)));
    if (!note) continue;
    const std::string origin = (store.folder() / LayerNote(layer)).string();
    PQ_ASSIGN_OR_RETURN(const Json json, ParseJson(*note, origin));
    PQ_ASSIGN_OR_RETURN(SmoothingExponents of_layer, ParseSmoothing(json, origin));
    exponents.merge(of_layer);
  }
  return exponents;
}

}  // namespace prismaquant

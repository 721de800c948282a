#include "probe/probe.h"

#include <ATen/record_function.h>
#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <utility>

#include "base/interrupt.h"
#include "base/progress.h"
#include "formats/block_pool.h"
#include "formats/extremes.h"
#include "formats/torch_guard.h"
#include "model/layer_pages.h"
#include "model/sequences.h"
#include "probe/blob_tensors.h"
#include "probe/forward_pass.h"
#include "probe/gptq_errors.h"
#include "probe/head_costs.h"
#include "probe/layer_runners.h"
#include "probe/loss.h"
#include "probe/passes.h"
#include "probe/statistics.h"

namespace prismaquant {
namespace {

constexpr char kGradientFolder[] = "gradient";
// A token's weight relative to the mean is cut here, so that a few tokens do not make up a Hessian.
constexpr double kLargestTokenWeight = 10;

// The gradients where HiddenBlob has the hidden states.
std::string GradientBlob(const PartLayers& part, int layer) {
  return fmt::format("{}/{}-{}", kGradientFolder, static_cast<int>(part.part), layer - part.first);
}

bool AllFinite(const std::vector<at::Tensor>& tensors) {
  return std::all_of(tensors.begin(), tensors.end(),
                     [](const at::Tensor& tensor) { return prismaquant::AllFinite(tensor); });
}

bool AllFinite(const LinearStats& stats) {
  return std::isfinite(stats.fisher_trace) && std::isfinite(stats.grad_square);
}

bool AllFinite(const LinearCost& cost) {
  const auto finite = [](const std::vector<double>& values) {
    return std::all_of(values.begin(), values.end(), [](double v) { return std::isfinite(v); });
  };
  return std::isfinite(cost.weight_mse) && finite(cost.directional) && finite(cost.squares);
}

// One pass over all parts that prices some formats. Leaves its hidden states and gradients.
class ProbePass {
 public:
  ProbePass(const Model& model, const Calibration& calibration, const Sequences& sequences,
            const ProbeOptions& options, const PassFormats& pass, RunStore& store)
      : model_(model),
        calibration_(calibration),
        sequences_(sequences),
        options_(options),
        pass_(pass),
        store_(store),
        forward_(model, sequences, options.compute, pass.forward_stage, store) {}

  Status Run() {
    const PartLayers& body = *model_.FindPart(Part::kText);
    const PartLayers* mtp = model_.FindPart(Part::kMtp);
    const PartLayers* vision =
        calibration_.captions.empty() ? nullptr : model_.FindPart(Part::kVision);
    PQ_ASSIGN_OR_RETURN(const bool prepared, Done(pass_.head_stage, body.first));
    if (!prepared) {
      if (vision != nullptr) PQ_RETURN_IF_ERROR(Forward(*vision, "vision"));
      PQ_RETURN_IF_ERROR(Forward(body, "body"));
      PQ_RETURN_IF_ERROR(Head(body));
    }
    if (mtp != nullptr) PQ_RETURN_IF_ERROR(RunMtp(*mtp));
    PQ_RETURN_IF_ERROR(Backward(body, "body"));
    return vision != nullptr ? Backward(*vision, "vision") : Status();
  }

 private:
  Result<bool> Done(const std::string& stage, int layer) { return store_.IsDone(stage, layer); }

  Status RunMtp(const PartLayers& mtp) {
    PQ_ASSIGN_OR_RETURN(const bool prepared, Done(pass_.head_stage, mtp.first));
    if (!prepared) {
      PQ_RETURN_IF_ERROR(Forward(mtp, "MTP"));
      PQ_RETURN_IF_ERROR(Head(mtp));
    }
    return Backward(mtp, "MTP");
  }

  Status Forward(const PartLayers& part, const std::string& title) {
    ReturnFreedMemory();  // of the stage before
    RECORD_USER_SCOPE("probe, forward");
    return forward_.Run(part, "probe, forward, " + title,
                        [this](int layer, const LayerWeights& weights,
                               const ForwardPass::Through& through) -> Status {
                          MaximaRunner runner(weights);
                          PQ_RETURN_IF_ERROR(through(runner));
                          return CommitMaxima(layer, runner);
                        });
  }

  Status CommitMaxima(int layer, const MaximaRunner& runner) {
    // A further pass finds the statistics complete.
    if (!pass_.first) return store_.Commit(pass_.forward_stage, layer);
    std::vector<LinearStats> maxima;
    for (const LinearInfo& linear : model_.LayerLinears(layer)) {
      maxima.push_back(
          {.name = linear.name, .layer = layer, .input_amax = runner.maximum(linear.name)});
    }
    return store_.Commit(pass_.forward_stage, layer, maxima);
  }

  Status Head(const PartLayers& part) {
    ReturnFreedMemory();
    RECORD_USER_SCOPE("probe, head");
    const PartLayers* projection = model_.FindPart(Part::kHead);
    const LayerPages pages(model_, projection == nullptr ? -1 : projection->first, -1);
    PQ_ASSIGN_OR_RETURN(const auto head, model_.LoadHead(part.part, options_.compute));
    PQ_ASSIGN_OR_RETURN(const StoredSequences hidden,
                        StoredSequences::Open(store_, HiddenBlob(part, part.end)));
    Progress progress("probe, head", hidden.count(), "sequences");
    std::vector<SequenceLoss> losses;
    std::vector<at::Tensor> gradients;
    for (int64_t n = hidden.first(); n < hidden.first() + hidden.count(); ++n) {
      PQ_RETURN_IF_ERROR(CheckInterrupted(store_.folder().string()));
      const LossSpan span = SpanOf(part.part, calibration_, n, options_.labels);
      losses.push_back(
          LossAndGradient(*head, hidden.of(n)[0], calibration_.ids(n), span, options_));
      gradients.push_back(losses.back().gradient.unsqueeze(0));
      progress.Advance();
    }
    if (!AllFinite(gradients)) return NotFinite(model_, "the gradient of the loss");
    PQ_RETURN_IF_ERROR(
        PutSequences(store_, GradientBlob(part, part.end), hidden.first(), gradients));
    if (part.part != Part::kText || model_.FindPart(Part::kHead) == nullptr) {
      return store_.Commit(pass_.head_stage, part.first);
    }
    if (pass_.rounding != Rounding::kNearest) return store_.Commit(pass_.head_stage, part.first);
    PQ_ASSIGN_OR_RETURN(const HeadStatistics found, PriceHead(model_, *head, calibration_, hidden,
                                                              losses, options_, pass_.formats));
    PQ_RETURN_IF_ERROR(RequireFinite({found.stats}, found.costs));
    return store_.Commit(pass_.head_stage, part.first, {found.stats}, found.costs);
  }

  Status RequireFinite(const std::vector<LinearStats>& stats,
                       const std::vector<LinearCost>& costs) const {
    for (const LinearStats& linear : stats) {
      if (!AllFinite(linear)) return NotFinite(model_, "the Fisher trace of " + linear.name);
    }
    for (const LinearCost& cost : costs) {
      if (!AllFinite(cost)) {
        return NotFinite(model_, fmt::format("the cost of {} for {}", cost.format, cost.linear));
      }
    }
    return {};
  }

  Status Backward(const PartLayers& part, const std::string& title) {
    ReturnFreedMemory();
    RECORD_USER_SCOPE("probe, backward");
    Progress progress("probe, backward, " + title, part.end - part.first, "layers");
    for (int layer = part.end - 1; layer >= part.first; --layer) {
      PQ_ASSIGN_OR_RETURN(const bool done, Done(pass_.backward_stage, layer));
      if (done) {
        progress.Skip(1);
        continue;
      }
      PQ_RETURN_IF_ERROR(CheckInterrupted(store_.folder().string()));
      PQ_RETURN_IF_ERROR(BackwardLayer(part, layer));
      progress.Advance();
    }
    return {};
  }

  // Groups of Linears share the largest weight and the largest input.
  Result<std::map<std::string, SharedScales>> Scales(int layer, const LayerWeights& weights) {
    std::map<std::string, double> amax_of, scale_group, input_group;
    PQ_ASSIGN_OR_RETURN(const std::vector<LinearStats> all, store_.Stats());
    for (const LinearStats& stats : all) amax_of[stats.name] = stats.input_amax;
    const std::vector<LinearInfo> linears = model_.LayerLinears(layer);
    for (const LinearInfo& linear : linears) {
      double& weight = scale_group[linear.scale_group];
      weight = std::max(weight, LargestMagnitude(weights.stored.at(linear.name)));
      double& input = input_group[linear.input_group];
      input = std::max(input, amax_of.at(linear.name));
    }
    std::map<std::string, SharedScales> scales;
    for (const LinearInfo& linear : linears) {
      scales[linear.name] = {.weight_amax = scale_group.at(linear.scale_group),
                             .input_amax = input_group.at(linear.input_group)};
    }
    return scales;
  }

  std::vector<WeightErrors> NearestErrorsOf(
      const LinearInfo& linear, const LayerWeights& weights,
      const std::map<std::string, SharedScales>& scales) const {
    return NearestErrors(linear, weights.stored.at(linear.name), scales.at(linear.name),
                         pass_.formats, ProductType(options_.compute.dtype));
  }

  // The errors that this pass prices. Those of experts to nearest are made one after the other when
  // the sequences are through: all at once would be larger than the layer.
  Result<LayerErrors> Errors(const PartLayers& part, int layer, const DecoderLayer& block,
                             const LayerWeights& weights,
                             const std::map<std::string, SharedScales>& scales,
                             const StoredSequences& inputs) {
    const std::vector<LinearInfo> linears = model_.LayerLinears(layer);
    if (pass_.rounding == Rounding::kNearest) {
      LayerErrors errors;
      for (const LinearInfo& linear : linears) {
        errors[linear.name] = linear.is_expert ? ErrorsToCome(linear, pass_.formats)
                                               : NearestErrorsOf(linear, weights, scales);
      }
      return errors;
    }
    const at::NoGradGuard no_grad;
    PQ_ASSIGN_OR_RETURN(auto token_weights, LoadTokenWeights(store_, layer));
    MomentsRunner runner(weights, scales, std::move(token_weights), pass_.formats);
    for (int64_t n = inputs.first(); n < inputs.first() + inputs.count(); ++n) {
      runner.BeginSequence(n);
      RunLayer(block, sequences_.Context(part.part, n), inputs.of(n), runner);
    }
    return runner.Errors(linears);
  }

  Status BackwardLayer(const PartLayers& part, int layer) {
    const LayerPages pages(model_, layer, layer > part.first ? layer - 1 : -1);
    PQ_ASSIGN_OR_RETURN(const auto block, model_.LoadLayer(layer, options_.compute));
    PQ_ASSIGN_OR_RETURN(const LayerWeights weights,
                        LayerWeights::Load(model_, layer, options_.compute));
    PQ_ASSIGN_OR_RETURN(const auto scales, Scales(layer, weights));
    PQ_ASSIGN_OR_RETURN(const StoredSequences inputs,
                        StoredSequences::Open(store_, HiddenBlob(part, layer)));
    PQ_ASSIGN_OR_RETURN(const StoredSequences upstream,
                        StoredSequences::Open(store_, GradientBlob(part, layer + 1)));
    PQ_ASSIGN_OR_RETURN(LayerErrors errors, Errors(part, layer, *block, weights, scales, inputs));
    ProbedRunner runner(weights, model_.LayerLinears(layer), scales, std::move(errors),
                        calibration_.count());
    std::vector<at::Tensor> gradients;
    for (int64_t n = inputs.first(); n < inputs.first() + inputs.count(); ++n) {
      runner.BeginSequence(n);
      const at::Tensor x = inputs.of(n).detach().clone().requires_grad_(true);
      const at::Tensor y = RunLayer(*block, sequences_.Context(part.part, n), x, runner);
      gradients.push_back(torch::autograd::grad({y}, {x}, {upstream.of(n)})[0]);
    }
    runner.PriceKept(
        [&](const LinearInfo& linear) { return NearestErrorsOf(linear, weights, scales); });
    return CommitBackward(part, layer, runner, inputs.first(), gradients);
  }

  Status CommitBackward(const PartLayers& part, int layer, const ProbedRunner& runner,
                        int64_t first, const std::vector<at::Tensor>& gradients) {
    std::vector<LinearStats> stats;
    std::vector<LinearCost> costs;
    std::vector<std::pair<std::string, at::Tensor>> weights, factors;
    for (size_t i = 0; i < runner.linears().size(); ++i) {
      const LinearStatistics& linear = runner.statistics()[i];
      stats.push_back(linear.Stats());
      for (LinearCost& cost : linear.Costs()) costs.push_back(std::move(cost));
      if (runner.linears()[i].is_expert) continue;
      weights.emplace_back(stats.back().name, linear.TokenWeights());
      const at::Tensor factor = linear.OutputFactor();
      if (factor.defined()) factors.emplace_back(stats.back().name, factor);
    }
    PQ_RETURN_IF_ERROR(RequireFinite(stats, costs));
    if (!AllFinite(gradients)) {
      return NotFinite(model_, fmt::format("the gradient at the input of layer {}", layer));
    }
    PQ_RETURN_IF_ERROR(PutTensors(store_, TokenWeightBlob(layer), weights));
    PQ_RETURN_IF_ERROR(PutTensors(store_, OutputFactorBlob(layer), factors));
    PQ_RETURN_IF_ERROR(HandOn(part, layer, first, gradients));
    PQ_RETURN_IF_ERROR(store_.Commit(pass_.backward_stage, layer, stats, costs));
    PQ_RETURN_IF_ERROR(store_.RemoveBlob(GradientBlob(part, layer + 1)));
    return store_.RemoveBlob(HiddenBlob(part, layer + 1));
  }

  // Stores a layer's gradients where the layer or the part before it will look for them.
  Status HandOn(const PartLayers& part, int layer, int64_t first,
                const std::vector<at::Tensor>& gradients) {
    if (layer > part.first) {
      return PutSequences(store_, GradientBlob(part, layer), first, gradients);
    }
    if (part.part != Part::kText || calibration_.captions.empty()) return {};
    const PartLayers& vision = *model_.FindPart(Part::kVision);
    const SequenceRange range = sequences_.Range(Part::kVision);
    std::vector<at::Tensor> images;
    for (int64_t n = range.first; n < range.end; ++n) {
      images.push_back(sequences_.ImageRows(n, gradients[static_cast<size_t>(n - first)]));
    }
    return PutSequences(store_, GradientBlob(vision, vision.end), range.first, images);
  }

  const Model& model_;
  const Calibration& calibration_;
  const Sequences& sequences_;
  const ProbeOptions& options_;
  const PassFormats& pass_;
  RunStore& store_;
  ForwardPass forward_;
};

Status RunPasses(const Model& model, const Calibration& calibration, const ProbeOptions& options,
                 RunStore& store) {
  PQ_ASSIGN_OR_RETURN(const Sequences sequences,
                      Sequences::Make(model, calibration, options.compute));
  std::vector<const Format*> nearest = options.formats;
  if (nearest.empty()) nearest.assign(AllFormats().begin(), AllFormats().end());
  PQ_ASSIGN_OR_RETURN(const std::vector<PassFormats> passes,
                      PlanPasses(store, nearest, options.gptq_formats));
  for (const PassFormats& pass : passes) {
    PQ_RETURN_IF_ERROR(ProbePass(model, calibration, sequences, options, pass, store).Run());
  }
  // Once all passes are through: a finished pass must not remove what a later, interrupted one
  // needs.
  PQ_RETURN_IF_ERROR(store.RemoveBlobs(kGradientFolder));
  PQ_RETURN_IF_ERROR(store.RemoveBlobs(kHiddenFolder));
  PQ_ASSIGN_OR_RETURN(const bool noted, IsProbed(store));
  return noted ? Status() : store.PutNote(kProbedNote, "1");
}

}  // namespace

Result<bool> IsProbed(RunStore& store) {
  PQ_ASSIGN_OR_RETURN(const auto note, store.Note(kProbedNote));
  return note.has_value();
}

std::string TokenWeightBlob(int64_t layer) { return fmt::format("token_weight/{}", layer); }

std::string OutputFactorBlob(int64_t layer) { return fmt::format("output_factor/{}", layer); }

Result<std::map<std::string, at::Tensor>> LoadTokenWeights(const RunStore& store, int64_t layer) {
  PQ_ASSIGN_OR_RETURN(const SafetensorsFile blob, store.Blob(TokenWeightBlob(layer)));
  std::map<std::string, at::Tensor> weights;
  for (const TensorView& view : blob.tensors()) {
    const at::Tensor squares = TensorFromView(view);
    weights[view.name] =
        (squares / squares.mean().clamp_min(1e-30)).clamp_max(kLargestTokenWeight).clone();
  }
  return weights;
}

Result<std::map<std::string, at::Tensor>> LoadOutputFactors(const RunStore& store, int64_t layer) {
  PQ_ASSIGN_OR_RETURN(const SafetensorsFile blob, store.Blob(OutputFactorBlob(layer)));
  std::map<std::string, at::Tensor> factors;
  for (const TensorView& view : blob.tensors()) factors[view.name] = TensorFromView(view).clone();
  return factors;
}

LossTokens CountLossTokens(const Model& model, const Calibration& calibration, LabelRule labels) {
  LossTokens tokens{.windows = calibration.text.count()};
  const bool mtp = model.FindPart(Part::kMtp) != nullptr;
  for (int64_t n = 0; n < calibration.count(); ++n) {
    const LossSpan span = SpanOf(Part::kText, calibration, n, labels);
    const bool caption = calibration.IsCaption(n);
    (caption ? tokens.caption : tokens.text) += span.end - span.begin;
    if (caption || !mtp) continue;
    const LossSpan further = SpanOf(Part::kMtp, calibration, n, labels);
    tokens.mtp += std::max<int64_t>(further.end - further.begin, 0);
  }
  return tokens;
}

Status RunProbe(const Model& model, const Calibration& calibration, const ProbeOptions& options,
                RunStore& store) {
  return GuardTorch("probe", [&] { return RunPasses(model, calibration, options, store); });
}

}  // namespace prismaquant

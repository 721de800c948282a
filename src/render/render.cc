#include "render/render.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/interrupt.h"
#include "base/progress.h"
#include "base/sha256.h"
#include "formats/extremes.h"
#include "formats/torch_guard.h"
#include "model/layer_pages.h"
#include "model/sequences.h"
#include "probe/blob_tensors.h"
#include "probe/probe.h"
#include "render/stage_inputs.h"

namespace prismaquant {
namespace {

// None of fewer sequences is held out.
constexpr size_t kFewestSequences = 4;

bool IsHeldOut(size_t sequence, size_t count) {
  const size_t every = std::min(kHeldOutEvery, count);
  return count >= kFewestSequences && sequence % every == every - 1;
}

std::string LayerBlob(const std::string& key, int layer) {
  return fmt::format("render/{}/layer-{}", key, layer);
}
// The two ways through the model: as it is being quantized, and as it was.
enum class Stream { kQuantized, kSource };
// The hidden states before `layer` of a part, or, if it is the part's end, after its last one.
std::string StateBlob(const std::string& key, Stream stream, const PartLayers& part, int layer) {
  return fmt::format("render/{}/{}-{}-{}", key, stream == Stream::kQuantized ? "hidden" : "source",
                     static_cast<int>(part.part), layer - part.first);
}
std::string StageName(const std::string& key) { return "render/" + key; }
const char* PartTitle(Part part) {
  switch (part) {
    case Part::kText:
      return "body";
    case Part::kHead:
      return "lm_head";
    case Part::kMtp:
      return "MTP";
    case Part::kVision:
      return "vision";
  }
  return "";
}
std::string ReportNote(const std::string& key, int64_t layer) {
  return fmt::format("render/{}/{}", key, layer);
}

class Renderer {
 public:
  Renderer(const Model& model, const Sequences& sequences, const FormatChoice& formats,
           const RenderOptions& options, const std::string& key, RunStore& store)
      : model_(model),
        sequences_(sequences),
        formats_(formats),
        options_(options),
        key_(key),
        store_(store) {}

  Status Run() {
    const at::NoGradGuard no_grad;
    PQ_ASSIGN_OR_RETURN(const bool probed, IsProbed(store_));
    guided_ = options_.guided && probed;
    if (sequences_.Range(Part::kVision).count() > 0) PQ_RETURN_IF_ERROR(RunPart(Part::kVision));
    PQ_RETURN_IF_ERROR(RunPart(Part::kText));
    for (const Part part : {Part::kHead, Part::kMtp}) {
      if (IsQuantized(part)) PQ_RETURN_IF_ERROR(RunPart(part));
    }
    for (const PartLayers& part : model_.parts()) PQ_RETURN_IF_ERROR(RemoveStates(part, part.end));
    return {};
  }

 private:
  struct Rendered {
    std::map<std::string, StoredTensors> tensors;
    Json report = Json::object();
  };
  // Per sequence of a part; the source's empty if it is not followed.
  struct Streams {
    std::vector<LayerState> quantized, source;
  };
  // What a Linear is rounded and judged by.
  struct RoundingInputs {
    InputRows train, held_out;
    FactoredHessian hessian;
    const InputRows& Judge() const { return held_out.tokens() > 0 ? held_out : train; }
  };
  // That of one InputSet in one format.
  struct LastRounding {
    const InputSet* inputs = nullptr;
    const Format* format = nullptr;
    std::shared_ptr<const RoundingInputs> by;
  };
  // One stage of all sequences: per sequence, per Linear. The source's empty if it is not followed.
  struct StageRun {
    const std::vector<LinearInfo>& linears;
    StageInputs inputs;
    std::vector<std::vector<at::Tensor>> source_inputs;
    std::vector<std::vector<at::Tensor>> outputs, source_outputs;
    LastRounding of_expert = {}, of_few_inputs = {};
  };
  // One Linear that is being rounded.
  struct Job {
    const LinearInfo& linear;
    const Format& format;
    at::Tensor weight;   // float32
    at::Tensor product;  // the same in the dtype of products
    const SharedScales& scales;
    InputSet& inputs;
    std::vector<at::Tensor> source_inputs = {};  // per sequence; empty without a counterpart
  };

  bool IsQuantized(Part part) const {
    return std::any_of(model_.linears().begin(), model_.linears().end(), [&](const auto& linear) {
      return linear.part == part && formats_.at(linear.name) != &SourceFormat();
    });
  }

  Status RunPart(Part part) {
    const PartLayers& layers = *model_.FindPart(part);
    Progress progress(fmt::format("render, {}, {}", PartTitle(part),
                                  options_.mode == RenderMode::kGptq ? "GPTQ" : "RTN"),
                      layers.end - layers.first, "layers");
    for (int layer = layers.first; layer < layers.end; ++layer) {
      PQ_ASSIGN_OR_RETURN(const bool done, store_.IsDone(StageName(key_), layer));
      if (done) {
        progress.Skip(1);
        continue;
      }
      PQ_RETURN_IF_ERROR(CheckInterrupted(store_.folder().string()));
      PQ_RETURN_IF_ERROR(RenderLayer(layers, layer));
      progress.Advance();
    }
    return {};
  }

  bool follows_source() const { return options_.mode == RenderMode::kGptq && options_.correct; }

  Status RemoveStates(const PartLayers& part, int layer) {
    PQ_RETURN_IF_ERROR(store_.RemoveBlob(StateBlob(key_, Stream::kQuantized, part, layer)));
    return store_.RemoveBlob(StateBlob(key_, Stream::kSource, part, layer));
  }

  // The inputs of a layer, one per sequence of the part.
  Result<std::vector<LayerState>> LayerInputs(Stream stream, const PartLayers& part, int layer) {
    const SequenceRange range = sequences_.Range(part.part);
    const bool first = layer == part.first;
    std::optional<StoredSequences> before;
    if (!first) {
      PQ_ASSIGN_OR_RETURN(before,
                          StoredSequences::Open(store_, StateBlob(key_, stream, part, layer)));
    } else if (const std::optional<Part> source = sequences_.Before(part.part)) {
      const PartLayers& layers = *model_.FindPart(*source);
      PQ_ASSIGN_OR_RETURN(
          before, StoredSequences::Open(store_, StateBlob(key_, stream, layers, layers.end)));
    }
    std::vector<LayerState> states(static_cast<size_t>(range.count()));
    for (int64_t n = range.first; n < range.end; ++n) {
      at::Tensor& hidden = states[static_cast<size_t>(n - range.first)].hidden;
      const at::Tensor stored = before ? before->Find(n) : at::Tensor();
      if (first) {
        PQ_ASSIGN_OR_RETURN(hidden, sequences_.Input(part.part, n, stored));
      } else {
        hidden = stored.clone();
      }
    }
    return states;
  }

  Status LoadGuidanceOf(int layer) {
    token_weights_.clear();
    output_factors_.clear();
    if (!guided_ || layer == HeadLayer()) return {};
    PQ_ASSIGN_OR_RETURN(token_weights_, LoadTokenWeights(store_, layer));
    PQ_ASSIGN_OR_RETURN(output_factors_, LoadOutputFactors(store_, layer));
    return {};
  }

  RowFeedback FeedbackOf(const std::string& linear) const {
    const auto factor = output_factors_.find(linear);
    return factor == output_factors_.end() ? RowFeedback() : RowFeedback(factor->second);
  }

  // The output projection, of which the probe leaves no guidance; -1 if it is tied.
  int HeadLayer() const {
    const PartLayers* head = model_.FindPart(Part::kHead);
    return head == nullptr ? -1 : head->first;
  }

  Status RenderLayer(const PartLayers& part, int layer) {
    const LayerPages pages(model_, layer, layer + 1);
    PQ_ASSIGN_OR_RETURN(const auto block, model_.LoadLayer(layer, options_.compute));
    Streams streams;
    PQ_ASSIGN_OR_RETURN(streams.quantized, LayerInputs(Stream::kQuantized, part, layer));
    if (follows_source()) {
      PQ_ASSIGN_OR_RETURN(streams.source, LayerInputs(Stream::kSource, part, layer));
    }
    PQ_RETURN_IF_ERROR(LoadGuidanceOf(layer));
    const int64_t first = sequences_.Range(part.part).first;
    const auto context = [&](size_t i) -> const SequenceContext& {
      return sequences_.Context(part.part, first + static_cast<int64_t>(i));
    };
    const auto inputs_of = [&](int s, std::vector<LayerState>& states) {
      std::vector<std::vector<at::Tensor>> x;
      for (size_t i = 0; i < states.size(); ++i) {
        x.push_back(block->StageInputs(s, context(i), states[i]));
      }
      return x;
    };
    const auto put_outputs = [&](int s, std::vector<std::vector<at::Tensor>> outputs,
                                 std::vector<LayerState>& states) {
      for (size_t i = 0; i < outputs.size(); ++i) {
        block->StageOutputs(s, context(i), std::move(outputs[i]), states[i]);
      }
    };
    Rendered rendered;
    for (int s = 0; s < block->num_stages(); ++s) {
      // Nothing comes after the output projection that would want its product.
      const bool last = part.part == Part::kHead;
      StageRun run{.linears = block->stage(s),
                   .inputs = StageInputs(block->stage(s), inputs_of(s, streams.quantized)),
                   .source_inputs = inputs_of(s, streams.source)};
      run.outputs.resize(last ? 0 : streams.quantized.size());
      run.source_outputs.resize(last ? 0 : streams.source.size());
      PQ_RETURN_IF_ERROR(RenderStage(run, rendered));
      put_outputs(s, std::move(run.outputs), streams.quantized);
      put_outputs(s, std::move(run.source_outputs), streams.source);
    }
    return CommitLayer(part, layer, rendered, streams);
  }

  Status RenderStage(StageRun& run, Rendered& rendered) {
    std::vector<at::Tensor> stored;        // weights, mapped
    std::map<std::string, double> maxima;  // largest |w| per scale group
    for (const LinearInfo& linear : run.linears) {
      PQ_ASSIGN_OR_RETURN(at::Tensor weight, model_.LoadWeight(linear));
      double& amax = maxima[linear.scale_group];
      amax = std::max(amax, LargestMagnitude(weight));
      stored.push_back(std::move(weight));
    }
    for (size_t i = 0; i < run.linears.size(); ++i) {
      const LinearInfo& linear = run.linears[i];
      const Format& format = *formats_.at(linear.name);
      const SharedScales scales{.weight_amax = maxima.at(linear.scale_group),
                                .input_amax = run.inputs.GroupRange(linear.input_group, format)};
      PQ_ASSIGN_OR_RETURN(at::Tensor bias, model_.LoadBias(linear));
      if (bias.defined()) bias = bias.to(options_.compute.dtype);
      const at::ScalarType dtype = options_.compute.dtype;
      Job job{.linear = linear,
              .format = format,
              .weight = stored[i].to(at::kFloat),
              .product = stored[i].to(dtype),
              .scales = scales,
              .inputs = run.inputs.of(i)};
      at::Tensor rounded = job.product;
      for (const auto& of_sequence : run.source_inputs) job.source_inputs.push_back(of_sequence[i]);
      if (&format != &SourceFormat()) {
        PQ_ASSIGN_OR_RETURN(rounded, RenderLinear(job, run, rendered));
        rounded = rounded.to(dtype);
      }
      const std::vector<at::Tensor>& x = job.inputs.For(format, scales);
      for (size_t n = 0; n < run.outputs.size(); ++n) {
        run.outputs[n].push_back(MultiplyLinear(x[n], rounded, bias));
      }
      for (size_t n = 0; n < run.source_outputs.size(); ++n) {
        run.source_outputs[n].push_back(MultiplyLinear(job.source_inputs[n], job.product, bias));
      }
    }
    return {};
  }

  // Leaves the stored tensors in `rendered` and returns the decoded weight, float32 [out, in].
  Result<at::Tensor> RenderLinear(const Job& job, StageRun& run, Rendered& rendered) {
    const LinearInfo& linear = job.linear;
    Json& report = rendered.report[linear.name];
    report["format"] = job.format.name();
    if (linear.is_expert) report["tokens"] = job.inputs.tokens();
    if (options_.mode == RenderMode::kRtn) {
      StoredTensors stored = job.format.Encode(job.weight, job.scales, linear.dtype);
      at::Tensor decoded = job.format.Decode(stored);
      rendered.tensors[linear.name] = std::move(stored);
      report["rendered"] = "rtn";
      return decoded;
    }
    at::Tensor target = job.weight;
    const std::shared_ptr<const RoundingInputs> by =
        linear.is_expert ? SharedRounding(job, run) : MakeRounding(job, target);
    PQ_ASSIGN_OR_RETURN(
        GptqResult result,
        RenderGuarded(job.format, job.weight, target, by->hessian, by->Judge(), job.scales,
                      linear.dtype, options_.gptq, FeedbackOf(linear.name)));
    report["rendered"] = result.fell_back ? "rtn" : HasFewInputs(job) ? "rtn+scales" : "gptq";
    if (by->held_out.tokens() > 0) {
      report["error_ratio"] = result.error_ratio;
      report["weight_error_ratio"] = result.weight_ratio;
    }
    rendered.tensors[linear.name] = std::move(result.stored);
    return std::move(result.decoded);
  }

  static bool HasFewInputs(const Job& job) {
    return job.linear.is_expert && job.inputs.tokens() < kFewestInputs;
  }

  // Experts have neither token weights nor lacks: one that reads the same as the one before it, as
  // up after gate, is rounded by the same, and so are all that saw few tokens.
  std::shared_ptr<const RoundingInputs> SharedRounding(const Job& job, StageRun& run) const {
    const bool few = HasFewInputs(job);
    LastRounding& last = few ? run.of_few_inputs : run.of_expert;
    const InputSet* inputs = few ? nullptr : &job.inputs;
    if (last.by == nullptr || last.inputs != inputs || last.format != &job.format) {
      at::Tensor target = job.weight;
      last = {.inputs = inputs, .format = &job.format, .by = MakeRounding(job, target)};
    }
    return last.by;
  }

  // `target`, the weight, is moved towards the source's outputs. What saw few tokens gets inputs
  // that come one at a time: their Hessian rounds to nearest with chosen scales.
  std::shared_ptr<const RoundingInputs> MakeRounding(const Job& job, at::Tensor& target) const {
    auto by = std::make_shared<RoundingInputs>();
    if (HasFewInputs(job)) {
      by->train.Add(at::eye(job.linear.in), {});
    } else {
      SplitInputs(job, *by);
    }
    InputMoments moments(job.linear.in);
    moments.Add(by->train.x(), {});
    if (options_.correct) {
      target = Correct(target, moments.hessian(), by->train, by->held_out).weight;
    }
    by->hessian = FactorHessian(job.format, moments.hessian(), options_.gptq);
    return by;
  }

  void SplitInputs(const Job& job, RoundingInputs& by) const {
    const std::vector<at::Tensor>& x = job.inputs.For(job.format, job.scales);
    const auto weights = token_weights_.find(job.linear.name);
    int64_t first = 0;
    for (size_t n = 0; n < x.size(); ++n) {
      const at::Tensor rows = x[n].reshape({-1, job.linear.in});
      const at::Tensor token_weights = weights == token_weights_.end()
                                           ? at::Tensor()
                                           : weights->second.narrow(0, first, rows.size(0));
      InputRows& half = IsHeldOut(n, x.size()) ? by.held_out : by.train;
      half.Add(rows, token_weights, Lack(job, n, rows));
      first += rows.size(0);
    }
  }

  // What the outputs for `rows` lack of the source's, [tokens, out]; undefined for an expert, whose
  // tokens may be others than the source's.
  at::Tensor Lack(const Job& job, size_t sequence, const at::Tensor& rows) const {
    if (job.source_inputs.empty() || job.linear.is_expert) return {};
    const at::Tensor source = job.source_inputs[sequence].reshape({-1, job.linear.in});
    const at::Tensor difference = source.to(at::kFloat) - rows.to(at::kFloat);
    return MultiplyLinear(difference.to(options_.compute.dtype), job.product, {});
  }

  Status PutStates(Stream stream, const PartLayers& part, int layer,
                   const std::vector<LayerState>& states) {
    std::vector<at::Tensor> hidden;
    hidden.reserve(states.size());
    for (const LayerState& state : states) hidden.push_back(state.hidden);
    return PutSequences(store_, StateBlob(key_, stream, part, layer),
                        sequences_.Range(part.part).first, hidden);
  }

  Status CommitLayer(const PartLayers& part, int layer, const Rendered& rendered,
                     const Streams& streams) {
    std::vector<std::pair<std::string, at::Tensor>> named;
    for (const auto& [linear, tensors] : rendered.tensors) {
      for (const auto& [suffix, tensor] : tensors) {
        named.emplace_back(fmt::format("{}.{}", linear, suffix), tensor);
      }
    }
    PQ_RETURN_IF_ERROR(PutTensors(store_, LayerBlob(key_, layer), named));
    if (layer + 1 < part.end || part.part == Part::kText || part.part == Part::kVision) {
      PQ_RETURN_IF_ERROR(PutStates(Stream::kQuantized, part, layer + 1, streams.quantized));
      if (follows_source()) {
        PQ_RETURN_IF_ERROR(PutStates(Stream::kSource, part, layer + 1, streams.source));
      }
    }
    PQ_RETURN_IF_ERROR(store_.PutNote(ReportNote(key_, layer), rendered.report.dump()));
    PQ_RETURN_IF_ERROR(store_.Commit(StageName(key_), layer));
    return RemoveStates(part, layer);
  }

  const Model& model_;
  const Sequences& sequences_;
  const FormatChoice& formats_;
  const RenderOptions& options_;
  const std::string& key_;
  RunStore& store_;
  bool guided_ = false;
  std::map<std::string, at::Tensor> token_weights_, output_factors_;  // of the current layer
};

}  // namespace

std::string RenderKey(const FormatChoice& formats, const RenderOptions& options) {
  Json json = {{"mode", options.mode == RenderMode::kGptq ? "gptq" : "rtn"},
               {"damping", options.gptq.damping},
               {"choose_scales", options.gptq.choose_scales},
               {"input_headroom", kLargestHeadroom},
               {"correct", options.correct},
               {"sweep", options.gptq.sweep},
               {"guided", options.guided},
               {"precision", at::toString(options.compute.dtype)}};
  for (const auto& [linear, format] : formats) json["formats"][linear] = format->name();
  return Sha256Hex(json.dump()).substr(0, 16);
}

Status RenderModel(const Model& model, const Calibration& calibration, const FormatChoice& formats,
                   const RenderOptions& options, const std::string& key, RunStore& store) {
  return GuardTorch("render", [&]() -> Status {
    PQ_ASSIGN_OR_RETURN(const Sequences sequences,
                        Sequences::Make(model, calibration, options.compute));
    return Renderer(model, sequences, formats, options, key, store).Run();
  });
}

Result<std::map<std::string, StoredTensors>> RenderedLayer(const RunStore& store,
                                                           const std::string& key, int layer) {
  PQ_ASSIGN_OR_RETURN(const SafetensorsFile file, store.Blob(LayerBlob(key, layer)));
  std::map<std::string, StoredTensors> linears;
  for (const TensorView& view : file.tensors()) {
    const size_t dot = view.name.rfind('.');
    linears[view.name.substr(0, dot)][view.name.substr(dot + 1)] = TensorFromView(view).clone();
  }
  return linears;
}

Result<Json> RenderReport(RunStore& store, const std::string& key, int64_t layers) {
  Json report = Json::object();
  for (int64_t layer = 0; layer < layers; ++layer) {
    PQ_ASSIGN_OR_RETURN(const auto note, store.Note(ReportNote(key, layer)));
    if (!note) continue;
    PQ_ASSIGN_OR_RETURN(const Json part, ParseJson(*note, ReportNote(key, layer)));
    report.update(part);
  }
  return report;
}

Result<bool> IsRenderingBegun(RunStore& store, const std::string& key) {
  PQ_ASSIGN_OR_RETURN(const auto stages, store.Stages());
  return stages.count(StageName(key)) > 0;
}

Status DropRendering(RunStore& store, const std::string& key) {
  PQ_RETURN_IF_ERROR(store.Forget(StageName(key)));
  return store.RemoveBlobs("render/" + key);
}

}  // namespace prismaquant

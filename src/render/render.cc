#include "render/render.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "base/progress.h"
#include "base/sha256.h"
#include "formats/tensor_bytes.h"
#include "formats/torch_guard.h"
#include "probe/probe.h"

namespace prismaquant {
namespace {

// One sequence in this many is kept out of the Hessian and judges the result.
constexpr int64_t kHeldOutEvery = 8;
// A token's weight relative to the mean is cut here, so that a few tokens do not make up the
// Hessian.
constexpr double kLargestTokenWeight = 10;
// The layer with which the probe ends.
constexpr int kProbedLast = 0;

std::string LayerBlob(const std::string& key, int layer) {
  return fmt::format("render/{}/layer-{}", key, layer);
}
std::string StateBlob(const std::string& key, int layer) {
  return fmt::format("render/{}/hidden-{}", key, layer);
}
std::string StageName(const std::string& key) { return "render/" + key; }
std::string ReportNote(const std::string& key, int64_t layer) {
  return fmt::format("render/{}/{}", key, layer);
}

// The inputs of one stage for all sequences, and their quantized forms per format.
class StageInputs {
 public:
  explicit StageInputs(std::vector<at::Tensor> inputs) : inputs_(std::move(inputs)) {
    for (const at::Tensor& x : inputs_) amax_ = std::max(amax_, x.abs().max().item<double>());
  }
  double amax() const { return amax_; }
  const std::vector<at::Tensor>& Plain() const { return inputs_; }
  const std::vector<at::Tensor>& For(const Format& format, const SharedScales& scales) {
    if (!format.quantizes_activations()) return inputs_;
    std::vector<at::Tensor>& quantized = quantized_[&format];
    if (quantized.empty()) {
      for (const at::Tensor& x : inputs_) quantized.push_back(format.QuantizeActivation(x, scales));
    }
    return quantized;
  }

 private:
  std::vector<at::Tensor> inputs_;
  double amax_ = 0;
  std::map<const Format*, std::vector<at::Tensor>> quantized_;
};

class Renderer {
 public:
  Renderer(const Model& model, const TokenWindows& windows, const FormatChoice& formats,
           const RenderOptions& options, const std::string& key, RunStore& store)
      : model_(model),
        windows_(windows),
        formats_(formats),
        options_(options),
        key_(key),
        store_(store),
        context_(model.Context(windows.length(), options.compute)) {}

  Status Run() {
    const at::NoGradGuard no_grad;
    PQ_ASSIGN_OR_RETURN(const bool probed, store_.IsDone("backward", kProbedLast));
    guided_ = options_.guided && probed;
    const auto layers = static_cast<int>(model_.config().num_layers);
    Progress progress(options_.mode == RenderMode::kGptq ? "render, GPTQ" : "render, RTN", layers,
                      "layers");
    for (int layer = 0; layer < layers; ++layer) {
      PQ_ASSIGN_OR_RETURN(const bool done, store_.IsDone(StageName(key_), layer));
      if (done) {
        progress.Skip(1);
        continue;
      }
      PQ_RETURN_IF_ERROR(RenderLayer(layer));
      progress.Advance();
    }
    return {};
  }

 private:
  struct Rendered {
    std::map<std::string, StoredTensors> tensors;
    Json report = Json::object();
  };

  // The layer's input, one [1, tokens, hidden] per sequence.
  Result<std::vector<LayerState>> LayerInputs(int layer) {
    std::vector<LayerState> states(windows_.count());
    if (layer == 0) {
      for (int64_t n = 0; n < windows_.count(); ++n) {
        const auto& window = windows_.windows[n];
        const at::Tensor ids =
            at::tensor(std::vector<int64_t>(window.begin(), window.end())).unsqueeze(0);
        PQ_ASSIGN_OR_RETURN(states[n].hidden, model_.Embed(ids, options_.compute));
      }
      return states;
    }
    PQ_ASSIGN_OR_RETURN(const SafetensorsFile file, store_.Blob(StateBlob(key_, layer)));
    const at::Tensor hidden = TensorFromView(file.tensors().front());
    for (int64_t n = 0; n < windows_.count(); ++n)
      states[n].hidden = hidden.narrow(0, n, 1).clone();
    return states;
  }

  Status LoadTokenWeights(int layer) {
    token_weights_.clear();
    if (!guided_) return {};
    PQ_ASSIGN_OR_RETURN(const SafetensorsFile file, store_.Blob(TokenWeightBlob(layer)));
    for (const TensorView& view : file.tensors()) {
      const at::Tensor weights = TensorFromView(view);
      token_weights_[view.name] =
          (weights / weights.mean().clamp_min(1e-30)).clamp_max(kLargestTokenWeight).clone();
    }
    return {};
  }

  Status RenderLayer(int layer) {
    PQ_ASSIGN_OR_RETURN(const auto block, model_.LoadLayer(layer, options_.compute));
    model_.checkpoint().WillNeed(model_.LayerTensors(layer + 1));
    PQ_ASSIGN_OR_RETURN(std::vector<LayerState> states, LayerInputs(layer));
    PQ_RETURN_IF_ERROR(LoadTokenWeights(layer));
    Rendered rendered;
    for (int s = 0; s < block->num_stages(); ++s) {
      std::vector<at::Tensor> x;
      x.reserve(states.size());
      for (LayerState& state : states) x.push_back(block->StageInput(s, context_, state));
      StageInputs inputs(std::move(x));
      std::vector<std::vector<at::Tensor>> outputs(states.size());
      PQ_RETURN_IF_ERROR(RenderStage(block->stage(s), inputs, rendered, outputs));
      for (size_t n = 0; n < states.size(); ++n) {
        block->StageOutput(s, context_, std::move(outputs[n]), states[n]);
      }
    }
    return CommitLayer(layer, rendered, states);
  }

  // Largest |w| per fused set of the stage.
  Result<std::map<std::string, double>> UnitMaxima(const std::vector<LinearInfo>& stage) {
    std::map<std::string, double> maxima;
    for (const LinearInfo& linear : stage) {
      PQ_ASSIGN_OR_RETURN(const at::Tensor weight, model_.LoadWeight(linear));
      double& amax = maxima[linear.unit];
      amax = std::max(amax, weight.abs().max().to(at::kDouble).item<double>());
    }
    return maxima;
  }

  Status RenderStage(const std::vector<LinearInfo>& stage, StageInputs& inputs, Rendered& rendered,
                     std::vector<std::vector<at::Tensor>>& outputs) {
    PQ_ASSIGN_OR_RETURN(const auto maxima, UnitMaxima(stage));
    for (const LinearInfo& linear : stage) {
      const Format& format = *formats_.at(linear.name);
      const SharedScales scales{.weight_amax = maxima.at(linear.unit), .input_amax = inputs.amax()};
      PQ_ASSIGN_OR_RETURN(const at::Tensor stored_weight, model_.LoadWeight(linear));
      PQ_ASSIGN_OR_RETURN(at::Tensor bias, model_.LoadBias(linear));
      if (bias.defined()) bias = bias.to(options_.compute.dtype);
      at::Tensor weight = stored_weight.to(at::kFloat);
      if (&format != &SourceFormat()) {
        PQ_ASSIGN_OR_RETURN(weight, RenderLinear(linear, format, weight, scales, inputs, rendered));
      }
      weight = weight.to(options_.compute.dtype);
      const std::vector<at::Tensor>& x = inputs.For(format, scales);
      for (size_t n = 0; n < outputs.size(); ++n) {
        outputs[n].push_back(at::linear(
            x[n], weight, bias.defined() ? std::optional<at::Tensor>(bias) : std::nullopt));
      }
    }
    return {};
  }

  // Leaves the stored tensors in `rendered` and returns the decoded weight, float32 [out, in].
  Result<at::Tensor> RenderLinear(const LinearInfo& linear, const Format& format,
                                  const at::Tensor& weight, const SharedScales& scales,
                                  StageInputs& inputs, Rendered& rendered) {
    Json& report = rendered.report[linear.name];
    report["format"] = format.name();
    if (options_.mode == RenderMode::kRtn) {
      StoredTensors stored = format.Encode(weight, scales, linear.dtype);
      at::Tensor decoded = format.Decode(stored);
      rendered.tensors[linear.name] = std::move(stored);
      report["rendered"] = "rtn";
      return decoded;
    }
    HessianAccumulator train(linear.in), held_out(linear.in);
    Accumulate(linear, inputs.For(format, scales), train, held_out);
    const at::Tensor held_out_sum = held_out.tokens() > 0 ? held_out.Sum() : at::Tensor();
    PQ_ASSIGN_OR_RETURN(GptqResult result, RenderGuarded(format, weight, train.Sum(), held_out_sum,
                                                         scales, linear.dtype, options_.gptq));
    report["rendered"] = result.fell_back ? "rtn" : "gptq";
    if (held_out_sum.defined()) report["error_ratio"] = result.error_ratio;
    rendered.tensors[linear.name] = std::move(result.stored);
    return std::move(result.decoded);
  }

  void Accumulate(const LinearInfo& linear, const std::vector<at::Tensor>& x,
                  HessianAccumulator& train, HessianAccumulator& held_out) const {
    const auto weights = token_weights_.find(linear.name);
    const int64_t tokens = windows_.length();
    for (int64_t n = 0; n < windows_.count(); ++n) {
      const at::Tensor token_weights = weights == token_weights_.end()
                                           ? at::Tensor()
                                           : weights->second.narrow(0, n * tokens, tokens);
      HessianAccumulator& sum = n % kHeldOutEvery == kHeldOutEvery - 1 ? held_out : train;
      sum.Add(x[n].reshape({-1, linear.in}), token_weights);
    }
  }

  Status CommitLayer(int layer, const Rendered& rendered, const std::vector<LayerState>& states) {
    std::vector<at::Tensor> kept;
    std::vector<BlobTensor> blob;
    for (const auto& [linear, tensors] : rendered.tensors) {
      for (const auto& [suffix, tensor] : tensors) {
        kept.push_back(tensor.contiguous());
        blob.push_back({{fmt::format("{}.{}", linear, suffix), FromScalarType(tensor.scalar_type()),
                         tensor.sizes().vec()},
                        TensorBytes(kept.back())});
      }
    }
    PQ_RETURN_IF_ERROR(store_.PutBlob(LayerBlob(key_, layer), blob));
    if (layer + 1 < model_.config().num_layers) {
      std::vector<at::Tensor> hidden;
      hidden.reserve(states.size());
      for (const LayerState& state : states) hidden.push_back(state.hidden);
      const at::Tensor all = at::cat(hidden).contiguous();
      PQ_RETURN_IF_ERROR(store_.PutBlob(
          StateBlob(key_, layer + 1),
          {{{"hidden", FromScalarType(all.scalar_type()), all.sizes().vec()}, TensorBytes(all)}}));
    }
    PQ_RETURN_IF_ERROR(store_.PutNote(ReportNote(key_, layer), rendered.report.dump()));
    PQ_RETURN_IF_ERROR(store_.Commit(StageName(key_), layer));
    return store_.RemoveBlob(StateBlob(key_, layer));
  }

  const Model& model_;
  const TokenWindows& windows_;
  const FormatChoice& formats_;
  const RenderOptions& options_;
  const std::string& key_;
  RunStore& store_;
  SequenceContext context_;
  bool guided_ = false;
  std::map<std::string, at::Tensor> token_weights_;  // of the current layer, by Linear
};

}  // namespace

std::string RenderKey(const FormatChoice& formats, const RenderOptions& options) {
  Json json = {{"mode", options.mode == RenderMode::kGptq ? "gptq" : "rtn"},
               {"damping", options.gptq.damping},
               {"choose_scales", options.gptq.choose_scales},
               {"guided", options.guided},
               {"precision", at::toString(options.compute.dtype)}};
  for (const auto& [linear, format] : formats) json["formats"][linear] = format->name();
  return Sha256Hex(json.dump()).substr(0, 16);
}

Status RenderModel(const Model& model, const TokenWindows& windows, const FormatChoice& formats,
                   const RenderOptions& options, const std::string& key, RunStore& store) {
  return GuardTorch("render",
                    [&] { return Renderer(model, windows, formats, options, key, store).Run(); });
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

Status DropRendering(RunStore& store, const std::string& key) {
  PQ_RETURN_IF_ERROR(store.Forget(StageName(key)));
  return store.RemoveBlobs("render/" + key);
}

}  // namespace prismaquant

#include "model/decoder_layers.h"

#include <torch/torch.h>

#include <utility>

namespace prismaquant {
namespace {

constexpr int kMixerStages = 2;

class Skeleton : public DecoderLayer {
 public:
  Skeleton(LinearStages stages, SkeletonParts parts) : parts_(std::move(parts)) {
    stages_ = std::move(stages);
  }

  std::vector<at::Tensor> StageInputs(int s, const SequenceContext&,
                                      LayerState& state) const override {
    if (s == 0) {
      const at::Tensor x = Norm(state.hidden, parts_.norms.mixer_input);
      return std::vector<at::Tensor>(stage(0).size(), x);
    }
    if (s == 1) return {state.held.front()};
    if (s == kMixerStages) state.held = {Norm(state.hidden, parts_.norms.mlp_input)};
    return parts_.feed_forward->Inputs(s - kMixerStages, state);
  }

  void StageOutputs(int s, const SequenceContext& context, std::vector<at::Tensor> outputs,
                    LayerState& state) const override {
    if (s == 0) {
      state.held = {parts_.mixer->Mix(context, outputs)};
    } else if (s == 1) {
      Add(outputs[0], parts_.norms.mixer_output, state);
    } else {
      parts_.feed_forward->Outputs(s - kMixerStages, std::move(outputs), state);
      if (s + 1 == num_stages()) Add(state.held.front(), parts_.norms.mlp_output, state);
    }
  }

 private:
  at::Tensor Norm(const at::Tensor& x, const at::Tensor& weight) const {
    return weight.defined() ? ApplyNorm(parts_.variant.norm, x, weight, parts_.eps) : x;
  }
  void Add(const at::Tensor& y, const at::Tensor& norm, LayerState& state) const {
    state.hidden = state.hidden + Norm(y, norm);
    state.held.clear();
  }

  SkeletonParts parts_;
};

class MtpLayer : public DecoderLayer {
 public:
  MtpLayer(LinearStages stages, SkeletonParts parts)
      : skeleton_({stages.begin() + 1, stages.end()}, std::move(parts)) {
    stages_ = std::move(stages);
  }

  std::vector<at::Tensor> StageInputs(int s, const SequenceContext& context,
                                      LayerState& state) const override {
    if (s == 0) return {state.hidden};
    return skeleton_.StageInputs(s - 1, context, state);
  }
  void StageOutputs(int s, const SequenceContext& context, std::vector<at::Tensor> outputs,
                    LayerState& state) const override {
    if (s == 0) {
      state.hidden = outputs[0];
    } else {
      skeleton_.StageOutputs(s - 1, context, std::move(outputs), state);
    }
  }

 private:
  Skeleton skeleton_;
};

class HeadLayer : public DecoderLayer {
 public:
  HeadLayer(LinearStages stages, HeadNorm norm) : norm_(std::move(norm)) {
    stages_ = std::move(stages);
  }
  std::vector<at::Tensor> StageInputs(int, const SequenceContext&,
                                      LayerState& state) const override {
    return {norm_.Apply(state.hidden)};
  }
  void StageOutputs(int, const SequenceContext&, std::vector<at::Tensor> outputs,
                    LayerState& state) const override {
    state.hidden = outputs[0];
  }

 private:
  HeadNorm norm_;
};

class PlainHead : public OutputHead {
 public:
  PlainHead(HeadNorm norm, at::Tensor projection)
      : norm_(std::move(norm)), projection_(std::move(projection)) {}
  at::Tensor Norm(const at::Tensor& hidden) const override { return norm_.Apply(hidden); }
  at::Tensor Project(const at::Tensor& normed) const override {
    return at::linear(normed, projection_);
  }
  int64_t vocab_size() const override { return projection_.size(0); }

 private:
  HeadNorm norm_;
  at::Tensor projection_;
};

class LinearHead : public OutputHead {
 public:
  LinearHead(HeadNorm norm, LinearInfo linear, std::shared_ptr<LinearRunner> linears)
      : norm_(std::move(norm)), linear_(std::move(linear)), linears_(std::move(linears)) {}
  at::Tensor Norm(const at::Tensor& hidden) const override { return norm_.Apply(hidden); }
  at::Tensor Project(const at::Tensor& normed) const override {
    return linears_->Apply(linear_, normed);
  }
  int64_t vocab_size() const override { return linear_.out; }

 private:
  HeadNorm norm_;
  LinearInfo linear_;
  std::shared_ptr<LinearRunner> linears_;
};

}  // namespace

std::unique_ptr<DecoderLayer> MakeSkeleton(LinearStages stages, SkeletonParts parts) {
  return std::make_unique<Skeleton>(std::move(stages), std::move(parts));
}

std::unique_ptr<DecoderLayer> MakeMtpLayer(LinearStages stages, SkeletonParts parts) {
  return std::make_unique<MtpLayer>(std::move(stages), std::move(parts));
}

std::unique_ptr<DecoderLayer> MakeHeadLayer(LinearStages stages, HeadNorm norm) {
  return std::make_unique<HeadLayer>(std::move(stages), std::move(norm));
}

std::unique_ptr<OutputHead> MakeOutputHead(HeadNorm norm, at::Tensor projection) {
  return std::make_unique<PlainHead>(std::move(norm), std::move(projection));
}

std::unique_ptr<OutputHead> MakeOutputHead(HeadNorm norm, LinearInfo linear,
                                           std::shared_ptr<LinearRunner> linears) {
  return std::make_unique<LinearHead>(std::move(norm), std::move(linear), std::move(linears));
}

}  // namespace prismaquant

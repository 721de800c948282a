#include "model/feed_forward.h"

#include <torch/torch.h>

#include <utility>

#include "model/blocks.h"

namespace prismaquant {
namespace {

at::Tensor Activate(MlpActivation activation, const at::Tensor& gate) {
  return activation == MlpActivation::kSilu ? at::silu(gate) : at::gelu(gate, "tanh");
}

class GatedMlp : public FeedForward {
 public:
  explicit GatedMlp(MlpActivation activation) : activation_(activation) {}

  std::vector<at::Tensor> Inputs(int stage, const LayerState& state) const override {
    const at::Tensor& x = state.held.front();
    if (stage == 0) return {x, x};
    return {x};
  }
  void Outputs(int stage, std::vector<at::Tensor> outputs, LayerState& state) const override {
    state.held = {stage == 0 ? Activate(activation_, outputs[0]) * outputs[1] : outputs[0]};
  }

 private:
  MlpActivation activation_;
};

// What a mixture keeps in LayerState::held between its stages. An assignment is a (token, expert)
// pair; assignments are sorted by expert, and within an expert by token.
enum Held : size_t {
  kInput,        // x
  kWeights,      // of each assignment, [assignments, 1]
  kRows,         // its token, int64 [assignments]
  kCounts,       // assignments of each expert, int64 [experts], on the CPU
  kShared,       // the shared expert's activations, then its output; undefined without one
  kSharedGate,   // [sequences, tokens, 1]
  kFirstExpert,  // the experts' activations from here on, one tensor per expert
};

class Mixture : public FeedForward {
 public:
  Mixture(const MixtureConfig& config, MlpActivation activation)
      : config_(config), activation_(activation) {}

  std::vector<at::Tensor> Inputs(int stage, const LayerState& state) const override {
    const auto& held = state.held;
    if (stage == 0) return std::vector<at::Tensor>(shared() ? 4 : 1, held[kInput]);
    std::vector<at::Tensor> inputs;
    if (stage == 2) {
      inputs.assign(held.begin() + kFirstExpert, held.end());
      return inputs;
    }
    const at::Tensor tokens = held[kInput].flatten(0, -2).index_select(0, held[kRows]);
    for (const at::Tensor& of_expert : PerExpert(tokens, held[kCounts])) {
      inputs.insert(inputs.end(), 2, of_expert);
    }
    if (shared()) inputs.push_back(held[kShared]);
    return inputs;
  }

  void Outputs(int stage, std::vector<at::Tensor> outputs, LayerState& state) const override {
    if (stage == 0) {
      Route(std::move(outputs), state);
    } else if (stage == 1) {
      std::vector<at::Tensor> gate, up;
      for (size_t e = 0; e < static_cast<size_t>(config_.experts); ++e) {
        gate.push_back(outputs[2 * e]);
        up.push_back(outputs[2 * e + 1]);
      }
      const at::Tensor activated = Activate(activation_, at::cat(gate)) * at::cat(up);
      for (const at::Tensor& of_expert : PerExpert(activated, state.held[kCounts])) {
        state.held.push_back(of_expert);
      }
      if (shared()) state.held[kShared] = outputs.back();
    } else {
      Combine(outputs, state);
    }
  }

 private:
  bool shared() const { return config_.shared_size > 0; }

  static std::vector<at::Tensor> PerExpert(const at::Tensor& sorted, const at::Tensor& counts) {
    std::vector<int64_t> sizes(counts.const_data_ptr<int64_t>(),
                               counts.const_data_ptr<int64_t>() + counts.numel());
    return at::split_with_sizes(sorted, sizes);
  }

  void Route(std::vector<at::Tensor> outputs, LayerState& state) const {
    const at::Tensor x = state.held.front();
    const at::Tensor logits = outputs[0].flatten(0, -2);
    const at::Tensor p = at::softmax(logits.to(WideType(logits)), -1);
    auto [weights, experts] = at::topk(p, config_.experts_per_token, -1);
    if (config_.normalize) weights = weights / weights.sum(-1, /*keepdim=*/true);
    state.routing = experts;
    const at::Tensor order = at::argsort(experts.flatten(), /*stable=*/true, /*dim=*/0,
                                         /*descending=*/false);
    state.held = std::vector<at::Tensor>(kFirstExpert);
    state.held[kInput] = x;
    state.held[kWeights] =
        weights.to(x.scalar_type()).flatten().index_select(0, order).unsqueeze(-1);
    state.held[kRows] = at::div(order, config_.experts_per_token, "floor");
    state.held[kCounts] =
        at::bincount(experts.flatten(), /*weights=*/{}, config_.experts).to(at::kCPU);
    if (!shared()) return;
    state.held[kShared] = Activate(activation_, outputs[1]) * outputs[2];
    state.held[kSharedGate] = outputs[3].sigmoid();
  }

  void Combine(const std::vector<at::Tensor>& outputs, LayerState& state) const {
    const auto& held = state.held;
    const at::Tensor weighted = at::cat(outputs) * held[kWeights];
    at::Tensor y = at::zeros_like(held[kInput].flatten(0, -2)).index_add(0, held[kRows], weighted);
    y = y.view(held[kInput].sizes());
    if (shared()) y = y + held[kSharedGate] * held[kShared];
    state.held = {y};
  }

  MixtureConfig config_;
  MlpActivation activation_;
};

}  // namespace

std::unique_ptr<FeedForward> MakeGatedMlp(MlpActivation activation) {
  return std::make_unique<GatedMlp>(activation);
}

std::unique_ptr<FeedForward> MakeMixture(const MixtureConfig& config, MlpActivation activation) {
  return std::make_unique<Mixture>(config, activation);
}

}  // namespace prismaquant

#include "evaluate/drafts.h"

#include <torch/torch.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <utility>

#include "base/progress.h"
#include "evaluate/quantized_linears.h"

namespace prismaquant {
namespace {

// Positions of a window from which further drafts are made.
constexpr size_t kDraftedPositions = 16;
constexpr int64_t kBlockElements = 8'000'000;  // float32 logits held

SequenceContext Prefix(const SequenceContext& context, int64_t slots) {
  SequenceContext prefix;
  prefix.cos = context.cos.narrow(0, 0, slots);
  prefix.sin = context.sin.narrow(0, 0, slots);
  return prefix;
}

// The most likely token at each position, int64 [tokens], from normed [tokens, hidden_size].
at::Tensor MostLikely(const OutputHead& head, const at::Tensor& normed) {
  std::vector<at::Tensor> tokens;
  const int64_t block = std::clamp<int64_t>(kBlockElements / head.vocab_size(), 1, 512);
  for (int64_t first = 0; first < normed.size(0); first += block) {
    const int64_t count = std::min(block, normed.size(0) - first);
    tokens.push_back(head.Project(normed.narrow(0, first, count)).argmax(-1));
  }
  return at::cat(tokens);
}

class Drafter {
 public:
  Drafter(const Model& model, const Sequences& sequences, const ComputeOptions& compute)
      : model_(model), sequences_(sequences), compute_(compute) {}

  Status Load(const std::shared_ptr<LinearRunner>& projection) {
    const int layer = model_.FindPart(Part::kMtp)->first;
    PQ_ASSIGN_OR_RETURN(layer_, model_.LoadLayer(layer, compute_));
    PQ_ASSIGN_OR_RETURN(linears_, QuantizedLinears::Load(model_, layer, compute_));
    PQ_ASSIGN_OR_RETURN(body_head_, model_.LoadHead(Part::kText, compute_, projection));
    PQ_ASSIGN_OR_RETURN(head_, model_.LoadHead(Part::kMtp, compute_, projection));
    return {};
  }

  // hidden: the body's output [1, tokens, hidden_size] of window n with these ids.
  Status Judge(int64_t n, const std::vector<int32_t>& ids, const at::Tensor& hidden,
               DraftAcceptance& result) {
    const at::Tensor body = MostLikely(*body_head_, body_head_->Norm(hidden)[0]);
    PQ_ASSIGN_OR_RETURN(const at::Tensor inputs, sequences_.MtpInput(n, hidden));
    const SequenceContext& context = sequences_.Context(Part::kMtp, n);
    const at::Tensor normed = head_->Norm(RunLayer(*layer_, context, inputs, *linears_));
    const at::Tensor drafts = MostLikely(*head_, normed[0]);
    const auto slots = drafts.size(0);
    const at::Tensor accepted = drafts.eq(body.narrow(0, 1, slots));
    result.judged[0] += slots;
    result.accepted[0] += accepted.sum().item<int64_t>();
    for (const int64_t slot : Continued(drafts, ids)) {
      PQ_RETURN_IF_ERROR(DraftFurther(slot, ids, body, inputs, normed, drafts, context, result));
    }
    return {};
  }

 private:
  // Slots whose draft is the text's own token and that have a slot after them, evenly taken.
  static std::vector<int64_t> Continued(const at::Tensor& drafts, const std::vector<int32_t>& ids) {
    std::vector<int64_t> slots;
    for (int64_t i = 0; i + 1 < drafts.size(0); ++i) {
      if (drafts[i].item<int64_t>() == ids[static_cast<size_t>(i + 2)]) slots.push_back(i);
    }
    if (slots.size() <= kDraftedPositions) return slots;
    std::vector<int64_t> some;
    for (size_t k = 0; k < kDraftedPositions; ++k) {
      some.push_back(slots[k * slots.size() / kDraftedPositions]);
    }
    return some;
  }

  // Second and third drafts behind `slot`. Each is one more slot, which sees those of the text up
  // to `slot` and the drafts before it.
  Status DraftFurther(int64_t slot, const std::vector<int32_t>& ids, const at::Tensor& body,
                      const at::Tensor& inputs, const at::Tensor& normed, const at::Tensor& drafts,
                      const SequenceContext& context, DraftAcceptance& result) {
    at::Tensor rows = inputs.narrow(1, 0, slot + 1);
    at::Tensor state = normed.narrow(1, slot, 1);
    int64_t token = drafts[slot].item<int64_t>();
    for (int draft = 1; draft < kDrafts; ++draft) {
      const int64_t place = slot + draft;  // of the slot; it predicts the token at place + 2
      if (place >= context.cos.size(0) || token != ids[static_cast<size_t>(place + 1)]) return {};
      PQ_ASSIGN_OR_RETURN(const at::Tensor embedded,
                          model_.Embed(at::full({1, 1}, token, at::kLong), compute_));
      PQ_ASSIGN_OR_RETURN(const at::Tensor row, model_.MtpInput(embedded, state, compute_));
      rows = at::cat({rows, row}, 1);
      const at::Tensor y = RunLayer(*layer_, Prefix(context, rows.size(1)), rows, *linears_);
      state = head_->Norm(y.narrow(1, place, 1));
      token = MostLikely(*head_, state[0]).item<int64_t>();
      const auto index = static_cast<size_t>(draft);
      ++result.judged[index];
      if (token == body[place + 1].item<int64_t>()) ++result.accepted[index];
    }
    return {};
  }

  const Model& model_;
  const Sequences& sequences_;
  ComputeOptions compute_;
  std::unique_ptr<DecoderLayer> layer_;
  std::unique_ptr<QuantizedLinears> linears_;
  std::unique_ptr<OutputHead> body_head_, head_;
};

}  // namespace

double DraftAcceptance::rate(int draft) const {
  const auto index = static_cast<size_t>(draft);
  if (judged[index] == 0) return std::numeric_limits<double>::quiet_NaN();
  return static_cast<double>(accepted[index]) / static_cast<double>(judged[index]);
}

Result<DraftAcceptance> MeasureDrafts(const Model& model, const Calibration& data,
                                      const Sequences& sequences, const BodyOutputs& outputs,
                                      const std::shared_ptr<LinearRunner>& projection,
                                      const ComputeOptions& compute) {
  Drafter drafter(model, sequences, compute);
  PQ_RETURN_IF_ERROR(drafter.Load(projection));
  DraftAcceptance result;
  Progress progress("evaluate, drafts", data.text.count(), "windows");
  for (int64_t n = 0; n < data.text.count(); ++n) {
    PQ_RETURN_IF_ERROR(
        drafter.Judge(n, data.ids(n), outputs.hidden[static_cast<size_t>(n)], result));
    progress.Advance();
  }
  return result;
}

}  // namespace prismaquant

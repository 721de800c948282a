#include "evaluate/kl_meter.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <cmath>
#include <utility>

#include "evaluate/score.h"
#include "formats/torch_guard.h"

namespace prismaquant {
namespace {

Result<std::unique_ptr<OutputHead>> LoadStoredHead(const Model& model, const LayerLinears& linears,
                                                   const ComputeOptions& compute) {
  PQ_ASSIGN_OR_RETURN(const auto projection, LoadProjection(model, linears, compute));
  return model.LoadHead(Part::kText, compute, projection);
}

}  // namespace

Result<std::vector<at::Tensor>> KlMeter::Run(const Model& model, const LayerLinears& linears,
                                             const std::string& title, PassKeeper* keeper) const {
  const at::NoGradGuard no_grad;
  PQ_ASSIGN_OR_RETURN(const Sequences sequences, Sequences::Make(model, data_, compute_));
  PQ_ASSIGN_OR_RETURN(BodyOutputs body,
                      RunBody(model, linears, data_, sequences, compute_, title, keeper));
  return std::move(body.hidden);
}

Result<MeasuredKl> KlMeter::Compare(const Model& model, const LayerLinears& linears,
                                    const std::vector<at::Tensor>& hidden) const {
  const at::NoGradGuard no_grad;
  PQ_ASSIGN_OR_RETURN(const auto source_head,
                      LoadStoredHead(source_, StoredLinears(source_, compute_), compute_));
  PQ_ASSIGN_OR_RETURN(const auto head, LoadStoredHead(model, linears, compute_));
  Scores scores;
  for (int64_t n = 0; n < data_.text.count(); ++n) {
    const auto i = static_cast<size_t>(n);
    TokenLogProbs unused;
    scores.Add(ScoreSequence(*source_head, *head, source_hidden_[i][0], hidden[i][0], data_.ids(n),
                             1, unused));
  }
  if (!std::isfinite(scores.kl())) {
    return Status::InvalidInput(fmt::format("{}: the KL of a plan is not finite on held-out text",
                                            source_.checkpoint().folder().string()));
  }
  return MeasuredKl{.kl = scores.kl(), .kl_stderr = scores.kl_stderr()};
}

Result<std::unique_ptr<KlMeter>> KlMeter::Make(const Model& source, TokenWindows text,
                                               const ComputeOptions& compute, PassKeeper* keeper) {
  if (text.length() < 2) {
    return Status::InvalidInput(
        fmt::format("windows to measure on: {} of {} tokens, expected at least one of at least 2",
                    text.count(), text.length()));
  }
  std::unique_ptr<KlMeter> meter(new KlMeter(source, std::move(text), compute));
  PQ_RETURN_IF_ERROR(GuardTorch("measuring the source", [&]() -> Status {
    PQ_ASSIGN_OR_RETURN(meter->source_hidden_, meter->Run(source, StoredLinears(source, compute),
                                                          "validate, source", keeper));
    return {};
  }));
  return meter;
}

Result<MeasuredKl> KlMeter::Measure(const Model& model, const LayerLinears& linears,
                                    const std::string& title, PassKeeper* keeper) const {
  MeasuredKl measured;
  PQ_RETURN_IF_ERROR(GuardTorch("measuring", [&]() -> Status {
    PQ_ASSIGN_OR_RETURN(const std::vector<at::Tensor> hidden, Run(model, linears, title, keeper));
    PQ_ASSIGN_OR_RETURN(measured, Compare(model, linears, hidden));
    return {};
  }));
  return measured;
}

}  // namespace prismaquant

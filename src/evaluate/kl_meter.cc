#include "evaluate/kl_meter.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <utility>

#include "evaluate/score.h"
#include "formats/torch_guard.h"

namespace prismaquant {

Result<KlMeter::Outputs> KlMeter::Run(const Model& model, const LayerLinears& linears,
                                      const std::string& title) const {
  const at::NoGradGuard no_grad;
  PQ_ASSIGN_OR_RETURN(const Sequences sequences, Sequences::Make(model, data_, compute_));
  Outputs outputs;
  PQ_ASSIGN_OR_RETURN(BodyOutputs body, RunBody(model, linears, data_, sequences, compute_, title));
  outputs.hidden = std::move(body.hidden);
  PQ_ASSIGN_OR_RETURN(const auto projection, LoadProjection(model, linears, compute_));
  PQ_ASSIGN_OR_RETURN(outputs.head, model.LoadHead(Part::kText, compute_, projection));
  return outputs;
}

MeasuredKl KlMeter::Compare(const Outputs& outputs) const {
  const at::NoGradGuard no_grad;
  ScoreSums total;
  std::vector<double> means;
  for (int64_t n = 0; n < data_.text.count(); ++n) {
    const auto i = static_cast<size_t>(n);
    TokenLogProbs unused;
    const ScoreSums sums = ScoreSequence(*source_.head, *outputs.head, source_.hidden[i][0],
                                         outputs.hidden[i][0], data_.ids(n), 1, unused);
    means.push_back(sums.Mean(sums.kl));
    total.Add(sums);
  }
  return {.kl = total.Mean(total.kl), .kl_stderr = StandardError(means), .tokens = total.positions};
}

Result<std::unique_ptr<KlMeter>> KlMeter::Make(const Model& source, TokenWindows text,
                                               const ComputeOptions& compute) {
  if (text.length() < 2) {
    return Status::InvalidInput(
        fmt::format("windows to measure on: {} of {} tokens, expected at least one of at least 2",
                    text.count(), text.length()));
  }
  std::unique_ptr<KlMeter> meter(new KlMeter(std::move(text), compute));
  PQ_RETURN_IF_ERROR(GuardTorch("measuring the source", [&]() -> Status {
    PQ_ASSIGN_OR_RETURN(meter->source_,
                        meter->Run(source, StoredLinears(source, compute), "validate, source"));
    return {};
  }));
  return meter;
}

Result<MeasuredKl> KlMeter::Measure(const Model& model, const LayerLinears& linears,
                                    const std::string& title) const {
  MeasuredKl measured;
  PQ_RETURN_IF_ERROR(GuardTorch("measuring", [&]() -> Status {
    PQ_ASSIGN_OR_RETURN(const Outputs outputs, Run(model, linears, title));
    measured = Compare(outputs);
    return {};
  }));
  return measured;
}

}  // namespace prismaquant

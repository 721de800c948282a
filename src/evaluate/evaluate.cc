#include "evaluate/evaluate.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <cmath>
#include <memory>
#include <utility>

#include "base/progress.h"
#include "evaluate/forward.h"
#include "evaluate/score.h"
#include "formats/torch_guard.h"

namespace prismaquant {
namespace {

Status RequireComparable(const Model& source, const Model& quantized) {
  const auto refuse = [&](const char* what, int64_t expected, int64_t found) {
    return Status::InvalidInput(fmt::format("{}: {} is {}, expected {} as in {}",
                                            quantized.checkpoint().folder().string(), what, found,
                                            expected, source.checkpoint().folder().string()));
  };
  const ModelConfig& a = source.config();
  const ModelConfig& b = quantized.config();
  if (a.family != b.family) {
    return Status::InvalidInput(
        fmt::format("{}: the model is of the family {}, expected {} as in {}",
                    quantized.checkpoint().folder().string(), b.family, a.family,
                    source.checkpoint().folder().string()));
  }
  if (a.vocab_size != b.vocab_size) return refuse("vocab_size", a.vocab_size, b.vocab_size);
  if (a.hidden_size != b.hidden_size) return refuse("hidden_size", a.hidden_size, b.hidden_size);
  if (a.num_layers != b.num_layers) return refuse("num_hidden_layers", a.num_layers, b.num_layers);
  for (const auto& [part, name] :
       {std::pair(Part::kHead, "an lm_head"), std::pair(Part::kMtp, "an MTP head"),
        std::pair(Part::kVision, "a vision tower")}) {
    const bool expected = source.FindPart(part) != nullptr;
    if (expected == (quantized.FindPart(part) != nullptr)) continue;
    return Status::InvalidInput(fmt::format(
        "{}: has {}{}, unlike {}", quantized.checkpoint().folder().string(),
        expected ? "no part that is " : "", name, source.checkpoint().folder().string()));
  }
  const auto experts = [](const ModelConfig& config) {
    return config.mixture ? config.mixture->experts : 0;
  };
  if (experts(a) != experts(b)) return refuse("the number of experts", experts(a), experts(b));
  return {};
}

// Share of the experts of each token that are in both, mean over tokens and layers.
double RouterAgreement(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  double sum = 0;
  for (size_t layer = 0; layer < a.size(); ++layer) {
    const at::Tensor both = a[layer].unsqueeze(2).eq(b[layer].unsqueeze(1)).any(2);
    sum += both.to(at::kDouble).mean().item<double>();
  }
  return sum / static_cast<double>(a.size());
}

class Comparison {
 public:
  Comparison(const Model& source, const Model& quantized, const Calibration& data,
             const ComputeOptions& compute, const EvaluationKeepers& keepers)
      : source_(source), quantized_(quantized), data_(data), compute_(compute), keepers_(keepers) {}

  Result<Evaluation> Run() {
    const at::NoGradGuard no_grad;
    const LayerLinears source_linears = StoredLinears(source_, compute_);
    const LayerLinears linears = StoredLinears(quantized_, compute_);
    PQ_ASSIGN_OR_RETURN(const Sequences sequences, Sequences::Make(source_, data_, compute_));
    PQ_ASSIGN_OR_RETURN(const Sequences quantized_sequences,
                        Sequences::Make(quantized_, data_, compute_));
    PQ_ASSIGN_OR_RETURN(source_outputs_, RunBody(source_, source_linears, data_, sequences,
                                                 compute_, "evaluate, source", keepers_.source));
    PQ_ASSIGN_OR_RETURN(outputs_, RunBody(quantized_, linears, data_, quantized_sequences, compute_,
                                          "evaluate, quantized", keepers_.quantized));
    PQ_ASSIGN_OR_RETURN(const auto source_projection,
                        LoadProjection(source_, source_linears, compute_));
    PQ_ASSIGN_OR_RETURN(const auto projection, LoadProjection(quantized_, linears, compute_));
    PQ_ASSIGN_OR_RETURN(source_head_, source_.LoadHead(Part::kText, compute_, source_projection));
    PQ_ASSIGN_OR_RETURN(head_, quantized_.LoadHead(Part::kText, compute_, projection));
    ScoreTexts();
    if (!data_.captions.empty()) ScoreCaptions();
    if (source_.FindPart(Part::kMtp) != nullptr) {
      PQ_ASSIGN_OR_RETURN(
          result_.drafts_source,
          MeasureDrafts(source_, data_, sequences, source_outputs_, source_projection, compute_));
      PQ_ASSIGN_OR_RETURN(result_.drafts, MeasureDrafts(quantized_, data_, quantized_sequences,
                                                        outputs_, projection, compute_));
    }
    if (!outputs_.routing.empty()) {
      result_.router_agreement = RouterAgreement(source_outputs_.routing, outputs_.routing);
    }
    result_.bytes_source = source_.checkpoint().file_bytes();
    result_.bytes = quantized_.checkpoint().file_bytes();
    return std::move(result_);
  }

 private:
  ScoreSums Score(int64_t sequence, int64_t first_label, TokenLogProbs& log_probs) const {
    const auto n = static_cast<size_t>(sequence);
    return ScoreSequence(*source_head_, *head_, source_outputs_.hidden[n][0], outputs_.hidden[n][0],
                         data_.ids(sequence), first_label, log_probs);
  }

  void ScoreTexts() {
    Scores scores;
    Progress progress("evaluate, logits", data_.text.count(), "windows");
    for (int64_t n = 0; n < data_.text.count(); ++n) {
      TokenLogProbs& log_probs = result_.log_probs.emplace_back();
      log_probs.ids = data_.ids(n);
      scores.Add(Score(n, 1, log_probs));
      progress.Advance();
    }
    const ScoreSums& total = scores.total();
    result_.tokens = total.positions;
    result_.kl = scores.kl();
    result_.kl_stderr = scores.kl_stderr();
    result_.ppl_source = std::exp(total.Mean(total.nll_source));
    result_.ppl = std::exp(total.Mean(total.nll));
    result_.top1 = total.Share(total.agree);
  }

  void ScoreCaptions() {
    Scores scores;
    for (int64_t n = data_.text.count(); n < data_.count(); ++n) {
      TokenLogProbs unused;
      scores.Add(Score(n, data_.caption(n).first_label, unused));
    }
    const ScoreSums& total = scores.total();
    result_.captions = CaptionEvaluation{.images = static_cast<int64_t>(data_.captions.size()),
                                         .tokens = total.positions,
                                         .kl = scores.kl(),
                                         .kl_stderr = scores.kl_stderr(),
                                         .loss_source = total.Mean(total.nll_source),
                                         .loss = total.Mean(total.nll),
                                         .top1 = total.Share(total.agree),
                                         .accuracy_source = total.Share(total.right_source),
                                         .accuracy = total.Share(total.right)};
  }

  const Model& source_;
  const Model& quantized_;
  const Calibration& data_;
  ComputeOptions compute_;
  EvaluationKeepers keepers_;
  BodyOutputs source_outputs_, outputs_;
  std::unique_ptr<OutputHead> source_head_, head_;
  Evaluation result_;
};

Json AcceptanceToJson(const DraftAcceptance& drafts) {
  Json rates = Json::array();
  for (int draft = 0; draft < kDrafts; ++draft) {
    const double rate = drafts.rate(draft);
    rates.push_back(std::isnan(rate) ? Json() : Json(rate));
  }
  return rates;
}

}  // namespace

Json Evaluation::ToJson(double predicted_kl) const {
  Json json = {{"schema", 1},
               {"tokens", tokens},
               {"kl", kl},
               {"kl_stderr", kl_stderr},
               {"ppl_source", ppl_source},
               {"ppl", ppl},
               {"top1", top1},
               {"bytes_source", bytes_source},
               {"bytes", bytes},
               {"predicted_kl", nullptr}};
  if (predicted_kl >= 0) json["predicted_kl"] = predicted_kl;
  if (captions) {
    json["captions"] = {{"images", captions->images},
                        {"tokens", captions->tokens},
                        {"kl", captions->kl},
                        {"kl_stderr", captions->kl_stderr},
                        {"loss_source", captions->loss_source},
                        {"loss", captions->loss},
                        {"top1", captions->top1},
                        {"accuracy_source", captions->accuracy_source},
                        {"accuracy", captions->accuracy}};
  }
  if (drafts) {
    json["mtp"] = {{"judged", drafts->judged},
                   {"acceptance_source", AcceptanceToJson(*drafts_source)},
                   {"acceptance", AcceptanceToJson(*drafts)}};
  }
  if (router_agreement) json["router_agreement"] = *router_agreement;
  return json;
}

Result<Evaluation> Evaluate(const Model& source, const Model& quantized, const Calibration& data,
                            const ComputeOptions& compute, const EvaluationKeepers& keepers) {
  PQ_RETURN_IF_ERROR(RequireComparable(source, quantized));
  const TokenWindows& windows = data.text;
  if (windows.length() < 2) {
    return Status::InvalidInput(
        fmt::format("evaluation windows: {} of {} tokens, expected at least one of at least 2",
                    windows.count(), windows.length()));
  }
  Result<Evaluation> result = Status::System("evaluation did not run");
  PQ_RETURN_IF_ERROR(GuardTorch("evaluate", [&] {
    result = Comparison(source, quantized, data, compute, keepers).Run();
    return result.status();
  }));
  return result;
}

}  // namespace prismaquant

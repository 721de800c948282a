#include "evaluate/evaluate.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>

#include "base/progress.h"
#include "evaluate/quantized_linears.h"
#include "formats/torch_guard.h"

namespace prismaquant {
namespace {

constexpr int64_t kBlockElements = 8'000'000;  // float32 logits held per model

at::Tensor WindowIds(const std::vector<int32_t>& window) {
  return at::tensor(std::vector<int64_t>(window.begin(), window.end()));
}

// The last layer's output [windows, tokens, hidden_size].
Result<at::Tensor> ForwardHidden(const Model& model, const TokenWindows& windows,
                                 const ComputeOptions& compute, const std::string& title) {
  const auto layers = static_cast<int>(model.config().num_layers);
  std::vector<at::Tensor> hidden;
  for (const auto& window : windows.windows) {
    PQ_ASSIGN_OR_RETURN(at::Tensor embedded, model.Embed(WindowIds(window).unsqueeze(0), compute));
    hidden.push_back(std::move(embedded));
  }
  const SequenceContext context = model.Context(windows.length(), compute);
  Progress progress(title, layers, "layers");
  for (int layer = 0; layer < layers; ++layer) {
    PQ_ASSIGN_OR_RETURN(const auto block, model.LoadLayer(layer, compute));
    PQ_ASSIGN_OR_RETURN(const auto linears, QuantizedLinears::Load(model, layer, compute));
    model.checkpoint().WillNeed(model.LayerTensors(layer + 1));
    for (at::Tensor& h : hidden) h = RunLayer(*block, context, h, *linears);
    progress.Advance();
  }
  return at::cat(hidden);
}

// Sums over the scored positions of one window.
struct WindowSums {
  double kl = 0, nll_source = 0, nll = 0;
  int64_t agree = 0, positions = 0;
};

at::Tensor LogProbs(const OutputHead& head, const at::Tensor& hidden) {
  return at::log_softmax(head.Logits(hidden).to(at::kFloat), -1);
}

WindowSums ScoreWindow(const OutputHead& source_head, const OutputHead& head,
                       const at::Tensor& source_hidden, const at::Tensor& hidden,
                       const std::vector<int32_t>& window, TokenLogProbs& log_probs) {
  WindowSums sums;
  const at::Tensor next =
      WindowIds(window).narrow(0, 1, static_cast<int64_t>(window.size()) - 1).unsqueeze(1);
  const int64_t positions = next.size(0);
  const int64_t block = std::clamp<int64_t>(kBlockElements / head.vocab_size(), 1, 512);
  for (int64_t first = 0; first < positions; first += block) {
    const int64_t count = std::min(block, positions - first);
    const at::Tensor p = LogProbs(source_head, source_hidden.narrow(0, first, count));
    const at::Tensor q = LogProbs(head, hidden.narrow(0, first, count));
    const at::Tensor label = next.narrow(0, first, count);
    sums.kl += (p.exp() * (p - q)).sum(-1).sum(at::kDouble).item<double>();
    const at::Tensor token_p = p.gather(1, label).squeeze(1).to(at::kDouble);
    const at::Tensor token_q = q.gather(1, label).squeeze(1).to(at::kDouble);
    sums.nll_source -= token_p.sum().item<double>();
    sums.nll -= token_q.sum().item<double>();
    sums.agree += p.argmax(-1).eq(q.argmax(-1)).sum().item<int64_t>();
    log_probs.source.insert(log_probs.source.end(), token_p.data_ptr<double>(),
                            token_p.data_ptr<double>() + count);
    log_probs.quantized.insert(log_probs.quantized.end(), token_q.data_ptr<double>(),
                               token_q.data_ptr<double>() + count);
  }
  sums.positions = positions;
  return sums;
}

double StandardError(const std::vector<double>& means) {
  if (means.size() < 2) return 0;
  const auto n = static_cast<double>(means.size());
  const double mean = std::accumulate(means.begin(), means.end(), 0.0) / n;
  double squares = 0;
  for (const double m : means) squares += (m - mean) * (m - mean);
  return std::sqrt(squares / (n - 1) / n);
}

Status RequireComparable(const Model& source, const Model& quantized) {
  const auto refuse = [&](const char* what, int64_t expected, int64_t found) {
    return Status::InvalidInput(fmt::format("{}: {} is {}, expected {} as in {}",
                                            quantized.checkpoint().folder().string(), what, found,
                                            expected, source.checkpoint().folder().string()));
  };
  const ModelConfig& a = source.config();
  const ModelConfig& b = quantized.config();
  if (a.model_type != b.model_type) {
    return Status::InvalidInput(
        fmt::format("{}: the model is of the family {}, expected {} as in {}",
                    quantized.checkpoint().folder().string(), b.model_type, a.model_type,
                    source.checkpoint().folder().string()));
  }
  if (a.vocab_size != b.vocab_size) return refuse("vocab_size", a.vocab_size, b.vocab_size);
  if (a.hidden_size != b.hidden_size) return refuse("hidden_size", a.hidden_size, b.hidden_size);
  if (a.num_layers != b.num_layers) return refuse("num_hidden_layers", a.num_layers, b.num_layers);
  return {};
}

Result<Evaluation> Measure(const Model& source, const Model& quantized, const TokenWindows& windows,
                           const ComputeOptions& compute) {
  const at::NoGradGuard no_grad;
  PQ_ASSIGN_OR_RETURN(const at::Tensor source_hidden,
                      ForwardHidden(source, windows, compute, "evaluate, source"));
  PQ_ASSIGN_OR_RETURN(const at::Tensor hidden,
                      ForwardHidden(quantized, windows, compute, "evaluate, quantized"));
  PQ_ASSIGN_OR_RETURN(const auto source_head, source.LoadHead(compute));
  PQ_ASSIGN_OR_RETURN(const auto head, quantized.LoadHead(compute));

  Evaluation result;
  WindowSums total;
  std::vector<double> means;
  Progress progress("evaluate, logits", windows.count(), "windows");
  for (int64_t n = 0; n < windows.count(); ++n) {
    TokenLogProbs& log_probs = result.log_probs.emplace_back();
    log_probs.ids = windows.windows[n];
    const WindowSums sums = ScoreWindow(*source_head, *head, source_hidden[n], hidden[n],
                                        windows.windows[n], log_probs);
    means.push_back(sums.kl / static_cast<double>(sums.positions));
    total.kl += sums.kl;
    total.nll_source += sums.nll_source;
    total.nll += sums.nll;
    total.agree += sums.agree;
    total.positions += sums.positions;
    progress.Advance();
  }
  const auto positions = static_cast<double>(total.positions);
  result.tokens = total.positions;
  result.kl = total.kl / positions;
  result.kl_stderr = StandardError(means);
  result.ppl_source = std::exp(total.nll_source / positions);
  result.ppl = std::exp(total.nll / positions);
  result.top1 = static_cast<double>(total.agree) / positions;
  result.bytes_source = source.checkpoint().file_bytes();
  result.bytes = quantized.checkpoint().file_bytes();
  return result;
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
  return json;
}

Result<Evaluation> Evaluate(const Model& source, const Model& quantized,
                            const TokenWindows& windows, const ComputeOptions& compute) {
  PQ_RETURN_IF_ERROR(RequireComparable(source, quantized));
  if (windows.length() < 2) {
    return Status::InvalidInput(
        fmt::format("evaluation windows: {} of {} tokens, expected at least one of at least 2",
                    windows.count(), windows.length()));
  }
  Result<Evaluation> result = Status::System("evaluation did not run");
  PQ_RETURN_IF_ERROR(GuardTorch("evaluate", [&] {
    result = Measure(source, quantized, windows, compute);
    return result.status();
  }));
  return result;
}

}  // namespace prismaquant

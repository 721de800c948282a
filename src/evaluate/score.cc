#include "evaluate/score.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <numeric>

namespace prismaquant {
namespace {

constexpr int64_t kBlockElements = 8'000'000;  // float32 logits held per model

at::Tensor WindowIds(const std::vector<int32_t>& window) {
  return at::tensor(std::vector<int64_t>(window.begin(), window.end()));
}

at::Tensor LogProbs(const OutputHead& head, const at::Tensor& hidden) {
  return at::log_softmax(head.Logits(hidden).to(at::kFloat), -1);
}

}  // namespace

ScoreSums ScoreSequence(const OutputHead& source_head, const OutputHead& head,
                        const at::Tensor& source_hidden, const at::Tensor& hidden,
                        const std::vector<int32_t>& ids, int64_t first_label,
                        TokenLogProbs& log_probs) {
  ScoreSums sums;
  const at::Tensor next = WindowIds(ids).unsqueeze(1);
  const auto end = static_cast<int64_t>(ids.size()) - 1;
  const int64_t block = std::clamp<int64_t>(kBlockElements / head.vocab_size(), 1, 512);
  for (int64_t first = first_label - 1; first < end; first += block) {
    const int64_t count = std::min(block, end - first);
    const at::Tensor p = LogProbs(source_head, source_hidden.narrow(0, first, count));
    const at::Tensor q = LogProbs(head, hidden.narrow(0, first, count));
    const at::Tensor label = next.narrow(0, first + 1, count);
    sums.kl += (p.exp() * (p - q)).sum(-1).sum(at::kDouble).item<double>();
    const at::Tensor token_p = p.gather(1, label).squeeze(1).to(at::kDouble);
    const at::Tensor token_q = q.gather(1, label).squeeze(1).to(at::kDouble);
    sums.nll_source -= token_p.sum().item<double>();
    sums.nll -= token_q.sum().item<double>();
    const at::Tensor best_p = p.argmax(-1), best_q = q.argmax(-1), right = label.squeeze(1);
    sums.agree += best_p.eq(best_q).sum().item<int64_t>();
    sums.right_source += best_p.eq(right).sum().item<int64_t>();
    sums.right += best_q.eq(right).sum().item<int64_t>();
    log_probs.source.insert(log_probs.source.end(), token_p.data_ptr<double>(),
                            token_p.data_ptr<double>() + count);
    log_probs.quantized.insert(log_probs.quantized.end(), token_q.data_ptr<double>(),
                               token_q.data_ptr<double>() + count);
  }
  sums.positions = end - first_label + 1;
  return sums;
}

void Scores::Add(const ScoreSums& sums) {
  total_.kl += sums.kl;
  total_.nll_source += sums.nll_source;
  total_.nll += sums.nll;
  total_.agree += sums.agree;
  total_.right_source += sums.right_source;
  total_.right += sums.right;
  total_.positions += sums.positions;
  means_.push_back(sums.Mean(sums.kl));
}

double Scores::kl_stderr() const {
  if (means_.size() < 2) return 0;
  const auto n = static_cast<double>(means_.size());
  const double mean = std::accumulate(means_.begin(), means_.end(), 0.0) / n;
  double squares = 0;
  for (const double m : means_) squares += (m - mean) * (m - mean);
  return std::sqrt(squares / (n - 1) / n);
}

}  // namespace prismaquant

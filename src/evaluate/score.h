#ifndef PRISMAQUANT_EVALUATE_SCORE_H_
#define PRISMAQUANT_EVALUATE_SCORE_H_

// How far one model's predictions on a sequence are from another's. Logits exist for a block of
// tokens, in float32.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "evaluate/evaluate.h"
#include "model/model.h"

namespace prismaquant {

// Sums over scored positions: nats, and positions where the most likely token is the same, or the
// text's.
struct ScoreSums {
  double kl = 0, nll_source = 0, nll = 0;
  int64_t agree = 0, right_source = 0, right = 0, positions = 0;

  double Mean(double sum) const { return sum / static_cast<double>(positions); }
  double Share(int64_t count) const { return Mean(static_cast<double>(count)); }
};

// Scores the predictions of ids[first_label ..] from hidden states [tokens, hidden_size].
ScoreSums ScoreSequence(const OutputHead& source_head, const OutputHead& head,
                        const at::Tensor& source_hidden, const at::Tensor& hidden,
                        const std::vector<int32_t>& ids, int64_t first_label,
                        TokenLogProbs& log_probs);

// Over several sequences.
class Scores {
 public:
  void Add(const ScoreSums& sums);
  const ScoreSums& total() const { return total_; }
  // Nats per position, and its standard error over the sequences' means; 0 for fewer than two.
  double kl() const { return total_.Mean(total_.kl); }
  double kl_stderr() const;

 private:
  ScoreSums total_;
  std::vector<double> means_;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_EVALUATE_SCORE_H_

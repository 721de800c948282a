#ifndef PRISMAQUANT_EVALUATE_KL_METER_H_
#define PRISMAQUANT_EVALUATE_KL_METER_H_

// KlMeter: the KL of several candidates from one source on one text. The source runs once; its
// hidden states stay in memory, [tokens, hidden_size] per window. One thread.

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "data/calibration.h"
#include "evaluate/forward.h"
#include "model/model.h"

namespace prismaquant {

// KL(source || candidate), nats per token; the standard error is that over the windows' means.
struct MeasuredKl {
  double kl = 0, kl_stderr = 0;
};

class KlMeter {
 public:
  // `source` must outlive the meter; `keeper`, if not null, keeps its pass. kInvalidInput if the
  // windows have fewer than two tokens.
  static Result<std::unique_ptr<KlMeter>> Make(const Model& source, TokenWindows text,
                                               const ComputeOptions& compute,
                                               PassKeeper* keeper = nullptr);
  // Of `model`, which differs from the source by its weights alone, with its Linears multiplied so.
  // `title` heads the progress; `keeper` as above. kInvalidInput if its logits are not finite.
  Result<MeasuredKl> Measure(const Model& model, const LayerLinears& linears,
                             const std::string& title, PassKeeper* keeper = nullptr) const;

 private:
  KlMeter(const Model& source, TokenWindows text, const ComputeOptions& compute)
      : source_(source), compute_(compute) {
    data_.text = std::move(text);
  }
  // Hidden states before the final norm, per window.
  Result<std::vector<at::Tensor>> Run(const Model& model, const LayerLinears& linears,
                                      const std::string& title, PassKeeper* keeper) const;
  Result<MeasuredKl> Compare(const Model& model, const LayerLinears& linears,
                             const std::vector<at::Tensor>& hidden) const;

  const Model& source_;
  Calibration data_;
  ComputeOptions compute_;
  std::vector<at::Tensor> source_hidden_;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_EVALUATE_KL_METER_H_

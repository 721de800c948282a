#ifndef PRISMAQUANT_RENDER_STAGE_INPUTS_H_
#define PRISMAQUANT_RENDER_STAGE_INPUTS_H_

// StageInputs: what the Linears of one stage read, for all sequences. Linears that read the same
// tensors share one InputSet, so that their quantized inputs are made once. One thread.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "formats/format.h"
#include "model/model.h"

namespace prismaquant {

// One input per sequence, each [.., in].
class InputSet {
 public:
  explicit InputSet(std::vector<at::Tensor> inputs);
  double amax() const { return amax_; }  // largest |x|; 0 if there are no tokens
  int64_t tokens() const { return tokens_; }
  // As the format's product sees them. Made at the first call for a format; `scales` are any
  // reader's, since their input_amax is one.
  const std::vector<at::Tensor>& For(const Format& format, const SharedScales& scales);
  bool IsSame(const std::vector<at::Tensor>& inputs) const;

 private:
  std::vector<at::Tensor> inputs_;
  double amax_ = 0;
  int64_t tokens_ = 0;
  std::map<const Format*, std::vector<at::Tensor>> quantized_;
};

class StageInputs {
 public:
  // `inputs`: per sequence, per Linear of the stage.
  StageInputs(const std::vector<LinearInfo>& stage,
              const std::vector<std::vector<at::Tensor>>& inputs);
  InputSet& of(size_t linear) { return *sets_[linear]; }
  // The largest |x| that a Linear of this input group reads.
  double GroupMaximum(const std::string& input_group) const { return maxima_.at(input_group); }

 private:
  std::vector<std::shared_ptr<InputSet>> sets_;  // per Linear
  std::map<std::string, double> maxima_;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_RENDER_STAGE_INPUTS_H_

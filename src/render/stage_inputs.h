#ifndef PRISMAQUANT_RENDER_STAGE_INPUTS_H_
#define PRISMAQUANT_RENDER_STAGE_INPUTS_H_

// StageInputs: what the Linears of one stage read, for all sequences. Linears that read the same
// tensors share one InputSet, so that their quantized inputs are made once. One thread.
//
// An input_global_scale made for the largest input of the calibration clips what is larger in use,
// which costs much, while one for a few times that loses nothing unless inputs are so far apart
// that the group scales of the small ones run out of exponents (docs/rendering.md). So the largest
// headroom that the inputs themselves allow is taken.

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
  // Every `step`-th token of each sequence, [tokens, in]; none of a sequence without any.
  std::vector<at::Tensor> EveryNth(int64_t step) const;
  bool IsSame(const std::vector<at::Tensor>& inputs) const;

 private:
  std::vector<at::Tensor> inputs_;
  double amax_ = 0;
  int64_t tokens_ = 0;
  std::map<const Format*, std::vector<at::Tensor>> quantized_;
};

// How far above the calibration's largest input a scale may reach, at most: a power of two, by
// which group scales of E4M3 keep their mantissa.
inline constexpr double kLargestHeadroom = 4;

class StageInputs {
 public:
  // `inputs`: per sequence, per Linear of the stage.
  StageInputs(const std::vector<LinearInfo>& stage,
              const std::vector<std::vector<at::Tensor>>& inputs);
  InputSet& of(size_t linear) { return *sets_[linear]; }
  // input_amax of the Linears of this input group in a format: the largest |x| that one of them
  // reads, times a power of two up to kLargestHeadroom if the format has an input_global_scale. 0
  // if there are no tokens.
  double GroupRange(const std::string& input_group, const Format& format);

 private:
  struct Group {
    std::vector<const InputSet*> sets;
    double amax = 0;
    std::map<const Format*, double> ranges;
    // Some thousand tokens, spread over all.
    std::vector<at::Tensor> Sample() const;
  };
  std::vector<std::shared_ptr<InputSet>> sets_;  // per Linear
  std::map<std::string, Group> groups_;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_RENDER_STAGE_INPUTS_H_

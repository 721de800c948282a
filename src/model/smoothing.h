#ifndef PRISMAQUANT_MODEL_SMOOTHING_H_
#define PRISMAQUANT_MODEL_SMOOTHING_H_

// Smoothing: the input channels of Linears brought nearer to one size, so that less is lost where
// a group of them shares a scale (Xiao et al., SmoothQuant, 2023). A channel is divided by a factor
// where it is made, by a norm or by the rows of the Linear before, and the columns of the Linears
// that read it are multiplied by it: the model's function stays.
//
// Factors are powers of two, so that no bit of a weight is lost (in F16 those of the very small
// are). Only of a norm that multiplies by 1 + w can w not be divided exactly: its rounded value is
// stored, and the columns take the factor that it has then, rounded to their own dtype.
//
// Immutable and thread-safe.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/json.h"
#include "base/status.h"
#include "io/checkpoint.h"

namespace prismaquant {

class Model;
struct LinearInfo;

// Channels that can be scaled.
struct SmoothingSite {
  // Tensors of the norm that makes them, which multiplies by 1 + w if `plus_one`.
  std::vector<std::string> norm = {};
  bool plus_one = false;
  // If no norm does: the Linear that makes them by its rows [row, row + channels) of `rows`.
  std::string producer = {};
  int64_t rows = 0, row = 0;
  int64_t channels = 0;
  std::vector<std::string> readers = {};  // Linears; the first sees every token
  // int64 [in]: which of the channels each input of a reader is; undefined: input i is channel i.
  at::Tensor channel_of = {};

  // The norm's first tensor or the producer: no two sites share it.
  const std::string& key() const { return norm.empty() ? producer : norm.front(); }
};

// The base-2 logarithms of the factors by site, within +-kLargestSmoothingExponent.
using SmoothingExponents = std::map<std::string, std::vector<int8_t>>;
inline constexpr int kLargestSmoothingExponent = 6;

// A letter per channel, "g" standing for 0.
Json SmoothingToJson(const SmoothingExponents& exponents);
// kInvalidInput, naming `origin`, if it is not of that form.
Result<SmoothingExponents> ParseSmoothing(const Json& json, const std::string& origin);

// Half the logarithm of each channel's root mean square relative to the median channel's, rounded.
// Channels that are always zero keep the factor 1. mean_square [channels].
std::vector<int8_t> ChooseExponents(const at::Tensor& mean_square);

class Smoothing {
 public:
  // kInvalidInput if the model has no such site, or one of other width, or a norm overflows.
  static Result<std::shared_ptr<const Smoothing>> Make(const Model& model,
                                                       SmoothingExponents exponents);

  const SmoothingExponents& exponents() const { return exponents_; }
  // Of a weight [out, in] and bias [out] as stored, in the same dtype. What overflows it becomes
  // infinite.
  at::Tensor Weight(const std::string& linear, const at::Tensor& stored) const;
  at::Tensor Bias(const std::string& linear, const at::Tensor& stored) const;
  // Null if the tensor is no part of a smoothed norm.
  const at::Tensor* Parameter(const std::string& tensor) const;
  // Whether a tensor of the source is another one when smoothed.
  bool Changes(const std::string& tensor) const { return changed_.count(tensor) > 0; }
  // Of a tensor that it changes: the Linears that it belongs to, as indices of the model's.
  const std::vector<size_t>& Owners(const std::string& tensor) const { return changed_.at(tensor); }

 private:
  Status Add(const Checkpoint& checkpoint, const SmoothingSite& site,
             const std::vector<int8_t>& exponents);

  SmoothingExponents exponents_;
  std::map<std::string, at::Tensor> columns_, rows_;  // by Linear, float32 [in] and [out]
  std::map<std::string, at::Tensor> parameters_;
  std::map<std::string, std::vector<size_t>> changed_;
};

// A parameter of a checkpoint, smoothed unless `smoothing` is null; a copy, checked finite.
Result<at::Tensor> LoadSmoothed(const Checkpoint& checkpoint, const Smoothing* smoothing,
                                const std::string& tensor, at::ScalarType dtype, at::Device device);

}  // namespace prismaquant

#endif  // PRISMAQUANT_MODEL_SMOOTHING_H_

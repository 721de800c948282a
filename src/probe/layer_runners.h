#ifndef PRISMAQUANT_PROBE_LAYER_RUNNERS_H_
#define PRISMAQUANT_PROBE_LAYER_RUNNERS_H_

// How the probe multiplies the Linears of one layer: in the forward pass remembering the largest
// input of each, in the backward pass feeding the statistics of each. One thread.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "base/status.h"
#include "formats/format.h"
#include "model/model.h"
#include "probe/linear_probe.h"
#include "probe/statistics.h"

namespace prismaquant {

// Weights and biases of one layer, by Linear name; biases undefined where there are none.
struct LayerWeights {
  std::map<std::string, at::Tensor> stored;        // as the source stores them, mapped
  std::map<std::string, at::Tensor> weight, bias;  // in the compute dtype

  static Result<LayerWeights> Load(const Model& model, int layer, const ComputeOptions& compute);
};

// What is to be priced, by Linear name.
using LayerErrors = std::map<std::string, std::vector<WeightErrors>>;

// x W^T (+ b) of one of the layer's Linears.
at::Tensor Multiply(const LayerWeights& weights, const std::string& linear, const at::Tensor& x);

class MaximaRunner : public LinearRunner {
 public:
  explicit MaximaRunner(const LayerWeights& weights) : weights_(weights) {}
  at::Tensor Apply(const LinearInfo& linear, const at::Tensor& x) override;
  // Largest |x|; 0 for a Linear that no token reached.
  double maximum(const std::string& linear) const;

 private:
  const LayerWeights& weights_;
  std::map<std::string, double> maxima_;
};

// For the gradients of a layer alone: of a Linear that ends the layer it leaves the product out.
class ProbedRunner : public LinearRunner, public LinearObserver {
 public:
  // `scales` and `errors` by Linear name. Of errors to come the rows are kept for PriceKept.
  ProbedRunner(const LayerWeights& weights, std::vector<LinearInfo> linears,
               const std::map<std::string, SharedScales>& scales, LayerErrors errors,
               int64_t sequences);

  // What is observed from now on belongs to this sequence.
  void BeginSequence(int64_t sequence) { sequence_ = sequence; }
  at::Tensor Apply(const LinearInfo& linear, const at::Tensor& x) override;
  void Observe(int id, const at::Tensor& x, const at::Tensor& g, const at::Tensor& dx) override;

  // After the last sequence: Linear after Linear, what its errors, made by `errors_of`, cost.
  void PriceKept(const std::function<std::vector<WeightErrors>(const LinearInfo&)>& errors_of);

  const std::vector<LinearInfo>& linears() const { return linears_; }
  // In the order of `linears`.
  const std::vector<LinearStatistics>& statistics() const { return statistics_; }

 private:
  const LayerWeights& weights_;
  std::vector<LinearInfo> linears_;
  std::map<std::string, int> index_;
  std::vector<LinearStatistics> statistics_;
  std::map<int, std::vector<SequenceRows>> kept_;  // by id
  StatisticsBuffers buffers_;
  int64_t sequence_ = 0;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_PROBE_LAYER_RUNNERS_H_

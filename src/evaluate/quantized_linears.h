#ifndef PRISMAQUANT_EVALUATE_QUANTIZED_LINEARS_H_
#define PRISMAQUANT_EVALUATE_QUANTIZED_LINEARS_H_

// QuantizedLinears: multiplies the Linears of one layer as their stored tensors say: weights
// decoded from the bytes, activations quantized by the format found there. The tensors are a
// checkpoint's, of which a plain one is the case that every Linear is in the source format, or such
// as are yet to be written. One thread.

#include <ATen/core/Tensor.h>

#include <functional>
#include <map>
#include <memory>
#include <string>

#include "base/status.h"
#include "formats/format.h"
#include "io/checkpoint.h"
#include "model/model.h"

namespace prismaquant {

// The stored tensors of a Linear (bias left out), and the format they are in.
struct LinearTensors {
  const Format* format = nullptr;
  StoredTensors tensors;
};

class QuantizedLinears : public LinearRunner {
 public:
  using TensorsOf = std::function<Result<LinearTensors>(const LinearInfo&)>;
  // Decodes all Linears of `layer` of `model`; biases are the model's.
  static Result<std::unique_ptr<QuantizedLinears>> Load(const Model& model, int layer,
                                                        const ComputeOptions& compute,
                                                        const TensorsOf& tensors_of);
  // As the model's checkpoint stores them.
  static Result<std::unique_ptr<QuantizedLinears>> Load(const Model& model, int layer,
                                                        const ComputeOptions& compute);
  at::Tensor Apply(const LinearInfo& linear, const at::Tensor& x) override;

 private:
  struct Entry {
    const Format* format = nullptr;
    StoredTensors stored;  // without the weight's codes
    at::Tensor weight, bias;
  };
  std::map<std::string, Entry> entries_;
  // The last quantized input, since siblings share it.
  const Format* last_format_ = nullptr;
  at::Tensor last_input_, last_scale_, last_quantized_;
};

// The tensors "<linear>.*" of a checkpoint, mapped without copying. kInvalidInput if they fit no
// format.
Result<LinearTensors> FindLinearTensors(const Checkpoint& checkpoint, const LinearInfo& linear);

}  // namespace prismaquant

#endif  // PRISMAQUANT_EVALUATE_QUANTIZED_LINEARS_H_

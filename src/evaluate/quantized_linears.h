#ifndef PRISMAQUANT_EVALUATE_QUANTIZED_LINEARS_H_
#define PRISMAQUANT_EVALUATE_QUANTIZED_LINEARS_H_

// QuantizedLinears: multiplies the Linears of one layer of any checkpoint as the checkpoint says:
// weights decoded from the stored bytes, activations quantized by the format found there. A plain
// checkpoint is the case in which every Linear is in the source format. One thread.

#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <string>

#include "base/status.h"
#include "formats/format.h"
#include "io/checkpoint.h"
#include "model/model.h"

namespace prismaquant {

class QuantizedLinears : public LinearRunner {
 public:
  // Reads and decodes all Linears of `layer` of `model`.
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

// The stored tensors "<linear>.*" of a checkpoint that belong to a format (bias left out), mapped
// without copying, and the format they are in. kInvalidInput if none fits.
struct LinearTensors {
  const Format* format = nullptr;
  StoredTensors tensors;
};
Result<LinearTensors> FindLinearTensors(const Checkpoint& checkpoint, const LinearInfo& linear);

}  // namespace prismaquant

#endif  // PRISMAQUANT_EVALUATE_QUANTIZED_LINEARS_H_

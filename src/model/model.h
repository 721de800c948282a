#ifndef PRISMAQUANT_MODEL_MODEL_H_
#define PRISMAQUANT_MODEL_MODEL_H_

// Model: the text body of a checkpoint, run one decoder layer at a time. A Model knows the
// inventory (every Linear with its layer, stage and fused unit) but holds no weights; LoadLayer and
// LoadHead read the weights of one layer or of the head, and dropping the returned object frees
// them.
//
// A DecoderLayer is a sequence of stages. A stage is the set of Linears that share one input;
// between stages lies everything that is not a Linear (norms, attention, Gated DeltaNet, activation
// functions). The caller multiplies, so that probing, rendering and evaluating put their own Linear
// in place without the model knowing. All operations of a layer are differentiable by libtorch's
// autograd.
//
// Thread compatibility: const methods may run concurrently.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "io/checkpoint.h"
#include "model/config.h"
#include "model/profile.h"

namespace prismaquant {

struct LinearInfo {
  std::string name;  // module name as the checkpoint spells it, without ".weight"
  int64_t out = 0, in = 0;
  DType dtype = DType::kBF16;  // of the stored weight
  int layer = 0, stage = 0;
  bool has_bias = false;
  std::string unit;         // name of the fused set it belongs to; its own name if it is alone
  bool allocatable = true;  // false: the profile keeps it in the source's dtype
};

// What a layer needs to know of the positions of a batch of sequences.
struct SequenceContext {
  at::Tensor cos, sin;  // [tokens, rotary_dim], in the compute dtype
  // Of sliding layers with angles of their own, else undefined.
  at::Tensor local_cos, local_sin;
};

// A batch of sequences on its way through one layer.
struct LayerState {
  at::Tensor hidden;  // [sequences, tokens, hidden_size]; the layer's output after its last stage
  std::vector<at::Tensor> held;  // what the layer keeps between its stages
};

class DecoderLayer {
 public:
  virtual ~DecoderLayer() = default;
  int num_stages() const { return static_cast<int>(stages_.size()); }
  // Linears of a stage, in the order in which StageOutput takes their outputs.
  const std::vector<LinearInfo>& stage(int s) const { return stages_[s]; }

  // Stages run in order: StageInput(0), StageOutput(0), StageInput(1), ...
  // Returns the common input [sequences, tokens, in] of the Linears of stage s.
  virtual at::Tensor StageInput(int s, const SequenceContext& context, LayerState& state) const = 0;
  // `outputs`: y = x W^T (+ b) per Linear of the stage, [sequences, tokens, out].
  virtual void StageOutput(int s, const SequenceContext& context, std::vector<at::Tensor> outputs,
                           LayerState& state) const = 0;

 protected:
  std::vector<std::vector<LinearInfo>> stages_;
};

// Multiplies one Linear: x [.., in] -> [.., out], bias included.
class LinearRunner {
 public:
  virtual ~LinearRunner() = default;
  virtual at::Tensor Apply(const LinearInfo& linear, const at::Tensor& x) = 0;
};

// The layer's output [sequences, tokens, hidden_size].
at::Tensor RunLayer(const DecoderLayer& layer, const SequenceContext& context,
                    const at::Tensor& hidden, LinearRunner& linears);

// Final norm and output projection.
class OutputHead {
 public:
  virtual ~OutputHead() = default;
  // hidden [.., hidden_size] (the last layer's output) -> logits [.., vocab_size], in the compute
  // dtype as the reference implementation computes them. Differentiable.
  virtual at::Tensor Logits(const at::Tensor& hidden) const = 0;
  virtual int64_t vocab_size() const = 0;
};

struct ComputeOptions {
  at::ScalarType dtype = at::kFloat;  // kFloat, kBFloat16, or kDouble (tests)
  at::Device device = at::kCPU;
};

class Model {
 public:
  // `checkpoint` must outlive the model. Fails with kInvalidInput if the architecture is unknown,
  // or a tensor is missing or has another shape than the configuration says. A quantized checkpoint
  // opens too: the shapes of Linears then come from the configuration, and only LoadLayer's
  // non-Linear tensors are read.
  static Result<std::unique_ptr<Model>> Open(const Checkpoint& checkpoint);
  virtual ~Model() = default;

  const ModelConfig& config() const { return config_; }
  const Profile& profile() const { return *profile_; }
  const Checkpoint& checkpoint() const { return *checkpoint_; }
  // Every Linear of the body in layer and stage order.
  const std::vector<LinearInfo>& linears() const { return linears_; }
  std::vector<LinearInfo> LayerLinears(int layer) const;

  // ids [sequences, tokens] int64 -> [sequences, tokens, hidden_size], the input of layer 0.
  Result<at::Tensor> Embed(const at::Tensor& ids, const ComputeOptions& options) const;
  SequenceContext Context(int64_t tokens, const ComputeOptions& options) const;
  // Non-Linear parameters only.
  virtual Result<std::unique_ptr<DecoderLayer>> LoadLayer(int layer,
                                                          const ComputeOptions& options) const = 0;
  virtual Result<std::unique_ptr<OutputHead>> LoadHead(const ComputeOptions& options) const = 0;
  // The weight [out, in] of a Linear as the source stores it, checked finite; bias undefined if
  // there is none.
  Result<at::Tensor> LoadWeight(const LinearInfo& linear) const;
  Result<at::Tensor> LoadBias(const LinearInfo& linear) const;
  // All tensors of a layer, for read-ahead.
  std::vector<std::string> LayerTensors(int layer) const;

 protected:
  // What embeddings are multiplied with, in the compute dtype.
  virtual double embedding_scale() const { return 1; }

  ModelConfig config_;
  const Profile* profile_ = nullptr;
  const Checkpoint* checkpoint_ = nullptr;
  std::vector<LinearInfo> linears_;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_MODEL_MODEL_H_

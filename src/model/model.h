#ifndef PRISMAQUANT_MODEL_MODEL_H_
#define PRISMAQUANT_MODEL_MODEL_H_

// Model: a checkpoint, run one layer at a time. A Model knows the inventory (every Linear with its
// layer, stage and fused unit) but holds no weights; LoadLayer and LoadHead read the weights of one
// layer or of the head, and dropping the returned object frees them.
//
// Layers are numbered through all parts of the model: first the decoder layers of the text body,
// then, where the checkpoint has them, the output projection, the layer of the MTP head, and the
// vision tower's blocks with its merger. Within a part a layer's output is the next one's input;
// what the parts hand to each other is said at Embed and MtpInput.
//
// A DecoderLayer is a sequence of stages. A stage is a set of Linears whose inputs are known at one
// moment; between stages lies everything that is not a Linear (norms, attention, Gated DeltaNet,
// routing, activation functions). The caller multiplies, so that probing, rendering and evaluating
// put their own Linear in place without the model knowing. All operations of a layer are
// differentiable by libtorch's autograd.
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
#include "model/smoothing.h"

namespace prismaquant {

class VisionTower;

// Parts of a model. They differ in which sequences run through them and in which loss they move.
enum class Part { kText, kHead, kMtp, kVision };

// The layers [first, end) of a part.
struct PartLayers {
  Part part = Part::kText;
  int first = 0, end = 0;
};

// Where a checkpoint that stores the experts of a layer in one tensor holds the weight of one of
// their Linears: rows [row, row + out) of the expert's slice.
struct PackedSlice {
  std::string tensor;  // "model.layers.0.mlp.experts.gate_up_proj"; empty: "<linear>.weight"
  int64_t expert = 0, row = 0;
};

struct LinearInfo {
  std::string name;  // module name as the checkpoint spells it, without ".weight"
  int64_t out = 0, in = 0;
  DType dtype = DType::kBF16;  // of the stored weight
  Part part = Part::kText;
  int layer = 0, stage = 0;
  bool has_bias = false;
  PackedSlice packed;
  // What is allocated together: the fused set it belongs to, or all experts of its layer; its own
  // name if it is alone.
  std::string unit;
  std::string scale_group;  // Linears that share their global scale of weights
  std::string input_group;  // Linears that share their global scale of inputs
  bool is_expert = false;
  bool allocatable = true;  // false: the profile keeps it in the source's dtype
  // What it returns is the layer's output, or is added to the hidden state to give it, so no
  // gradient within the layer depends on its value.
  bool ends_layer = false;
};

// What a layer needs to know of the positions of a batch of sequences.
struct SequenceContext {
  // [tokens, rotary_dim], in the compute dtype; of the vision tower float32 or float64.
  at::Tensor cos, sin;
  // Of sliding layers with angles of their own, else undefined.
  at::Tensor local_cos, local_sin;
};

// A batch of sequences on its way through one layer.
struct LayerState {
  at::Tensor hidden;  // [sequences, tokens, hidden_size]; the layer's output after its last stage
  std::vector<at::Tensor> held = {};  // what the layer keeps between its stages
  at::Tensor routing = {};  // int64 [tokens, k], each token's experts; undefined without a mixture
};

class DecoderLayer {
 public:
  virtual ~DecoderLayer() = default;
  int num_stages() const { return static_cast<int>(stages_.size()); }
  // Linears of a stage, in the order in which StageOutputs takes their outputs.
  const std::vector<LinearInfo>& stage(int s) const { return stages_[s]; }

  // Stages run in order: StageInputs(0), StageOutputs(0), StageInputs(1), ...
  // Returns the input [.., in] of each Linear of stage s; Linears with one input share its tensor.
  virtual std::vector<at::Tensor> StageInputs(int s, const SequenceContext& context,
                                              LayerState& state) const = 0;
  // `outputs`: y = x W^T (+ b) per Linear of the stage, [.., out].
  virtual void StageOutputs(int s, const SequenceContext& context, std::vector<at::Tensor> outputs,
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

// x W^T, and + b if the bias is defined.
at::Tensor MultiplyLinear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias);

// The layer's output [sequences, tokens, hidden_size]. `routing`, if not null, is set as in
// LayerState.
at::Tensor RunLayer(const DecoderLayer& layer, const SequenceContext& context,
                    const at::Tensor& hidden, LinearRunner& linears, at::Tensor* routing = nullptr);

// The final norm of the body or of the MTP head, and the output projection, which they share.
class OutputHead {
 public:
  virtual ~OutputHead() = default;
  // hidden [.., hidden_size] (the last layer's output) -> the same shape, normed.
  virtual at::Tensor Norm(const at::Tensor& hidden) const = 0;
  // normed hidden -> logits [.., vocab_size], in the compute dtype as the reference implementation
  // computes them.
  virtual at::Tensor Project(const at::Tensor& normed) const = 0;
  virtual int64_t vocab_size() const = 0;
  // Differentiable, as the two it is made of.
  at::Tensor Logits(const at::Tensor& hidden) const { return Project(Norm(hidden)); }
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
  virtual ~Model();

  const ModelConfig& config() const { return config_; }
  const Profile& profile() const { return *profile_; }
  const Checkpoint& checkpoint() const { return *checkpoint_; }
  // The parts of this checkpoint, in the order of their layers; tied weights leave no kHead.
  const std::vector<PartLayers>& parts() const { return parts_; }
  // Null if the checkpoint has no such part.
  const PartLayers* FindPart(Part part) const;
  // Of all parts.
  int num_layers() const { return parts_.back().end; }
  // Every Linear in layer and stage order.
  const std::vector<LinearInfo>& linears() const { return linears_; }
  std::vector<LinearInfo> LayerLinears(int layer) const;
  // Null if the checkpoint has no vision tower.
  const VisionTower* vision() const { return vision_.get(); }

  // ids [sequences, tokens] int64 -> [sequences, tokens, hidden_size], the input of layer 0. The
  // rows of image tokens are to be replaced by the tower's output, in order.
  Result<at::Tensor> Embed(const at::Tensor& ids, const ComputeOptions& options) const;
  // The body's final norm of hidden [.., hidden_size].
  virtual Result<at::Tensor> FinalNorm(const at::Tensor& hidden,
                                       const ComputeOptions& options) const = 0;
  // The input [1, slots, 2 hidden_size] of the MTP layer: slot i joins the embedding of token i + 1
  // with the normed hidden state of token i (OutputHead::Norm of the body's output, or of the MTP
  // head's own when it drafts further). Both are [1, slots, hidden_size].
  Result<at::Tensor> MtpInput(const at::Tensor& next_embeddings, const at::Tensor& normed,
                              const ComputeOptions& options) const;
  // Of positions 0..tokens-1.
  SequenceContext Context(int64_t tokens, const ComputeOptions& options) const;
  // Of positions int64 [3, tokens] in time, row and column (MropePositions).
  SequenceContext Context(const at::Tensor& positions, const ComputeOptions& options) const;
  // Non-Linear parameters only. The layer of kHead maps the body's output to logits.
  virtual Result<std::unique_ptr<DecoderLayer>> LoadLayer(int layer,
                                                          const ComputeOptions& options) const = 0;
  // `part`: kText or kMtp. The projection is the checkpoint's unquantized one, or, if `projection`
  // is given, what it makes of a Linear named lm_head.
  virtual Result<std::unique_ptr<OutputHead>> LoadHead(
      Part part, const ComputeOptions& options,
      std::shared_ptr<LinearRunner> projection = nullptr) const = 0;
  // The weight [out, in] of a Linear in the source's dtype, smoothed if the model is, checked
  // finite; bias undefined if there is none.
  Result<at::Tensor> LoadWeight(const LinearInfo& linear) const;
  Result<at::Tensor> LoadBias(const LinearInfo& linear) const;
  // Any tensor of the source by its name, likewise.
  Result<at::Tensor> LoadTensor(const std::string& name) const;
  // The channels of a layer that can be scaled.
  virtual std::vector<SmoothingSite> SmoothingSites(int layer) const = 0;
  // From here on what is read is smoothed; not while other threads use the model.
  void SetSmoothing(std::shared_ptr<const Smoothing> smoothing);
  // Null if the source is read as it is.
  const Smoothing* smoothing() const { return smoothing_.get(); }
  // Whether a tensor of the source is read as another one.
  bool IsSmoothed(const std::string& tensor) const {
    return smoothing_ != nullptr && smoothing_->Changes(tensor);
  }
  // All tensors of a layer; none if there is no such layer.
  std::vector<std::string> LayerTensors(int layer) const;

 protected:
  Model();
  // What embeddings are multiplied with, in the compute dtype.
  virtual double embedding_scale() const { return 1; }
  // The prefix of a layer's tensors; empty for kHead.
  std::string LayerPrefix(int layer) const;
  Part PartOfLayer(int layer) const;

  ModelConfig config_;
  const Profile* profile_ = nullptr;
  const Checkpoint* checkpoint_ = nullptr;
  std::vector<PartLayers> parts_;
  std::vector<LinearInfo> linears_;
  std::unique_ptr<VisionTower> vision_;
  std::shared_ptr<const Smoothing> smoothing_;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_MODEL_MODEL_H_

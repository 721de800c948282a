#ifndef PRISMAQUANT_MODEL_TRANSFORMER_H_
#define PRISMAQUANT_MODEL_TRANSFORMER_H_

// What the decoder-only families share: the pre-norm layer skeleton x' = x + Mixer(N1(x)), x'' = x'
// + MLP(N2(x')) with a gated MLP, softmax attention with its variants, embeddings and output head.
// A family is one file that says how its skeleton and its attention vary, and which other mixers
// its layers have, with their Linears and parameters.
//
// Mixers are immutable and may be shared between threads.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "model/model.h"

namespace prismaquant {

enum class NormKind {
  kPlain,    // w x / rms(x)
  kPlusOne,  // (1 + w) x / rms(x)
};

at::Tensor ApplyNorm(NormKind kind, const at::Tensor& x, const at::Tensor& weight, double eps);

// Token mixing between the input projections (stage 0) and the output projection (stage 1) of a
// layer.
class Mixer {
 public:
  virtual ~Mixer() = default;
  // `projections`: outputs of the stage-0 Linears -> input of the output projection [sequences,
  // tokens, in].
  virtual at::Tensor Mix(const SequenceContext& context,
                         const std::vector<at::Tensor>& projections) const = 0;
};

// Activation of the MLP's gate: W_down(activation(W_gate n) * (W_up n)).
enum class MlpActivation { kSilu, kGeluTanh };

struct SkeletonVariant {
  NormKind norm = NormKind::kPlain;
  MlpActivation activation = MlpActivation::kSilu;
  bool post_norms = false;  // mixer and MLP outputs are normed before they are added
};

struct AttentionVariant {
  NormKind norm = NormKind::kPlain;
  bool norm_heads = false;  // RMSNorm on each query and key head
  // q_proj gives query and gate per head; the output is multiplied by sigmoid(gate).
  bool gated_query = false;
  bool input_bias = false;                     // on q, k and v
  bool output_bias = false;                    // on o
  std::optional<double> scale = std::nullopt;  // of the scores; 1 / sqrt(head_dim) if there is none
  int64_t window = 0;         // tokens that a query sees, itself included; 0: all before it
  bool local_rotary = false;  // turns heads by the context's local angles
};

// Softmax attention over outputs of {q, k, v}. q_norm and k_norm are undefined without norm_heads.
std::unique_ptr<Mixer> MakeAttention(const ModelConfig& config, const AttentionVariant& variant,
                                     at::Tensor q_norm, at::Tensor k_norm);

// A module of a layer: name relative to the layer ("self_attn.q_proj") and the shape of its weight.
struct LinearShape {
  std::string name;
  int64_t out = 0, in = 0;
  bool bias = false;
};
struct ParameterShape {
  std::string name;  // relative to the layer, whole: "input_layernorm.weight"
  std::vector<int64_t> shape;
};

class TransformerModel : public Model {
 public:
  Result<std::unique_ptr<DecoderLayer>> LoadLayer(int layer,
                                                  const ComputeOptions& options) const override;
  Result<std::unique_ptr<OutputHead>> LoadHead(const ComputeOptions& options) const override;
  // Builds the inventory and checks every tensor's shape.
  Status Initialize(const Checkpoint& checkpoint, ModelConfig config, const Profile& profile);

 protected:
  virtual SkeletonVariant skeleton() const { return {}; }
  // The layer's attention. Here: biases, window and rotary as the configuration says, with the
  // skeleton's norm.
  virtual AttentionVariant attention(int layer) const;
  // Linears of the mixer's two stages: {input projections}, {output projection}. Here and in the
  // next two: those of the attention.
  virtual std::vector<std::vector<LinearShape>> MixerLinears(int layer) const;
  // Everything else that the mixer reads.
  virtual std::vector<ParameterShape> MixerParameters(int layer) const;
  virtual Result<std::unique_ptr<Mixer>> LoadMixer(int layer, const ComputeOptions& options) const;

  // A parameter of a layer in `dtype`, checked finite.
  Result<at::Tensor> Parameter(int layer, const std::string& name, at::ScalarType dtype,
                               at::Device device) const;
  std::string LayerPrefix(int layer) const;

 private:
  std::vector<std::vector<LinearInfo>> LayerStages(int layer) const;
  std::vector<std::vector<LinearShape>> MlpLinears() const;
  LinearInfo Describe(int layer, int stage, const LinearShape& shape) const;
  std::vector<ParameterShape> LayerParameters(int layer) const;
  Status CheckLinear(const LinearInfo& linear) const;
  Status CheckShape(const std::string& tensor, const std::vector<int64_t>& shape) const;
};

std::unique_ptr<TransformerModel> MakeGemma3();
std::unique_ptr<TransformerModel> MakeLlama();
std::unique_ptr<TransformerModel> MakeMistral();
std::unique_ptr<TransformerModel> MakeQwen2();
std::unique_ptr<TransformerModel> MakeQwen3();
std::unique_ptr<TransformerModel> MakeQwen35();

}  // namespace prismaquant

#endif  // PRISMAQUANT_MODEL_TRANSFORMER_H_

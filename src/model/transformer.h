#ifndef PRISMAQUANT_MODEL_TRANSFORMER_H_
#define PRISMAQUANT_MODEL_TRANSFORMER_H_

// What the decoder-only families share: the pre-norm layer skeleton x' = x + Mixer(N1(x)), x'' = x'
// + MLP(N2(x')) with a SwiGLU MLP, softmax attention with its variants, embeddings and output head.
// A family is one file that says which mixers its layers have, with their Linears and parameters.
//
// Mixers are immutable and may be shared between threads.

#include <ATen/core/Tensor.h>

#include <memory>
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

struct AttentionVariant {
  NormKind norm = NormKind::kPlain;
  bool norm_heads = false;  // RMSNorm on each query and key head
  bool gated_query =
      false;  // q_proj gives query and gate per head; the output is multiplied by sigmoid(gate)
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
  virtual NormKind norm() const { return NormKind::kPlain; }
  // Linears of the mixer's two stages: {input projections}, {output projection}.
  virtual std::vector<std::vector<LinearShape>> MixerLinears(int layer) const = 0;
  virtual std::vector<ParameterShape> MixerParameters(int layer) const = 0;
  virtual Result<std::unique_ptr<Mixer>> LoadMixer(int layer,
                                                   const ComputeOptions& options) const = 0;

  // The attention's Linears and parameters, which all families have.
  std::vector<std::vector<LinearShape>> AttentionLinears(const AttentionVariant& variant) const;
  std::vector<ParameterShape> AttentionParameters(const AttentionVariant& variant) const;
  Result<std::unique_ptr<Mixer>> LoadAttention(int layer, const AttentionVariant& variant,
                                               const ComputeOptions& options) const;
  // A parameter of a layer in `dtype`, checked finite.
  Result<at::Tensor> Parameter(int layer, const std::string& name, at::ScalarType dtype,
                               at::Device device) const;
  std::string LayerPrefix(int layer) const;

 private:
  std::vector<std::vector<LinearInfo>> LayerStages(int layer) const;
  std::vector<ParameterShape> LayerParameters(int layer) const;
  Status CheckLinear(const LinearInfo& linear) const;
  Status CheckShape(const std::string& tensor, const std::vector<int64_t>& shape) const;
};

std::unique_ptr<TransformerModel> MakeLlama();
std::unique_ptr<TransformerModel> MakeQwen3();
std::unique_ptr<TransformerModel> MakeQwen35();

}  // namespace prismaquant

#endif  // PRISMAQUANT_MODEL_TRANSFORMER_H_

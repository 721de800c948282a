#ifndef PRISMAQUANT_MODEL_TRANSFORMER_H_
#define PRISMAQUANT_MODEL_TRANSFORMER_H_

// What the decoder-only families share: inventory and loading of their layers, embeddings and
// output head. A family is one file that says how its skeleton and its attention vary, and which
// other mixers its layers have, with their Linears and parameters.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "model/attention.h"
#include "model/decoder_layers.h"
#include "model/model.h"

namespace prismaquant {

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
  Result<std::unique_ptr<OutputHead>> LoadHead(
      Part part, const ComputeOptions& options,
      std::shared_ptr<LinearRunner> projection = nullptr) const override;
  Result<at::Tensor> FinalNorm(const at::Tensor& hidden,
                               const ComputeOptions& options) const override;
  std::vector<SmoothingSite> SmoothingSites(int layer) const override;
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
  // The channels of the output projection's input; here made by v_proj. `stages` begin with the
  // mixer's.
  virtual SmoothingSite MixerOutputSite(int layer, const LinearStages& stages) const;

  // Channels that a norm of the layer makes, named relative to it.
  SmoothingSite NormSite(int layer, const char* norm, int64_t channels,
                         const std::vector<LinearInfo>& readers) const;
  // Of a decoder layer of the body or of the MTP head, whose layers are all full attention.
  LayerKind KindOf(int layer) const;
  // A parameter of a layer in `dtype`, checked finite.
  Result<at::Tensor> Parameter(int layer, const std::string& name, at::ScalarType dtype,
                               at::Device device) const;

 private:
  Status FindParts();
  Status CheckDecoderLayer(int layer);
  Status CheckMtp();
  LinearStages LayerStages(int layer) const;
  std::vector<std::vector<LinearShape>> MlpLinears() const;
  LinearInfo Describe(int layer, int stage, const LinearShape& shape) const;
  void AppendMixture(int layer, LinearStages& stages) const;
  LinearInfo DescribeExpert(int layer, int stage, int64_t expert, const char* projection) const;
  LinearInfo DescribeHead() const;
  DType StoredType(const std::string& tensor) const;
  std::vector<ParameterShape> LayerParameters(int layer) const;
  Result<SkeletonParts> LoadSkeleton(int layer, const ComputeOptions& options) const;
  Result<HeadNorm> LoadFinalNorm(Part part, const ComputeOptions& options) const;
  Status CheckLinear(const LinearInfo& linear) const;
};

std::unique_ptr<TransformerModel> MakeGemma3();
std::unique_ptr<TransformerModel> MakeLlama();
std::unique_ptr<TransformerModel> MakeMistral();
std::unique_ptr<TransformerModel> MakeQwen2();
std::unique_ptr<TransformerModel> MakeQwen3();
std::unique_ptr<TransformerModel> MakeQwen35();

}  // namespace prismaquant

#endif  // PRISMAQUANT_MODEL_TRANSFORMER_H_

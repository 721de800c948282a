#ifndef PRISMAQUANT_MODEL_DECODER_LAYERS_H_
#define PRISMAQUANT_MODEL_DECODER_LAYERS_H_

// The layers that text models are made of, from parameters that are already loaded: the pre-norm
// skeleton x' = x + Mixer(N1(x)), x'' = x' + FeedForward(N2(x')), the MTP layer, which joins its
// two inputs before such a skeleton, and the output projection as a layer of its own.

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "model/attention.h"
#include "model/feed_forward.h"
#include "model/model.h"

namespace prismaquant {

struct SkeletonVariant {
  NormKind norm = NormKind::kPlain;
  MlpActivation activation = MlpActivation::kSilu;
  bool post_norms = false;  // mixer and feed-forward outputs are normed before they are added
};

// Weights of a layer's norms; undefined where it has none.
struct LayerNorms {
  at::Tensor mixer_input, mixer_output, mlp_input, mlp_output;
};

struct SkeletonParts {
  SkeletonVariant variant;
  double eps = 0;
  LayerNorms norms;
  std::unique_ptr<Mixer> mixer;
  std::unique_ptr<FeedForward> feed_forward;
};

using LinearStages = std::vector<std::vector<LinearInfo>>;

// Stages: the mixer's two, then those of the feed-forward part.
std::unique_ptr<DecoderLayer> MakeSkeleton(LinearStages stages, SkeletonParts parts);
// Stages: {fc}, whose input is the joined hidden state [sequences, slots, 2 hidden_size], then
// those of the skeleton.
std::unique_ptr<DecoderLayer> MakeMtpLayer(LinearStages stages, SkeletonParts parts);

struct HeadNorm {
  NormKind kind = NormKind::kPlain;
  double eps = 0;
  at::Tensor weight;

  at::Tensor Apply(const at::Tensor& hidden) const { return ApplyNorm(kind, hidden, weight, eps); }
};

// One stage {lm_head}; hidden becomes the logits.
std::unique_ptr<DecoderLayer> MakeHeadLayer(LinearStages stages, HeadNorm norm);
// The projection [vocab_size, hidden_size].
std::unique_ptr<OutputHead> MakeOutputHead(HeadNorm norm, at::Tensor projection);
// The projection is what `linears` makes of `linear`.
std::unique_ptr<OutputHead> MakeOutputHead(HeadNorm norm, LinearInfo linear,
                                           std::shared_ptr<LinearRunner> linears);

}  // namespace prismaquant

#endif  // PRISMAQUANT_MODEL_DECODER_LAYERS_H_

#ifndef PRISMAQUANT_BENCH_SHAPE_MODEL_SHAPE_H_
#define PRISMAQUANT_BENCH_SHAPE_MODEL_SHAPE_H_

// ModelShape: the sizes of published Qwen3.5 and Qwen3.6 models, and from them the names, shapes
// and dtypes of every tensor of their checkpoints, with any number of layers: what runs on them
// take in time and memory can be measured without their weights.

#include <cstdint>
#include <string>
#include <vector>

#include "base/json.h"
#include "io/safetensors.h"

namespace prismaquant {

// A decoder layer is Gated DeltaNet unless its number, from 1, is a multiple of four. Heads have
// 256 dimensions, Gated DeltaNet's heads 128.
struct ModelShape {
  std::string name;
  int64_t layers = 0;  // published
  int64_t hidden = 0;
  int64_t heads = 0, kv_heads = 0;             // full attention
  int64_t key_heads = 0, value_heads = 0;      // Gated DeltaNet
  int64_t intermediate = 0;                    // of the MLP, of one expert and the shared one
  int64_t experts = 0, experts_per_token = 0;  // 0: dense
};

const std::vector<ModelShape>& PublishedShapes();

// How a tensor is filled, so that activations stay finite and gradients alive.
enum class Fill {
  kProjection,  // normal, standard deviation 1 / sqrt(in)
  kResidual,    // a tenth of that: what is added to the hidden state
  kSmall,       // normal, 0.02: biases, norms that multiply by 1 + w, embeddings of positions
  kOnes,        // 1 and a little: norms that multiply by w
};

struct ShapedTensor {
  TensorSpec spec;
  Fill fill = Fill::kProjection;
};

// The text body of `layers` layers, the MTP head and the whole vision tower, in file order.
std::vector<ShapedTensor> TensorsOf(const ModelShape& shape, int64_t layers);
// `example`: the config.json of a checkpoint of the same family, which gives all but the sizes.
Json ConfigOf(const ModelShape& shape, int64_t layers, Json example);

}  // namespace prismaquant

#endif  // PRISMAQUANT_BENCH_SHAPE_MODEL_SHAPE_H_

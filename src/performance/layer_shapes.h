#ifndef PRISMAQUANT_PERFORMANCE_LAYER_SHAPES_H_
#define PRISMAQUANT_PERFORMANCE_LAYER_SHAPES_H_

// What a forecast needs to know of the layers of a model and of the tokens that run through them.
// Pure functions of configuration, inventory and calibration.

#include <vector>

#include "data/calibration.h"
#include "model/model.h"

namespace prismaquant {

// The sequences of a part. Of the vision tower, an image's patches are its tokens.
struct TokenLoad {
  double sequences = 0, tokens = 0, longest = 0;
  double pairs = 0;  // sum of the squares of the lengths
};
TokenLoad LoadOf(Part part, const Calibration& calibration);

struct LinearLoad {
  double out = 0, in = 0;
  double share = 1;  // of the layer's tokens that reach it
  bool allocatable = true, is_expert = false;
  bool is_sibling = false;  // reads what the expert's Linear before it reads
  bool ends_layer = false;
  double weights() const { return out * in; }
};

struct LayerShape {
  std::vector<LinearLoad> linears;
  double stored = 0;          // bytes of all its tensors
  double hidden = 0;          // elements of a token's hidden state
  double width = 0;           // elements per token of all inputs and outputs of its Linears
  double widest = 0;          // of the stage that has most
  double heads = 0;           // attention: query elements per token; 0 without
  double recurrent = 0;       // Gated DeltaNet: elements per token of queries, keys and values
  double recurrent_flop = 0;  // and the arithmetic of its chunked rule

  double Weights() const;
  double AllocatableWeights(bool experts = true) const;
  double LargestWeight() const;
  // What a token is multiplied with.
  double WeightsPerToken() const;
};

// All layers of a part, in order.
std::vector<LayerShape> ShapesOf(const Model& model, const PartLayers& part);

}  // namespace prismaquant

#endif  // PRISMAQUANT_PERFORMANCE_LAYER_SHAPES_H_

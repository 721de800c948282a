#include "performance/layer_shapes.h"

#include <algorithm>
#include <map>
#include <string>
#include <utility>

#include "model/gated_delta.h"
#include "model/vision.h"

namespace prismaquant {
namespace {

double Length(Part part, const Calibration& calibration, int64_t sequence) {
  if (part == Part::kVision) {
    return static_cast<double>(calibration.caption(sequence).image.patches);
  }
  const auto tokens = static_cast<double>(calibration.ids(sequence).size());
  return part == Part::kMtp ? tokens - 1 : tokens;
}

// Of the layer's tokens, those that reach a Linear: few of an expert, a merged one of several.
double ShareOf(const Model& model, const LinearInfo& linear, bool merger) {
  if (linear.is_expert) {
    const MixtureConfig& mixture = *model.config().mixture;
    return static_cast<double>(mixture.experts_per_token) / static_cast<double>(mixture.experts);
  }
  if (!merger) return 1;
  const auto side = static_cast<double>(model.vision()->config().merge_size);
  return 1 / (side * side);
}

void AddMixer(const ModelConfig& config, bool recurrent, LayerShape& shape) {
  if (!recurrent) {
    shape.heads = static_cast<double>(config.num_heads * config.head_dim);
    return;
  }
  const auto heads = static_cast<double>(config.linear_value_heads);
  const auto key = static_cast<double>(config.linear_key_dim);
  const auto value = static_cast<double>(config.linear_value_dim);
  shape.recurrent = heads * (2 * key + value);
  // Two systems within the chunk, two solves of it, and four products with the state.
  constexpr auto kChunk = static_cast<double>(kDeltaChunk);
  shape.recurrent_flop = heads * (kChunk * (4 * key + (key + value) + 2 * value) + 8 * key * value);
}

void AddLinears(const Model& model, int layer, bool merger, LayerShape& shape) {
  std::map<int, double> inputs, outputs;  // by stage
  std::string scale_group;                // of the Linear before
  for (const LinearInfo& linear : model.LayerLinears(layer)) {
    const double share = ShareOf(model, linear, merger);
    const auto out = static_cast<double>(linear.out), in = static_cast<double>(linear.in);
    const bool sibling = linear.is_expert && linear.scale_group == scale_group;
    scale_group = linear.scale_group;
    shape.linears.push_back({.out = out,
                             .in = in,
                             .share = share,
                             .allocatable = linear.allocatable,
                             .is_expert = linear.is_expert,
                             .is_sibling = sibling,
                             .ends_layer = linear.ends_layer});
    outputs[linear.stage] += share * out;
    double& input = inputs[linear.stage];
    if (!linear.is_expert) input = std::max(input, share * in);
    if (linear.is_expert && !sibling) input += share * in;
  }
  for (const auto& [stage, width] : outputs) {
    shape.width += width + inputs[stage];
    shape.widest = std::max(shape.widest, width + inputs[stage]);
  }
}

}  // namespace

TokenLoad LoadOf(Part part, const Calibration& calibration) {
  const int64_t texts = calibration.text.count();
  const int64_t first = part == Part::kVision ? texts : 0;
  const int64_t end = part == Part::kMtp ? texts : calibration.count();
  TokenLoad load{.sequences = static_cast<double>(end - first)};
  for (int64_t n = first; n < end; ++n) {
    const double length = Length(part, calibration, n);
    load.tokens += length;
    load.longest = std::max(load.longest, length);
    load.pairs += length * length;
  }
  return load;
}

double LayerShape::Weights() const {
  double sum = 0;
  for (const LinearLoad& linear : linears) sum += linear.weights();
  return sum;
}

double LayerShape::AllocatableWeights(bool experts) const {
  double sum = 0;
  for (const LinearLoad& linear : linears) {
    if (linear.allocatable && (experts || !linear.is_expert)) sum += linear.weights();
  }
  return sum;
}

double LayerShape::LargestWeight() const {
  double largest = 0;
  for (const LinearLoad& linear : linears) largest = std::max(largest, linear.weights());
  return largest;
}

double LayerShape::WeightsPerToken() const {
  double sum = 0;
  for (const LinearLoad& linear : linears) sum += linear.share * linear.weights();
  return sum;
}

std::vector<LayerShape> ShapesOf(const Model& model, const PartLayers& part) {
  const ModelConfig& config = model.config();
  std::vector<LayerShape> shapes;
  for (int layer = part.first; layer < part.end; ++layer) {
    LayerShape shape;
    for (const std::string& name : model.LayerTensors(layer)) {
      shape.stored += static_cast<double>(model.checkpoint().Find(name)->bytes.size());
    }
    const bool vision = part.part == Part::kVision;
    AddLinears(model, layer, vision && layer + 1 == part.end, shape);
    if (vision) {
      shape.hidden = shape.heads = static_cast<double>(model.vision()->config().hidden_size);
    } else {
      shape.hidden = static_cast<double>(config.hidden_size);
      const bool body = part.part == Part::kText;
      const auto index = static_cast<size_t>(layer - part.first);
      AddMixer(config, body && config.layers[index] == LayerKind::kLinearAttention, shape);
    }
    shapes.push_back(std::move(shape));
  }
  return shapes;
}

}  // namespace prismaquant

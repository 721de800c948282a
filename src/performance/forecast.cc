#include "performance/forecast.h"

#include <algorithm>
#include <cmath>

#include "performance/layer_shapes.h"
#include "probe/head_costs.h"
#include "probe/loss.h"
#include "round/factored_hessian.h"
#include "round/input_moments.h"
#include "round/output_hessian.h"

namespace prismaquant {
namespace {

// What the elementwise operators of a stage move, as a multiple of what they work on in float32.
// Measured (docs/scaling.md).
struct Passes {
  double linear = 0;     // over the inputs and outputs of the Linears
  double recurrent = 0;  // over queries, keys and values of Gated DeltaNet
  double weights = 0;    // over the weights, once per layer
};
constexpr Passes kForward{.linear = 8, .recurrent = 30, .weights = 3};
constexpr Passes kBackward{.linear = 95, .recurrent = 450, .weights = 3};
constexpr double kLossPasses = 80;     // over the logits
constexpr double kPricingPasses = 50;  // over the rows of lm_head
constexpr double kErrorPasses = 4;     // over the weights, per priced format
constexpr double kRoundPasses = 20;    // over the weights that are rounded
constexpr double kHessianPasses = 10;  // over a Hessian
constexpr double kRowPasses = 24;      // over inputs and outputs of what is rounded
constexpr double kKeptBytes = 3;       // per byte of what experts keep
constexpr double kJudgedShare = 1.0 / kHeldOutEvery, kJudgements = 3;
constexpr double kExportPasses = 40;    // over the bytes written
constexpr double kFloat = 4;            // bytes
constexpr double kLossBlockBytes = 40;  // per element of the logits worked on at a time
// Of the logits of the two models that are compared (src/evaluate/score.cc).
constexpr double kScoreBlock = 8e6, kScoreBlockBytes = 50;
// Of the rates that a moment reaches, what hours do.
constexpr double kSustained = 0.88;

// The half of X^T X that AddUpperProduct computes, of `rows` rows of n.
double SymmetricProduct(double n, double rows) {
  return rows * n * (n + std::min<double>(n, kUpperProductRows));
}

double Bytes(at::ScalarType type) { return static_cast<double>(at::elementSize(type)); }

class Forecaster {
 public:
  Forecaster(const Model& model, const Calibration& calibration, const RunSettings& settings)
      : model_(model), settings_(settings) {
    element_ = Bytes(settings.compute.dtype);
    product_type_ = ProductType(settings.compute.dtype);
    product_ = Bytes(product_type_);
    for (const PartLayers& part : model.parts()) {
      if (part.part == Part::kHead) continue;
      if (part.part == Part::kVision && calibration.captions.empty()) continue;
      parts_.push_back({part.part, LoadOf(part.part, calibration), ShapesOf(model, part)});
    }
    vocabulary_ = static_cast<double>(model.config().vocab_size);
    hidden_ = static_cast<double>(model.config().hidden_size);
  }

  std::vector<StageNeeds> Run() const {
    std::vector<StageNeeds> stages;
    if (settings_.smooth) stages.push_back(ForwardStage("smooth"));
    if (settings_.probe) {
      stages.push_back(ForwardStage("probe, forward"));
      stages.push_back(HeadStage());
      stages.push_back(BackwardStage());
    }
    if (settings_.render && settings_.validated_plans > 0) {
      AddValidation(stages);
    } else if (settings_.render) {
      stages.push_back(RenderStage());
    }
    if (settings_.render) stages.push_back(ExportStage());
    if (settings_.evaluation_tokens > 0) {
      stages.push_back(EvaluationStage("evaluate", settings_.evaluation_tokens));
      stages.back().stored += WrittenBytes();
    }
    return stages;
  }

 private:
  struct PartShape {
    Part part = Part::kText;
    TokenLoad load;
    std::vector<LayerShape> layers;
  };

  // One layer for all sequences, `times` over; products in `dtype`.
  void AddLayer(const LayerShape& layer, const TokenLoad& load, const Passes& passes, double times,
                StageNeeds& needs) const {
    needs.products += times * (2 * load.tokens * layer.WeightsPerToken() +
                               // half of the pairs of a causal product
                               2 * load.pairs * layer.heads);
    needs.float_products += times * load.tokens * layer.recurrent_flop;
    needs.memory += kFloat * (load.tokens * (passes.linear * (layer.width + layer.hidden) +
                                             passes.recurrent * layer.recurrent) +
                              passes.weights * layer.Weights());
  }

  // The layer again, the gradients that it passes on, and those of its weights.
  void AddBackward(const LayerShape& layer, const TokenLoad& load, StageNeeds& needs) const {
    AddLayer(layer, load, kBackward, 3, needs);
    for (const LinearLoad& linear : layer.linears) {
      if (linear.ends_layer) needs.products -= 2 * linear.share * load.tokens * linear.weights();
    }
  }

  // Of a layer that is loaded: its mapped pages, copies of its weights if they are computed in
  // another dtype, and the copy of one of them that a product in bfloat16 packs.
  double Loaded(const LayerShape& layer) const {
    return layer.stored + (Copied() ? element_ * layer.Weights() : 0) +
           element_ * layer.LargestWeight();
  }
  bool Copied() const { return element_ != 2; }  // as published checkpoints are stored

  StageNeeds ForwardStage(const char* stage) const {
    StageNeeds needs{.stage = stage};
    for (const PartShape& part : parts_) {
      for (const LayerShape& layer : part.layers) {
        AddLayer(layer, part.load, kForward, 1, needs);
        needs.read += layer.stored;
        needs.written += part.load.tokens * layer.hidden * element_;
        needs.stored = needs.written;
        const double states = 2 * part.load.tokens * layer.hidden * element_;
        needs.resident =
            std::max(needs.resident, Loaded(layer) + states + Activations(part, layer));
      }
    }
    return needs;
  }

  // Of one sequence without gradients.
  double Activations(const PartShape& part, const LayerShape& layer) const {
    return part.load.longest *
           (element_ * 2 * layer.widest + kFloat * (6 * layer.hidden + 8 * layer.recurrent));
  }
  // And with what autograd keeps.
  double SavedActivations(const PartShape& part, const LayerShape& layer) const {
    return part.load.longest *
           (element_ * 3 * layer.width + kFloat * (12 * layer.hidden + 24 * layer.recurrent));
  }

  StageNeeds HeadStage() const {
    StageNeeds needs{.stage = "probe, head"};
    const double table = vocabulary_ * hidden_;
    const bool priced = model_.FindPart(Part::kHead) != nullptr;
    for (const PartShape& part : parts_) {
      if (part.part == Part::kVision) continue;
      const double logits = part.load.tokens * vocabulary_;
      needs.products += 4 * logits * hidden_;
      needs.memory += kFloat * kLossPasses * logits;
    }
    needs.read += 2 * table;
    const PartShape& body = Body();
    needs.written += body.load.tokens * hidden_ * element_;
    needs.stored = LayerInputs() + needs.written;
    const double held = std::min<double>(body.load.longest * vocabulary_, kLogitProductElements);
    // Logits, their gradient, and the one of them that a product packs.
    needs.resident = (2 + (Copied() ? element_ : 0) + element_) * table + 3 * element_ * held +
                     2 * body.load.tokens * hidden_ * element_ +
                     kLossBlockBytes * std::min<double>(kLogitBlockElements, held);
    if (priced) {
      const double positions = std::min<double>(kPricedPositions, body.load.tokens);
      const auto formats = static_cast<double>(QuantizingFormats());
      needs.products += 2 * positions * table * (2 + formats);
      needs.nearest += table * formats;
      needs.memory += kFloat * (kPricingPasses * table + kLossPasses * positions * vocabulary_);
      const double slice = kHeadSliceRows * (positions + hidden_);
      needs.resident = std::max(
          needs.resident, 2 * table + kFloat * (5 * slice + (4 + formats) * positions * hidden_));
    }
    return needs;
  }

  StageNeeds BackwardStage() const {
    StageNeeds needs{.stage = "probe, backward"};
    const auto formats = static_cast<double>(QuantizingFormats());
    for (const PartShape& part : parts_) {
      const double states = part.load.tokens * element_;
      for (const LayerShape& layer : part.layers) {
        AddBackward(layer, part.load, needs);
        const double priced = layer.AllocatableWeights();
        const double dense = layer.AllocatableWeights(/*experts=*/false);
        needs.nearest += formats * priced;
        needs.products += formats * ExpertProducts(layer, part.load.tokens);
        needs.memory += dense * product_ * part.load.sequences * (2 + formats) +
                        priced * kFloat * kErrorPasses * formats;
        needs.read += layer.stored + 2 * states * layer.hidden;
        needs.written += states * layer.hidden;
        needs.stored = std::max(needs.stored, LayerInputs() + 2 * states * layer.hidden);
        const double sketches = AddSketches(layer, part.load.tokens, needs);
        const double errors =
            product_ * formats * dense + KeptForExperts(layer, part.load.tokens) + sketches;
        const double running = product_ * layer.LargestWeight() + SavedActivations(part, layer);
        needs.resident =
            std::max(needs.resident, Loaded(layer) + errors + running + 3 * states * layer.hidden);
      }
    }
    AddGptqPass(needs);
    return needs;
  }

  // Of all tokens that reach them with the weights of experts, once.
  // Of the output Hessians, and their factors. Returns the bytes that are held.
  static double AddSketches(const LayerShape& layer, double tokens, StageNeeds& needs) {
    double elements = 0;
    for (const LinearLoad& linear : layer.linears) {
      if (linear.is_expert) continue;
      const double probes = std::min<double>(OutputSketch::kProbes, linear.out);
      const double rank = std::min<double>(OutputSketch::kRank, linear.out);
      needs.float_products += linear.out * probes * (4 * tokens + 6 * probes + 2 * rank);
      elements += 2 * linear.out * probes;
    }
    return kFloat * elements;
  }

  static double ExpertProducts(const LayerShape& layer, double tokens) {
    double products = 0;
    for (const LinearLoad& linear : layer.linears) {
      if (linear.is_expert && linear.allocatable)
        products += 2 * linear.share * tokens * linear.weights();
    }
    return products;
  }

  // What experts read and the gradients at their outputs, which are kept until the layer's end, and
  // the gaps that so many small tensors leave in the heap.
  double KeptForExperts(const LayerShape& layer, double tokens) const {
    double elements = 0;
    for (const LinearLoad& linear : layer.linears) {
      if (linear.is_expert && linear.allocatable) {
        elements += linear.share * tokens * (linear.out + (linear.is_sibling ? 0 : linear.in));
      }
    }
    return kKeptBytes * element_ * elements;
  }

  // A further pass that prices weights as GPTQ leaves them, each half of the sequences by the
  // inputs of the other.
  void AddGptqPass(StageNeeds& needs) const {
    const auto formats = static_cast<double>(settings_.gptq_priced.size());
    if (formats == 0) return;
    for (const PartShape& part : parts_) {
      for (const LayerShape& layer : part.layers) {
        AddLayer(layer, part.load, kForward, 2, needs);
        AddBackward(layer, part.load, needs);
        needs.read += 2 * layer.stored;
        double held = 2 * product_ * formats * layer.AllocatableWeights();
        for (const LinearLoad& linear : layer.linears) {
          if (!linear.allocatable) continue;
          needs.products += SymmetricProduct(linear.in, part.load.tokens * linear.share);
          AddFactor(linear, 2 * formats, needs);
          AddRounding(linear, 2 * formats, needs);
          held += 2 * kFloat * linear.in * linear.in;
        }
        needs.resident = std::max(needs.resident,
                                  Loaded(layer) + held + RoundingMemory(layer, part.load.tokens));
      }
    }
  }

  // GPTQ's factor, `times` over; in float64 at half the rate.
  void AddFactor(const LinearLoad& linear, double times, StageNeeds& needs) const {
    const double square = linear.in * linear.in;
    const at::ScalarType type = FactorType(static_cast<int64_t>(linear.in), product_type_);
    needs.factors += times * (type == at::kDouble ? 2 : 1) * square * linear.in / 3;
    needs.memory += times * kFloat * kHessianPasses * square;
  }

  // GPTQ's loop, `times` over.
  static void AddRounding(const LinearLoad& linear, double times, StageNeeds& needs) {
    needs.products += times * linear.out * linear.in * linear.in;
    needs.columns += times * linear.weights();
    needs.nearest += 2 * times * linear.weights();
    needs.memory += times * kFloat * kRoundPasses * linear.weights();
  }

  // By the inverse of what is smaller, the tokens' Gram matrix or the Hessian.
  void AddCorrection(const LinearLoad& linear, double tokens, StageNeeds& needs) const {
    const double size = std::min(tokens, linear.in);
    needs.factors += size * size * size;
    needs.products += 2 * linear.out * linear.in * tokens;
    if (tokens < linear.in) {
      needs.products += SymmetricProduct(tokens, linear.in) +
                        2 * tokens * tokens * std::min(linear.out, linear.in);
    } else {
      needs.products += 2 * linear.out * linear.in * linear.in;
    }
  }

  // Of the layer's Linear that takes most: its rows, by sequence and joined, and while the Hessian
  // is factored Hessian, factor, and that for products with the weight and what it is aimed at, or
  // later that for products with the weight in its several states.
  double RoundingMemory(const LayerShape& layer, double tokens) const {
    double most = 0;
    for (const LinearLoad& linear : layer.linears) {
      if (!linear.allocatable) continue;
      const double square = linear.in * linear.in;
      const double rows = 2 * product_ * linear.share * tokens * (linear.in + linear.out);
      const double factored = (2 * kFloat + product_) * square + 3 * kFloat * linear.weights();
      const double rounded = product_ * square + 8 * kFloat * linear.weights();
      most = std::max(most, rows + std::max(factored, rounded));
    }
    return most;
  }

  StageNeeds RenderStage() const {
    StageNeeds needs{.stage = "render"};
    const bool gptq = settings_.rendering.mode == RenderMode::kGptq;
    const double streams = gptq && settings_.rendering.correct ? 2 : 1;
    for (const PartShape& part : parts_) {
      const double states = part.load.tokens * element_;
      for (const LayerShape& layer : part.layers) {
        Passes passes = kForward;
        passes.linear *= streams;
        passes.recurrent *= streams;
        AddLayer(layer, part.load, passes, streams, needs);
        for (const LinearLoad& linear : layer.linears) {
          if (!linear.allocatable) continue;
          const double tokens = linear.share * part.load.tokens;
          if (!gptq) {
            needs.nearest += linear.weights();
            continue;
          }
          if (!linear.is_sibling) {
            needs.products += SymmetricProduct(linear.in, tokens);
            AddFactor(linear, 1, needs);
          }
          needs.products += 2 * kJudgements * kJudgedShare * tokens * linear.weights();
          AddRounding(linear, 1, needs);
          if (settings_.rendering.guided && !linear.is_expert) {
            const double rank = std::min<double>(OutputSketch::kRank, linear.out);
            needs.float_products += 4 * rank * linear.weights();
          }
          needs.memory += kFloat * kRowPasses * tokens * (linear.in + linear.out);
          if (streams < 2 || linear.is_expert) continue;
          needs.products += 2 * tokens * linear.weights();
          AddCorrection(linear, (1 - kJudgedShare) * tokens, needs);
        }
        needs.read += layer.stored + streams * states * layer.hidden;
        needs.written +=
            streams * states * layer.hidden + settings_.bits / 8 * layer.AllocatableWeights();
        needs.stored =
            std::max(needs.stored, QuantizedBytes() + 2 * streams * states * layer.hidden);
        const double held = (streams + 1) * states * (2 * layer.hidden + layer.widest) +
                            settings_.bits / 8 * layer.AllocatableWeights();
        needs.resident =
            std::max(needs.resident,
                     Loaded(layer) + held + (gptq ? RoundingMemory(layer, part.load.tokens) : 0));
      }
    }
    return needs;
  }

  // Hidden states before all layers, which the store holds until the backward stage has used them.
  double LayerInputs() const {
    double bytes = 0;
    for (const PartShape& part : parts_) {
      for (const LayerShape& layer : part.layers)
        bytes += part.load.tokens * layer.hidden * element_;
    }
    return bytes;
  }

  // All plans are rendered, at most one of them kept beside the one at hand, and measured against
  // one pass of the source, where an evaluation is one against one.
  void AddValidation(std::vector<StageNeeds>& stages) const {
    const auto plans = static_cast<double>(settings_.validated_plans);
    const double kept = plans > 1 ? QuantizedBytes() : 0;
    stages.push_back(RenderStage().Times(plans));
    stages.back().stored += kept;
    stages.push_back(
        EvaluationStage("validate", settings_.validation_tokens).Times((plans + 1) / 2));
    stages.back().stored += QuantizedBytes() + kept;
  }

  double QuantizedBytes() const {
    double weights = 0;
    for (const PartShape& part : parts_) {
      for (const LayerShape& layer : part.layers) weights += layer.AllocatableWeights();
    }
    return settings_.bits / 8 * weights;
  }

  double WrittenBytes() const {
    double stored = static_cast<double>(model_.checkpoint().file_bytes());
    for (const PartShape& part : parts_) {
      for (const LayerShape& layer : part.layers) stored -= 2 * layer.AllocatableWeights();
    }
    return stored + QuantizedBytes();
  }

  double LargestLayer() const {
    double largest = 0;
    for (const PartShape& part : parts_) {
      for (const LayerShape& layer : part.layers)
        largest = std::max(largest, layer.AllocatableWeights());
    }
    return settings_.bits / 8 * largest;
  }

  // Writes, and compares what it wrote with the source. A Linear that stays is looked at whole.
  StageNeeds ExportStage() const {
    const bool head = model_.FindPart(Part::kHead) != nullptr;
    const double bytes = WrittenBytes();
    return {.stage = "export",
            .memory = kExportPasses * bytes,
            .read = bytes,
            .written = bytes,
            .stored = QuantizedBytes() + bytes,
            .resident = 2 * LargestLayer() + (head ? 2 * vocabulary_ * hidden_ : 0)};
  }

  // Both models in float32, on windows of text.
  StageNeeds EvaluationStage(const char* stage, int64_t count) const {
    StageNeeds needs{.stage = stage};
    const auto tokens = static_cast<double>(count);
    needs.stored = 2 * tokens * hidden_ * kFloat;  // both passes, as they are kept
    const auto window = static_cast<double>(settings_.evaluation_window);
    const TokenLoad load{.sequences = tokens / window,
                         .tokens = tokens,
                         .longest = window,
                         .pairs = tokens * window};
    StageNeeds both;
    for (const PartShape& part : parts_) {
      if (part.part == Part::kVision) continue;
      for (const LayerShape& layer : part.layers) {
        AddLayer(layer, load, kForward, 2, both);
        needs.read += layer.stored * (1 + settings_.bits / 16);
        const double states = 2 * tokens * layer.hidden * kFloat;
        needs.resident = std::max(needs.resident,
                                  layer.stored + 2 * kFloat * layer.LargestWeight() + states +
                                      2 * window * kFloat * (layer.widest + 8 * layer.recurrent));
      }
      both.products += 4 * tokens * vocabulary_ * hidden_;
      both.memory += 2 * kFloat * 8 * tokens * vocabulary_;
    }
    needs.float_products = both.products + both.float_products;
    needs.memory = 2 * both.memory;
    needs.resident = std::max(needs.resident,
                              2 * (2 + kFloat) * vocabulary_ * hidden_ +
                                  kScoreBlockBytes * std::min(kScoreBlock, window * vocabulary_));
    return needs;
  }

  const PartShape& Body() const {
    return *std::find_if(parts_.begin(), parts_.end(),
                         [](const PartShape& part) { return part.part == Part::kText; });
  }

  int64_t QuantizingFormats() const {
    return std::count_if(settings_.priced.begin(), settings_.priced.end(),
                         [](const Format* format) { return format != &SourceFormat(); });
  }

  const Model& model_;
  const RunSettings& settings_;
  std::vector<PartShape> parts_;
  at::ScalarType product_type_ = at::kFloat;
  double element_ = 0, product_ = 0;  // bytes of a value in the compute dtype, and in products
  double vocabulary_ = 0, hidden_ = 0;
};

}  // namespace

StageNeeds StageNeeds::Times(double times) const {
  StageNeeds needs = *this;
  for (double StageNeeds::*work : {&StageNeeds::products, &StageNeeds::float_products,
                                   &StageNeeds::factors, &StageNeeds::nearest, &StageNeeds::columns,
                                   &StageNeeds::memory, &StageNeeds::read, &StageNeeds::written}) {
    needs.*work *= times;
  }
  return needs;
}

double StageNeeds::Seconds(const MachineRates& rates) const {
  const double computed = products / rates.product + float_products / rates.float_product +
                          factors / rates.factor + nearest / rates.nearest +
                          columns / rates.columns + memory / rates.memory;
  return std::max(computed / kSustained, read / rates.read) + written / rates.write;
}

std::vector<StageNeeds> Forecast(const Model& model, const Calibration& calibration,
                                 const RunSettings& settings) {
  return Forecaster(model, calibration, settings).Run();
}

ProductShape TypicalProduct(const Model& model, const Calibration& calibration) {
  ProductShape shape;
  for (const LinearInfo& linear : model.linears()) {
    if (linear.is_expert || linear.out * linear.in <= shape.out * shape.in) continue;
    if (linear.part == Part::kHead) continue;
    shape.in = linear.in;
    shape.out = linear.out;
  }
  shape.tokens = static_cast<int64_t>(LoadOf(Part::kText, calibration).longest);
  return shape;
}

}  // namespace prismaquant

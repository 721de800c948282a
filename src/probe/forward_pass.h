#ifndef PRISMAQUANT_PROBE_FORWARD_PASS_H_
#define PRISMAQUANT_PROBE_FORWARD_PASS_H_

// ForwardPass: all calibration sequences through the parts of a model, layer by layer. The hidden
// states before and after each layer stay in the run store; memory holds one layer's weights and
// the hidden states on both its sides. Layers that the store marks as done are left out.

#include <functional>
#include <string>
#include <utility>

#include "base/status.h"
#include "model/model.h"
#include "model/sequences.h"
#include "probe/layer_runners.h"
#include "store/run_store.h"

namespace prismaquant {

inline constexpr char kHiddenFolder[] = "hidden";
// The hidden states before `layer` of a part, or, if it is the part's end, after its last one.
std::string HiddenBlob(const PartLayers& part, int layer);

// kInvalidInput: `what` is not finite on the calibration data.
Status NotFinite(const Model& model, const std::string& what);

class ForwardPass {
 public:
  // Sends the sequences through the layer, its Linears multiplied by the runner, and stores where
  // they come out.
  using Through = std::function<Status(LinearRunner&)>;
  // Calls `through` once, and then commits (stage, layer) with what it learned.
  using Visit = std::function<Status(int layer, const LayerWeights& weights, const Through&)>;

  // What is referred to must outlive the pass.
  ForwardPass(const Model& model, const Sequences& sequences, const ComputeOptions& compute,
              std::string stage, RunStore& store)
      : model_(model),
        sequences_(sequences),
        compute_(compute),
        stage_(std::move(stage)),
        store_(store) {}

  // The part that its inputs are made from must have been run before. `title` heads the progress.
  Status Run(const PartLayers& part, const std::string& title, const Visit& visit);

 private:
  Status PutInputs(const PartLayers& part);
  Status VisitLayer(const PartLayers& part, int layer, const Visit& visit);

  const Model& model_;
  const Sequences& sequences_;
  const ComputeOptions& compute_;
  std::string stage_;
  RunStore& store_;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_PROBE_FORWARD_PASS_H_

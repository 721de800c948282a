#ifndef PRISMAQUANT_MODEL_LAYER_PAGES_H_
#define PRISMAQUANT_MODEL_LAYER_PAGES_H_

// LayerPages: the mapped weights of the layer that is being worked on. Asks the system to read
// those of the layer to come, and when it ends gives back the memory of its own, so that a run
// holds one layer's pages and not the checkpoint's. Tensors that alias the pages stay valid: what
// is touched later is read again. The model must outlive it.

#include <string>
#include <vector>

#include "model/model.h"

namespace prismaquant {

class LayerPages {
 public:
  // `next`: the layer to come; none if there is no such layer.
  LayerPages(const Model& model, int layer, int next)
      : model_(model), tensors_(model.LayerTensors(layer)) {
    model.checkpoint().WillNeed(model.LayerTensors(next));
  }
  ~LayerPages() { model_.checkpoint().DontNeed(tensors_); }
  LayerPages(const LayerPages&) = delete;
  LayerPages& operator=(const LayerPages&) = delete;

 private:
  const Model& model_;
  std::vector<std::string> tensors_;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_MODEL_LAYER_PAGES_H_

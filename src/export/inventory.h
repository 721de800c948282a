#ifndef PRISMAQUANT_EXPORT_INVENTORY_H_
#define PRISMAQUANT_EXPORT_INVENTORY_H_

// What a checkpoint holds beside the Linears that the program knows: which part of the model a
// tensor belongs to, and which other Linears there are. Judged by tensor names and ranks alone, so
// that it works for parts of which the program knows no more. Pure functions.

#include <string>
#include <string_view>
#include <vector>

#include "io/checkpoint.h"
#include "model/model.h"

namespace prismaquant {

// "text body", "vision", "MTP", "head and embeddings".
std::string_view PartName(Part part);
// The part of a tensor or module.
Part PartOf(std::string_view name);

// A tensor name cut at its last dot: "a.b.weight" -> {"a.b", "weight"}.
struct TensorName {
  std::string module, suffix;
};
TensorName SplitTensorName(const std::string& name);

// Module names of the Linears that are not among the model's: tensors "<module>.weight" of rank 2
// that are no embedding, and quantized ones. In file order.
std::vector<std::string> OtherLinears(const Model& model);

}  // namespace prismaquant

#endif  // PRISMAQUANT_EXPORT_INVENTORY_H_

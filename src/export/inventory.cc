#include "export/inventory.h"

#include <set>

namespace prismaquant {
namespace {

bool IsEmbedding(const std::string& module) {
  return module.substr(module.rfind('.') + 1).find("embed") != std::string::npos;
}

}  // namespace

std::string_view PartName(Part part) {
  switch (part) {
    case Part::kText:
      return "text body";
    case Part::kVision:
      return "vision";
    case Part::kMtp:
      return "MTP";
    case Part::kHead:
      return "head and embeddings";
  }
  return "";
}

Part PartOf(std::string_view name) {
  if (name.starts_with("mtp.")) return Part::kMtp;
  if (name.starts_with("model.visual.") || name.starts_with("visual.")) return Part::kVision;
  return name.find(".layers.") == std::string_view::npos ? Part::kHead : Part::kText;
}

TensorName SplitTensorName(const std::string& name) {
  const size_t dot = name.rfind('.');
  if (dot == std::string::npos) return {"", name};
  return {name.substr(0, dot), name.substr(dot + 1)};
}

std::vector<std::string> OtherLinears(const Model& model) {
  std::set<std::string> known;
  for (const LinearInfo& linear : model.linears()) known.insert(linear.name);
  std::vector<std::string> others;
  for (const std::string& tensor : model.checkpoint().names()) {
    const auto [module, suffix] = SplitTensorName(tensor);
    const bool weight = suffix == "weight" && model.checkpoint().Find(tensor)->shape.size() == 2;
    if ((weight || suffix == "weight_packed") && known.count(module) == 0 && !IsEmbedding(module)) {
      others.push_back(module);
    }
  }
  return others;
}

}  // namespace prismaquant

#include "export/verify.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string>

#include "export/exporter.h"
#include "export/quantization_config.h"
#include "formats/format.h"
#include "model/model.h"

namespace prismaquant {
namespace {

Status Wrong(const Checkpoint& checkpoint, const std::string& what) {
  return Status::Unmet(fmt::format("{}: {}", checkpoint.folder().string(), what));
}

// The Linears of the body with their stored tensors, and what is left over.
class Verifier {
 public:
  Verifier(const Checkpoint& checkpoint, const Model& model) : checkpoint_(checkpoint), model_(model) {
    for (const std::string& name : checkpoint.names()) unclaimed_.insert(name);
  }

  Status CheckLinears() {
    for (const LinearInfo& linear : model_.linears()) {
      PQ_RETURN_IF_ERROR(CheckLinear(linear));
    }
    return CheckFusedSets();
  }

  Status CheckConfig() {
    const Json& config = checkpoint_.config();
    const Json quantization = config.value("quantization_config", Json());
    bool quantized = false;
    for (const auto& [linear, format] : formats_) quantized |= format != &SourceFormat();
    if (quantized != !quantization.is_null()) {
      return Wrong(checkpoint_, quantized ? "holds quantized Linears but config.json has no quantization_config"
                                          : "config.json has a quantization_config but no Linear is quantized");
    }
    return VerifyConfig(quantization, model_.profile(), formats_, OtherLinearsOf(model_, formats_));
  }

  // Every tensor that is not a weight of a quantized Linear is the source's.
  Status CheckSource(const Checkpoint& source) {
    std::set<std::string> replaced;
    for (const auto& [linear, format] : formats_) {
      if (format != &SourceFormat()) replaced.insert(linear + ".weight");
    }
    for (const std::string& name : source.names()) {
      if (replaced.count(name)) continue;
      const TensorView* expected = source.Find(name);
      const TensorView* found = checkpoint_.Find(name);
      if (found == nullptr) return Wrong(checkpoint_, fmt::format("tensor {} of the source is missing", name));
      const bool same = found->dtype == expected->dtype && found->shape == expected->shape &&
                        std::memcmp(found->bytes.data(), expected->bytes.data(), expected->bytes.size()) == 0;
      if (!same) return Wrong(checkpoint_, fmt::format("tensor {} differs from the source's", name));
      unclaimed_.erase(name);
    }
    if (unclaimed_.empty()) return {};
    return Wrong(checkpoint_, fmt::format("tensor {} is neither the source's nor part of a format", *unclaimed_.begin()));
  }

 private:
  Status CheckLinear(const LinearInfo& linear) {
    StoredTensors stored;
    const std::string prefix = linear.name + ".";
    for (auto name = unclaimed_.lower_bound(prefix); name != unclaimed_.end() && name->starts_with(prefix);) {
      const std::string suffix = name->substr(prefix.size());
      if (suffix == "bias") {
        ++name;
        continue;
      }
      stored[suffix] = TensorFromView(*checkpoint_.Find(*name));
      name = unclaimed_.erase(name);
    }
    const Format* format = DetectFormat(stored);
    if (format == nullptr) return Wrong(checkpoint_, fmt::format("the tensors of {} are in no known format", linear.name));
    if (Status status = CheckStored(*format, stored, linear.out, linear.in, linear.dtype); !status.ok()) {
      return Wrong(checkpoint_, fmt::format("{}: {}", linear.name, status.message()));
    }
    if (format == &SourceFormat()) unclaimed_.insert(linear.name + ".weight");
    formats_[linear.name] = format;
    std::map<std::string, double>& scales = scales_[linear.name];
    for (const char* suffix : {"weight_global_scale", "input_global_scale"}) {
      if (stored.count(suffix)) scales[suffix] = stored[suffix].item<double>();
    }
    return {};
  }

  Status CheckFusedSets() {
    std::map<std::string, std::string> first;
    for (const LinearInfo& linear : model_.linears()) {
      const auto [found, fresh] = first.try_emplace(linear.unit, linear.name);
      if (fresh) continue;
      if (formats_[linear.name] != formats_[found->second]) {
        return Wrong(checkpoint_, fmt::format("{} is {} but {}, fused with it, is {}", linear.name,
                                              formats_[linear.name]->name(), found->second,
                                              formats_[found->second]->name()));
      }
      if (scales_[linear.name] != scales_[found->second]) {
        return Wrong(checkpoint_, fmt::format("{} and {} are fused but have different global scales", linear.name, found->second));
      }
    }
    return {};
  }

  const Checkpoint& checkpoint_;
  const Model& model_;
  std::set<std::string> unclaimed_;
  std::map<std::string, const Format*> formats_;
  std::map<std::string, std::map<std::string, double>> scales_;
};

}  // namespace

Status VerifyCheckpoint(const Checkpoint& checkpoint, const Checkpoint* source) {
  PQ_ASSIGN_OR_RETURN(const std::unique_ptr<Model> model, Model::Open(checkpoint));
  Verifier verifier(checkpoint, *model);
  PQ_RETURN_IF_ERROR(verifier.CheckLinears());
  PQ_RETURN_IF_ERROR(verifier.CheckConfig());
  return source == nullptr ? Status() : verifier.CheckSource(*source);
}

}  // namespace prismaquant

#include "export/exporter.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <memory>
#include <utility>

#include "export/quantization_config.h"
#include "export/verify.h"
#include "formats/tensor_bytes.h"

namespace prismaquant {
namespace {

constexpr char kWeightSuffix[] = ".weight";

// One tensor of the planned checkpoint: copied from the source, or `suffix` of a quantized Linear.
struct PlannedTensor {
  TensorSpec spec;
  const LinearInfo* linear = nullptr;
  std::string suffix;
};

std::vector<PlannedTensor> PlanTensors(const Model& model, const std::map<std::string, const Format*>& formats) {
  std::map<std::string, const LinearInfo*> quantized;
  for (const LinearInfo& linear : model.linears()) {
    const auto format = formats.find(linear.name);
    if (format != formats.end() && format->second != &SourceFormat()) quantized[linear.name + kWeightSuffix] = &linear;
  }
  std::vector<PlannedTensor> planned;
  for (const std::string& name : model.checkpoint().names()) {
    const auto found = quantized.find(name);
    if (found == quantized.end()) {
      const TensorView* view = model.checkpoint().Find(name);
      planned.push_back({{name, view->dtype, view->shape}, nullptr, ""});
      continue;
    }
    const LinearInfo& linear = *found->second;
    for (TensorSpec& spec : formats.at(linear.name)->Layout(linear.out, linear.in, linear.dtype)) {
      std::string suffix = spec.name;
      spec.name = linear.name + "." + suffix;
      planned.push_back({std::move(spec), &linear, std::move(suffix)});
    }
  }
  return planned;
}

// The rendered tensors of the layer last asked for.
class RenderedCache {
 public:
  explicit RenderedCache(const ExportPlan& plan) : plan_(plan) {}
  Result<at::Tensor> Get(const LinearInfo& linear, const std::string& suffix) {
    if (linear.layer != layer_) {
      PQ_ASSIGN_OR_RETURN(tensors_, plan_.rendered(linear.layer));
      layer_ = linear.layer;
    }
    const auto found = tensors_.find(linear.name);
    if (found == tensors_.end() || !found->second.count(suffix)) {
      return Status::System(fmt::format("{}.{}: was not rendered", linear.name, suffix));
    }
    return found->second.at(suffix);
  }

 private:
  const ExportPlan& plan_;
  int layer_ = -1;
  std::map<std::string, StoredTensors> tensors_;
};

CheckpointWriter::Source CopyFromSource(const Checkpoint& source, const std::string& name) {
  return [&source, name](const CheckpointWriter::Sink& sink) -> Status {
    PQ_RETURN_IF_ERROR(sink(source.Find(name)->bytes));
    source.DontNeed({name});
    return {};
  };
}

CheckpointWriter::Source CopyRendered(const std::shared_ptr<RenderedCache>& cache, const PlannedTensor& planned) {
  return [cache, linear = planned.linear, suffix = planned.suffix,
          expected = planned.spec](const CheckpointWriter::Sink& sink) -> Status {
    PQ_ASSIGN_OR_RETURN(const at::Tensor tensor, cache->Get(*linear, suffix));
    if (tensor.sizes() != at::IntArrayRef(expected.shape) || FromScalarType(tensor.scalar_type()) != expected.dtype) {
      return Status::System(fmt::format("{}: was rendered with another shape or dtype than planned", expected.name));
    }
    const at::Tensor contiguous = tensor.contiguous();
    return sink(TensorBytes(contiguous));
  };
}

}  // namespace

std::vector<std::string> OtherLinearsOf(const Model& model, const std::map<std::string, const Format*>& formats) {
  std::vector<ModuleShape> modules;
  for (const std::string& name : model.checkpoint().names()) {
    if (!name.ends_with(kWeightSuffix)) continue;
    modules.push_back({name.substr(0, name.size() - std::string(kWeightSuffix).size()),
                       model.checkpoint().Find(name)->shape.size()});
  }
  return OtherLinears(modules, formats);
}

int64_t PlannedFileBytes(const Model& model, const std::map<std::string, const Format*>& formats, int64_t shard_bytes) {
  int64_t total = 0, in_shard = 0;
  std::vector<TensorSpec> shard;
  const auto close = [&] {
    total += in_shard + static_cast<int64_t>(SafetensorsHeader(shard, {{"format", "pt"}}).size());
    shard.clear();
    in_shard = 0;
  };
  for (PlannedTensor& planned : PlanTensors(model, formats)) {
    const int64_t bytes = planned.spec.bytes();
    if (!shard.empty() && in_shard + bytes > shard_bytes) close();
    in_shard += bytes;
    shard.push_back(std::move(planned.spec));
  }
  close();
  return total;
}

Status ExportCheckpoint(FileSystem& fs, const ExportPlan& plan, const std::filesystem::path& out) {
  const Checkpoint& source = plan.model->checkpoint();
  const std::vector<std::string> others = OtherLinearsOf(*plan.model, plan.formats);
  Json config = source.config();
  const Json quantization = BuildQuantizationConfig(plan.formats, others);
  PQ_RETURN_IF_ERROR(VerifyConfig(quantization, plan.model->profile(), plan.formats, others));
  if (!quantization.is_null()) config["quantization_config"] = quantization;

  PQ_ASSIGN_OR_RETURN(auto files, PassthroughFiles(source.folder()));
  files["config.json"] = config.dump(2) + "\n";
  files[kRecordFile] = plan.record.dump(2) + "\n";
  files["README.md"] = plan.card;

  const auto cache = std::make_shared<RenderedCache>(plan);
  std::vector<CheckpointWriter::Tensor> tensors;
  for (PlannedTensor& planned : PlanTensors(*plan.model, plan.formats)) {
    CheckpointWriter::Source copy = planned.linear == nullptr ? CopyFromSource(source, planned.spec.name)
                                                              : CopyRendered(cache, planned);
    tensors.push_back({std::move(planned.spec), std::move(copy)});
  }
  PQ_RETURN_IF_ERROR(CheckpointWriter::Write(fs, out, plan.options, tensors, files));
  PQ_ASSIGN_OR_RETURN(const Checkpoint written, Checkpoint::Open(out));
  return VerifyCheckpoint(written, &source);
}

}  // namespace prismaquant

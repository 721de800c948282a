#include "export/exporter.h"

#include <ATen/record_function.h>
#include <fmt/format.h>
#include <torch/torch.h>

#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "export/inventory.h"
#include "export/quantization_config.h"
#include "export/verify.h"
#include "formats/tensor_bytes.h"

namespace prismaquant {
namespace {

// One tensor to be written: the source's tensor of that name, an expert's slice of a packed one, or
// a tensor of a quantized Linear.
struct PlannedTensor {
  TensorSpec spec;
  const LinearInfo* linear = nullptr;  // null: the source's tensor
  std::string suffix = {};             // empty: the slice
};

using FormatMap = std::map<std::string, const Format*>;
using LinearMap = std::map<std::string, const LinearInfo*>;

Result<LinearMap> CheckFormats(const Model& model, const FormatMap& formats) {
  LinearMap linears;
  for (const LinearInfo& linear : model.linears()) {
    const auto format = formats.find(linear.name);
    if (format == formats.end()) {
      return Status::InvalidInput(fmt::format("{}: no format is chosen for it", linear.name));
    }
    if (!format->second->Supports(linear.out, linear.in)) {
      return Status::InvalidInput(fmt::format("{}: {} cannot store its shape [{}, {}]", linear.name,
                                              format->second->name(), linear.out, linear.in));
    }
    linears[linear.name] = &linear;
  }
  for (const auto& [name, format] : formats) {
    if (linears.count(name) == 0) {
      return Status::InvalidInput(
          fmt::format("{}: a format is chosen, but the model has no such Linear", name));
    }
  }
  return linears;
}

// Appends the tensors with which a Linear takes the place of its weight.
void AppendLinear(const LinearInfo& linear, const Format& format,
                  std::vector<PlannedTensor>& planned) {
  if (format.compression_format().empty()) {
    planned.push_back(
        {{linear.name + ".weight", linear.dtype, {linear.out, linear.in}}, &linear, ""});
    return;
  }
  for (TensorSpec& spec : format.Layout(linear.out, linear.in, linear.dtype)) {
    std::string stored = spec.name;
    spec.name = linear.name + "." + stored;
    planned.push_back({std::move(spec), &linear, std::move(stored)});
  }
}

// Packed tensors that are written expert by expert, with their Linears: all of a part in which any
// expert is quantized, since a reader takes the experts of a model either way, but not both.
std::map<std::string, std::vector<const LinearInfo*>> UnpackedExperts(const Model& model,
                                                                      const FormatMap& formats) {
  std::set<Part> quantized;
  for (const LinearInfo& linear : model.linears()) {
    if (linear.is_expert && !formats.at(linear.name)->compression_format().empty()) {
      quantized.insert(linear.part);
    }
  }
  std::map<std::string, std::vector<const LinearInfo*>> unpacked;
  for (const LinearInfo& linear : model.linears()) {
    if (linear.packed.tensor.empty() || quantized.count(linear.part) == 0) continue;
    unpacked[linear.packed.tensor].push_back(&linear);
  }
  return unpacked;
}

// All tensors in the order in which they are written.
Result<std::vector<PlannedTensor>> PlanTensors(const Model& model, const FormatMap& formats) {
  PQ_ASSIGN_OR_RETURN(const LinearMap linears, CheckFormats(model, formats));
  const auto unpacked = UnpackedExperts(model, formats);
  std::vector<PlannedTensor> planned;
  for (const std::string& name : model.checkpoint().names()) {
    if (const auto experts = unpacked.find(name); experts != unpacked.end()) {
      for (const LinearInfo* linear : experts->second) {
        AppendLinear(*linear, *formats.at(linear->name), planned);
      }
      continue;
    }
    const auto [module, suffix] = SplitTensorName(name);
    const auto found = linears.find(module);
    const bool replaced = suffix == "weight" && found != linears.end() &&
                          !formats.at(module)->compression_format().empty();
    if (replaced) {
      AppendLinear(*found->second, *formats.at(module), planned);
    } else {
      const TensorView& view = *model.checkpoint().Find(name);
      planned.push_back({{name, view.dtype, view.shape}});
    }
  }
  return planned;
}

// The tensors of the one Linear that is being written.
class RenderedLinear {
 public:
  explicit RenderedLinear(const ExportPlan& plan) : plan_(plan) {}

  Status Write(const LinearInfo& linear, const std::string& suffix,
               const CheckpointWriter::Sink& sink) {
    if (name_ != linear.name) PQ_RETURN_IF_ERROR(Load(linear));
    return sink(TensorBytes(stored_.at(suffix)));
  }

 private:
  Status Load(const LinearInfo& linear) {
    stored_.clear();
    PQ_ASSIGN_OR_RETURN(StoredTensors stored, plan_.rendered(linear.name));
    for (auto& [suffix, tensor] : stored) tensor = tensor.contiguous().cpu();
    const Format& format = *plan_.formats.at(linear.name);
    if (const Status status = CheckStored(format, stored, linear.out, linear.in, linear.dtype);
        !status.ok()) {
      return Status::InvalidInput(linear.name + ": " + status.message());
    }
    name_ = linear.name;
    stored_ = std::move(stored);
    return {};
  }

  const ExportPlan& plan_;
  std::string name_;
  StoredTensors stored_;
};

Status PassThrough(const Model& model, const std::string& name,
                   const CheckpointWriter::Sink& sink) {
  if (model.IsSmoothed(name)) {
    PQ_ASSIGN_OR_RETURN(const at::Tensor tensor, model.LoadTensor(name));
    PQ_RETURN_IF_ERROR(sink(TensorBytes(tensor.contiguous())));
  } else {
    PQ_ASSIGN_OR_RETURN(const TensorView view, model.checkpoint().Get(name));
    PQ_RETURN_IF_ERROR(model.checkpoint().ForEachPiece(view, sink));
  }
  model.checkpoint().DontNeed({name});
  return {};
}

Status WriteSlice(const Model& model, const LinearInfo& linear,
                  const CheckpointWriter::Sink& sink) {
  PQ_ASSIGN_OR_RETURN(const at::Tensor slice, model.LoadWeight(linear));
  PQ_RETURN_IF_ERROR(sink(TensorBytes(slice.contiguous())));
  const std::vector<int64_t>& shape = model.checkpoint().Find(linear.packed.tensor)->shape;
  const bool last =
      linear.packed.expert + 1 == shape[0] && linear.packed.row + linear.out == shape[1];
  if (last) model.checkpoint().DontNeed({linear.packed.tensor});
  return {};
}

std::vector<CheckpointWriter::Tensor> WriterTensors(const ExportPlan& plan,
                                                    std::vector<PlannedTensor> planned) {
  const auto rendered = std::make_shared<RenderedLinear>(plan);
  std::vector<CheckpointWriter::Tensor> tensors;
  for (PlannedTensor& tensor : planned) {
    CheckpointWriter::Source write;
    if (tensor.linear == nullptr) {
      write = [model = plan.model, name = tensor.spec.name](const CheckpointWriter::Sink& sink) {
        return PassThrough(*model, name, sink);
      };
    } else if (tensor.suffix.empty()) {
      write = [model = plan.model, linear = tensor.linear](const CheckpointWriter::Sink& sink) {
        return WriteSlice(*model, *linear, sink);
      };
    } else {
      write = [rendered, linear = tensor.linear,
               suffix = tensor.suffix](const CheckpointWriter::Sink& sink) {
        return rendered->Write(*linear, suffix, sink);
      };
    }
    tensors.push_back({std::move(tensor.spec), std::move(write)});
  }
  return tensors;
}

Result<std::map<std::string, std::string>> OtherFiles(const ExportPlan& plan) {
  const Checkpoint& source = plan.model->checkpoint();
  std::map<std::string, std::string> files;
  PQ_ASSIGN_OR_RETURN(files, PassthroughFiles(source.folder()));
  Json config = source.config();
  const Json quantization =
      BuildQuantizationConfig(plan.model->profile(), plan.formats, OtherLinears(*plan.model));
  if (!quantization.is_null()) config["quantization_config"] = quantization;
  files["config.json"] = config.dump(2) + "\n";
  if (!plan.run_record.is_null()) files[kRecordFile] = plan.run_record.dump(2) + "\n";
  if (!plan.card.empty()) files["README.md"] = plan.card;
  return files;
}

Status VerifyFolder(const std::filesystem::path& folder, const Checkpoint& source) {
  RECORD_USER_SCOPE("verify");
  PQ_ASSIGN_OR_RETURN(const Checkpoint written, Checkpoint::Open(folder));
  return VerifyCheckpoint(written, &source);
}

}  // namespace

Status ExportCheckpoint(FileSystem& fs, const ExportPlan& plan, const std::filesystem::path& out) {
  const Checkpoint& source = plan.model->checkpoint();
  PQ_RETURN_IF_ERROR(RequireUnquantized(source));
  std::vector<PlannedTensor> planned;
  PQ_ASSIGN_OR_RETURN(planned, PlanTensors(*plan.model, plan.formats));
  std::map<std::string, std::string> files;
  PQ_ASSIGN_OR_RETURN(files, OtherFiles(plan));

  CheckpointWriter::Options options = plan.options;
  options.check = [&](const std::filesystem::path& folder) -> Status {
    PQ_RETURN_IF_ERROR(VerifyFolder(folder, source));
    return plan.options.check ? plan.options.check(folder) : Status();
  };
  return CheckpointWriter::Write(fs, out, options, WriterTensors(plan, std::move(planned)), files);
}

Result<int64_t> PlannedFileBytes(const Model& model, const FormatMap& formats,
                                 const CheckpointWriter::Options& options) {
  std::vector<PlannedTensor> planned;
  PQ_ASSIGN_OR_RETURN(planned, PlanTensors(model, formats));
  std::vector<TensorSpec> specs;
  for (PlannedTensor& tensor : planned) specs.push_back(std::move(tensor.spec));
  return CheckpointWriter::FileBytes(specs, options);
}

}  // namespace prismaquant

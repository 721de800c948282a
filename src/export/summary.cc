#include "export/summary.h"

#include <algorithm>
#include <set>
#include <utility>

namespace prismaquant {
namespace {

void Add(const FormatTotals& from, FormatTotals& to) {
  to.linears += from.linears;
  to.weights += from.weights;
  to.bytes += from.bytes;
  to.payload += from.payload;
}

FormatTotals Totals(const StoredLinear& linear) {
  return {1, linear.out * linear.in, linear.format->Bytes(linear.out, linear.in, linear.dtype),
          linear.format->PayloadBytes(linear.out, linear.in, linear.dtype)};
}

// Linears that count in bpp: those with a choice, and of the vision tower and the output projection
// only if they were given one.
double BitsPerWeight(const Model& model, const std::map<std::string, StoredLinear>& linears) {
  const auto quantized = [&](Part part) {
    return std::any_of(model.linears().begin(), model.linears().end(), [&](const auto& info) {
      return info.part == part && linears.at(info.name).format != &SourceFormat();
    });
  };
  const bool vision = quantized(Part::kVision), head = quantized(Part::kHead);
  FormatTotals counted;
  for (const LinearInfo& info : model.linears()) {
    const bool counts = info.part == Part::kHead
                            ? head
                            : info.allocatable && (info.part != Part::kVision || vision);
    if (counts) Add(Totals(linears.at(info.name)), counted);
  }
  if (counted.weights == 0) return 0;
  return 8.0 * static_cast<double>(counted.payload) / static_cast<double>(counted.weights);
}

CheckpointSummary Collect(const Model& model, const std::map<std::string, StoredLinear>& linears) {
  CheckpointSummary summary;
  std::set<std::string> packed, expert_units;
  for (const LinearInfo& info : model.linears()) {
    if (info.is_expert) expert_units.insert(info.unit);
  }
  int64_t expert_bytes = 0;
  for (const auto& [name, linear] : linears) {
    packed.insert(linear.packed.tensor);
    const FormatTotals totals = Totals(linear);
    const std::string format(linear.format->name());
    Add(totals, summary.parts[PartOf(name)].formats[format]);
    if (linear.layer >= 0) Add(totals, summary.layers[linear.layer][format]);
    summary.parameters += totals.weights;
    summary.linear_bytes += totals.bytes;
    (expert_units.count(linear.unit) > 0 ? expert_bytes : summary.active_bytes) += totals.bytes;
  }
  if (model.config().mixture) {
    const MixtureConfig& mixture = *model.config().mixture;
    summary.active_bytes += expert_bytes * mixture.experts_per_token / mixture.experts;
  }
  for (const std::string& tensor : model.checkpoint().names()) {
    const auto [module, suffix] = SplitTensorName(tensor);
    if (packed.count(tensor) > 0) continue;
    if (linears.count(module) > 0 && suffix != "bias") continue;
    const TensorView& view = *model.checkpoint().Find(tensor);
    PartSummary& part = summary.parts[PartOf(tensor)];
    part.other_parameters += view.elements();
    part.other_bytes += static_cast<int64_t>(view.bytes.size());
    summary.parameters += view.elements();
  }
  summary.bpp = BitsPerWeight(model, linears);
  return summary;
}

Json TotalsToJson(const std::map<std::string, FormatTotals>& formats) {
  Json json = Json::object();
  for (const auto& [name, totals] : formats) {
    json[name] = {
        {"linears", totals.linears}, {"weights", totals.weights}, {"bytes", totals.bytes}};
  }
  return json;
}

}  // namespace

double CheckpointSummary::file_bpp() const {
  return parameters == 0 ? 0
                         : 8.0 * static_cast<double>(file_bytes) / static_cast<double>(parameters);
}

std::map<std::string, FormatTotals> CheckpointSummary::Total() const {
  std::map<std::string, FormatTotals> total;
  for (const auto& [part, content] : parts) {
    for (const auto& [format, totals] : content.formats) Add(totals, total[format]);
  }
  return total;
}

Result<CheckpointSummary> Summarize(const Model& model) {
  std::map<std::string, StoredLinear> linears;
  PQ_ASSIGN_OR_RETURN(linears, ReadStoredLinears(model));
  CheckpointSummary summary = Collect(model, linears);
  summary.file_bytes = model.checkpoint().file_bytes();
  return summary;
}

Result<CheckpointSummary> SummarizePlan(const Model& source,
                                        const std::map<std::string, const Format*>& formats,
                                        int64_t file_bytes) {
  std::map<std::string, StoredLinear> linears;
  PQ_ASSIGN_OR_RETURN(linears, ReadStoredLinears(source));
  for (const auto& [name, format] : formats) {
    const auto found = linears.find(name);
    if (found == linears.end()) {
      return Status::InvalidInput(name + ": a format is chosen, but the model has no such Linear");
    }
    found->second.format = format;
  }
  CheckpointSummary summary = Collect(source, linears);
  summary.file_bytes = file_bytes;
  return summary;
}

Json SummaryToJson(const CheckpointSummary& summary) {
  Json json = {{"parameters", summary.parameters},
               {"bytes", summary.file_bytes},
               {"linear_bytes", summary.linear_bytes},
               {"active_bytes", summary.active_bytes},
               {"bpp", summary.bpp},
               {"file_bpp", summary.file_bpp()},
               {"formats", TotalsToJson(summary.Total())},
               {"parts", Json::object()},
               {"layers", Json::array()}};
  for (const auto& [part, content] : summary.parts) {
    json["parts"][std::string(PartName(part))] = {{"formats", TotalsToJson(content.formats)},
                                                  {"other_parameters", content.other_parameters},
                                                  {"other_bytes", content.other_bytes}};
  }
  for (const auto& [layer, formats] : summary.layers) {
    json["layers"].push_back({{"layer", layer}, {"formats", TotalsToJson(formats)}});
  }
  return json;
}

}  // namespace prismaquant

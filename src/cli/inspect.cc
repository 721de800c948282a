#include <fmt/format.h>

#include <memory>
#include <string>

#include "base/progress.h"
#include "cli/command.h"
#include "cli/tables.h"
#include "export/summary.h"
#include "io/checkpoint.h"
#include "model/model.h"

namespace prismaquant {
namespace {

struct InspectOptions {
  std::string folder, json;
  bool layers = false;
};

void PrintLayers(const CheckpointSummary& summary) {
  fmt::print("\n{:<20} {:<8} {:>8} {:>16} {:>16} {:>8}\n", "layer", "format", "Linears", "weights",
             "bytes", "bits");
  for (const auto& [layer, formats] : summary.layers) {
    for (const auto& [format, totals] : formats)
      PrintFormatRow(std::to_string(layer), format, totals);
  }
}

void PrintSummary(const Model& model, const CheckpointSummary& summary, bool layers) {
  fmt::print("{:<20} {}\n", "architecture", model.config().architecture);
  fmt::print("{:<20} {}\n", "parameters", summary.parameters);
  fmt::print("{:<20} {} ({} bytes)\n", "size", FormatBytes(summary.file_bytes), summary.file_bytes);
  fmt::print("{:<20} {:.6f}\n", "bpp", summary.bpp);
  fmt::print("{:<20} {:.6f}\n\n", "file bpp", summary.file_bpp());
  PrintParts(summary);
  if (layers) PrintLayers(summary);
}

Status RunInspect(const InspectOptions& options) {
  PQ_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(options.folder));
  PQ_ASSIGN_OR_RETURN(const std::unique_ptr<Model> model, Model::Open(checkpoint));
  PQ_ASSIGN_OR_RETURN(const CheckpointSummary summary, Summarize(*model));
  if (options.json != "-") PrintSummary(*model, summary, options.layers);
  Json json = SummaryToJson(summary);
  json["schema"] = 1;
  json["architecture"] = model->config().architecture;
  return WriteJson(json, options.json);
}

}  // namespace

Command AddInspectCommand(CLI::App& app) {
  const auto options = std::make_shared<InspectOptions>();
  CLI::App* command =
      app.add_subcommand("inspect", "Print formats, bytes and bits per weight of a checkpoint");
  command->add_option("DIR", options->folder, "Checkpoint folder, quantized or not")->required();
  command->add_flag("--layers", options->layers, "Also print every layer of the text body");
  command->add_option("--json", options->json, "Write the figures as JSON; - is standard output");
  return {command, [options] { return RunInspect(*options); }};
}

}  // namespace prismaquant

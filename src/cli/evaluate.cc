#include <fmt/format.h>
#include <torch/torch.h>

#include <memory>
#include <string>

#include "cli/calibration_store.h"
#include "cli/session.h"
#include "cli/tables.h"
#include "export/exporter.h"
#include "io/file_system.h"

namespace prismaquant {
namespace {

struct EvaluateFlags {
  std::string source, out, text, images, json, log_probs, precision = "float32";
  int64_t tokens = 8192, window = 512;
  int threads = 0;
};

// The prediction that OUT carries; text negative if there is none.
PartLosses RecordedPrediction(const std::filesystem::path& out) {
  PartLosses predicted{.text = -1};
  const Result<std::string> text = ReadFile(out / kRecordFile);
  if (!text.ok()) return predicted;
  const Result<Json> json = ParseJson(*text, kRecordFile);
  if (!json.ok() || !json->is_object()) return predicted;
  const auto number = [](const Json& object, const char* key, double fallback) {
    const bool found = object.is_object() && object.contains(key) && object[key].is_number();
    return found ? object[key].get<double>() : fallback;
  };
  predicted.text = number(*json, "predicted_kl", -1);
  if (json->contains("predicted")) predicted.caption = number((*json)["predicted"], "caption", 0);
  return predicted;
}

Json LogProbsToJson(const Evaluation& evaluation) {
  Json json = {{"schema", 1}, {"windows", Json::array()}};
  for (const TokenLogProbs& window : evaluation.log_probs) {
    json["windows"].push_back(
        {{"ids", window.ids}, {"source", window.source}, {"quantized", window.quantized}});
  }
  return json;
}

Status RunEvaluate(const EvaluateFlags& flags) {
  if (flags.threads > 0) at::set_num_threads(flags.threads);
  PQ_ASSIGN_OR_RETURN(const Checkpoint source_checkpoint, Checkpoint::Open(flags.source));
  PQ_ASSIGN_OR_RETURN(const Checkpoint out_checkpoint, Checkpoint::Open(flags.out));
  PQ_ASSIGN_OR_RETURN(const auto source, Model::Open(source_checkpoint));
  PQ_ASSIGN_OR_RETURN(const auto out, Model::Open(out_checkpoint));
  PQ_ASSIGN_OR_RETURN(const Tokenizer tokenizer, Tokenizer::Load(flags.source));
  Calibration data;
  PQ_ASSIGN_OR_RETURN(data.text,
                      EvaluationWindows(flags.text, tokenizer, flags.tokens, flags.window));
  if (!flags.images.empty()) {
    PQ_ASSIGN_OR_RETURN(data.captions, LoadModelCaptions(*source, tokenizer, flags.images, 0));
  }
  const ComputeOptions compute{.dtype =
                                   ComputeType(flags.precision, source->linears().front().dtype)};
  PQ_ASSIGN_OR_RETURN(const Evaluation evaluation, Evaluate(*source, *out, data, compute));
  const PartLosses predicted = RecordedPrediction(flags.out);
  if (flags.json != "-") PrintEvaluation(evaluation, predicted);
  if (!flags.log_probs.empty())
    PQ_RETURN_IF_ERROR(WriteJson(LogProbsToJson(evaluation), flags.log_probs));
  return WriteJson(evaluation.ToJson(predicted.text), flags.json);
}

}  // namespace

Command AddEvaluateCommand(CLI::App& app) {
  const auto flags = std::make_shared<EvaluateFlags>();
  CLI::App* command = app.add_subcommand(
      "evaluate", "Measure KL, perplexity, captions and drafts against the source");
  command->add_option("SRC", flags->source, "Source checkpoint folder")->required();
  command->add_option("OUT", flags->out, "Quantized checkpoint folder")->required();
  command->add_option("--text", flags->text, "Held-out text, read as one stream")->required();
  command->add_option("--images", flags->images,
                      "Captioned images: a folder, or .jsonl with image and text");
  command->add_option("--eval-tokens", flags->tokens, "Tokens from the start of the text")
      ->check(CLI::Range(2, 1 << 30))
      ->capture_default_str();
  command->add_option("--window", flags->window, "Tokens per window")
      ->check(CLI::Range(2, 1 << 20))
      ->capture_default_str();
  command->add_option("--precision", flags->precision, "Arithmetic of both forward passes")
      ->check(CLI::IsMember({"bf16", "float32"}))
      ->capture_default_str();
  command->add_option("--threads", flags->threads, "Threads; 0 takes all processors")
      ->check(CLI::Range(0, 4096));
  command->add_option("--token-logprobs", flags->log_probs,
                      "Write each token's log-probability under both as JSON");
  command->add_option("--json", flags->json, "Write the figures as JSON; - is standard output");
  return {command, [flags] { return RunEvaluate(*flags); }};
}

}  // namespace prismaquant

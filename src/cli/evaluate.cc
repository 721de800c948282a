#include <fmt/format.h>
#include <torch/torch.h>

#include <memory>
#include <string>

#include "cli/session.h"
#include "cli/tables.h"
#include "export/exporter.h"
#include "io/file_system.h"

namespace prismaquant {
namespace {

struct EvaluateFlags {
  std::string source, out, text, json, log_probs, precision = "float32";
  int64_t tokens = 8192, window = 512;
  int threads = 0;
};

// The prediction that OUT carries, negative if there is none.
double RecordedPrediction(const std::filesystem::path& out) {
  const Result<std::string> text = ReadFile(out / kRecordFile);
  if (!text.ok()) return -1;
  const Result<Json> json = ParseJson(*text, kRecordFile);
  if (!json.ok() || !json->contains("predicted_kl") || !(*json)["predicted_kl"].is_number())
    return -1;
  return (*json)["predicted_kl"].get<double>();
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
  PQ_ASSIGN_OR_RETURN(const TokenWindows windows,
                      EvaluationWindows(flags.text, tokenizer, flags.tokens, flags.window));
  const ComputeOptions compute{.dtype =
                                   ComputeType(flags.precision, source->linears().front().dtype)};
  PQ_ASSIGN_OR_RETURN(const Evaluation evaluation, Evaluate(*source, *out, windows, compute));
  const double predicted = RecordedPrediction(flags.out);
  if (flags.json != "-") PrintEvaluation(evaluation, predicted);
  if (!flags.log_probs.empty())
    PQ_RETURN_IF_ERROR(WriteJson(LogProbsToJson(evaluation), flags.log_probs));
  return WriteJson(evaluation.ToJson(predicted), flags.json);
}

}  // namespace

Command AddEvaluateCommand(CLI::App& app) {
  const auto flags = std::make_shared<EvaluateFlags>();
  CLI::App* command = app.add_subcommand(
      "evaluate", "Measure KL, perplexity and top-1 agreement against the source");
  command->add_option("SRC", flags->source, "Source checkpoint folder")->required();
  command->add_option("OUT", flags->out, "Quantized checkpoint folder")->required();
  command->add_option("--text", flags->text, "Held-out text, read as one stream")->required();
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

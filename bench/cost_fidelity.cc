// cost_fidelity SRC --calibration FILE [--text HELDOUT] ...
//
// Compares cost models with what they predict: the KL of the source with one Linear alone in a
// format, measured on held-out text, for Linears, or fused units, drawn at random from the text
// body.

#include <fmt/format.h>
#include <torch/torch.h>

#include <CLI/CLI.hpp>
#include <filesystem>
#include <string>
#include <vector>

#include "base/json.h"
#include "base/progress.h"
#include "bench/fidelity/agreement.h"
#include "bench/fidelity/cases.h"
#include "bench/fidelity/estimators.h"
#include "bench/fidelity/measured_kl.h"
#include "bench/fidelity/observations.h"
#include "bench/fidelity/source_body.h"
#include "data/calibration.h"
#include "formats/torch_guard.h"
#include "io/file_system.h"
#include "tokenizer/tokenizer.h"

namespace prismaquant {
namespace {

constexpr int64_t kEvaluationWindow = 512;
// Nats per token; what is smaller drowns in the rounding of float32 and decides no allocation.
constexpr double kNegligibleKl = 1e-6;

struct Flags {
  std::string source, text, json, measured;
  CalibrationOptions calibration;
  std::string calibration_file;
  int64_t draws = 1, eval_tokens = 16384, linears = 60;
  std::vector<std::string> formats = {"nvfp4", "fp8", "mxfp8"};
  bool units = false, weights_only = false;
};

struct Comparison {
  std::vector<FidelityCase> cases;
  std::vector<CaseObservations> observations;  // as cases
  MeasuredKls measured;
  size_t windows = 0;       // measured
  int64_t loss_tokens = 0;  // of the calibration

  double Kl(const FidelityCase& one, const std::string& format) const {
    return measured.at(one.name).at(format).Mean(windows);
  }
};

Result<TokenWindows> ReadWindows(const Flags& flags, const Tokenizer& tokenizer,
                                 const Model& model) {
  if (!flags.text.empty()) {
    return EvaluationWindows(flags.text, tokenizer, flags.eval_tokens, kEvaluationWindow);
  }
  return HeldOutWindows(flags.calibration.file, tokenizer, flags.source, model.config().vocab_size,
                        flags.eval_tokens, kEvaluationWindow);
}

Json MeasuredIdentity(const Flags& flags, const TokenWindows& calibration) {
  const auto name = [](const std::string& path) {
    return WithoutSeparator(std::filesystem::path(path).lexically_normal()).filename().string();
  };
  return {{"source", name(flags.source)},
          {"calibration", calibration.fingerprint},
          {"text",
           flags.text.empty() ? name(flags.calibration_file) + ", last tenth" : name(flags.text)},
          {"window", kEvaluationWindow},
          {"weights_only", flags.weights_only}};
}

Result<Comparison> Measure(const Flags& flags) {
  PQ_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(flags.source));
  PQ_ASSIGN_OR_RETURN(const auto model, Model::Open(checkpoint));
  PQ_ASSIGN_OR_RETURN(const Tokenizer tokenizer, Tokenizer::Load(flags.source));
  Calibration calibration;
  PQ_ASSIGN_OR_RETURN(
      calibration.text,
      SampleCalibration(flags.calibration, tokenizer, flags.source, model->config().vocab_size));
  PQ_ASSIGN_OR_RETURN(const TokenWindows windows, ReadWindows(flags, tokenizer, *model));
  PQ_ASSIGN_OR_RETURN(const SourceBody body, SourceBody::Load(*model));
  std::vector<const Format*> formats;
  for (const std::string& name : flags.formats) formats.push_back(FindFormat(name));

  Comparison result;
  result.windows = static_cast<size_t>(windows.count());
  result.loss_tokens = calibration.text.count() * calibration.text.length();
  PQ_ASSIGN_OR_RETURN(const CalibrationPass pass, RunCalibration(body, calibration.text));
  result.cases = DrawCases(
      *model, {.count = flags.linears, .units = flags.units, .seed = flags.calibration.seed});
  CompleteCases(body, pass.input_amax, formats, result.cases);
  PQ_ASSIGN_OR_RETURN(result.measured,
                      MeasureKl(body, result.cases, windows,
                                {.weights_only = flags.weights_only,
                                 .file = flags.measured,
                                 .identity = MeasuredIdentity(flags, calibration.text)}));
  result.observations = ObserveCases(
      body, result.cases, calibration, pass,
      {.draws = flags.draws, .seed = flags.calibration.seed, .weights_only = flags.weights_only});
  return result;
}

// Indices of the cases that can be in the format and are not negligible; the names of the
// others that can be in it go to `negligible`.
std::vector<size_t> CasesOf(const Comparison& comparison, const std::string& format,
                            std::vector<std::string>& negligible) {
  std::vector<size_t> indices;
  for (size_t i = 0; i < comparison.cases.size(); ++i) {
    if (comparison.observations[i].count(format) == 0) continue;
    if (comparison.Kl(comparison.cases[i], format) < kNegligibleKl) {
      negligible.push_back(comparison.cases[i].name);
    } else {
      indices.push_back(i);
    }
  }
  return indices;
}

void PrintEstimator(const Comparison& comparison, const std::string& format,
                    const Estimator& estimator, const std::vector<size_t>& indices,
                    const std::vector<double>& measured) {
  std::vector<double> predicted;
  double error = 0;
  for (const size_t i : indices) {
    const Estimate estimate =
        estimator.Predict(comparison.observations[i].at(format), comparison.loss_tokens);
    predicted.push_back(estimate.kl);
    error += estimate.relative_error / static_cast<double>(indices.size());
  }
  const Agreement found = Compare(predicted, measured);
  fmt::print("{:<32} {:>6.3f} {:>8.3f} {:>9.3f} {:>7.3f} {:>8.3f} {:>9.3f}\n", estimator.name(),
             found.rank_correlation, found.log_correlation, found.geometric_mean, found.spread,
             found.ratio_of_sums, error);
}

void PrintFormat(const Comparison& comparison, const std::string& format) {
  std::vector<std::string> negligible;
  const std::vector<size_t> indices = CasesOf(comparison, format, negligible);
  fmt::print("\n{}: {} cases, and {} below {:.0e} nats\n", format, indices.size(),
             negligible.size(), kNegligibleKl);
  for (const std::string& name : negligible) fmt::print("  below: {}\n", name);
  if (indices.size() < 2) return;
  std::vector<double> measured;
  double error = 0;
  for (const size_t i : indices) {
    const WindowKls& kls = comparison.measured.at(comparison.cases[i].name).at(format);
    measured.push_back(kls.Mean(comparison.windows));
    error += kls.StandardError(comparison.windows) / measured.back();
  }
  fmt::print("{:<32} {:>6} {:>8} {:>9} {:>7} {:>8} {:>9}\n", "cost model", "rank", "log corr",
             "pred/meas", "spread", "of sums", "std error");
  fmt::print("{:<66} {:>17.3f}\n", "measured", error / static_cast<double>(indices.size()));
  for (const Estimator& estimator : AllEstimators()) {
    PrintEstimator(comparison, format, estimator, indices, measured);
  }
}

Json TermsToJson(const FormatObservations& format) {
  Json json = Json::object();
  for (size_t term = 0; term < kTermNames.size(); ++term) {
    Json& draws = json[std::string(kTermNames[term])] = Json::array();
    for (const std::vector<Terms>& draw : format.terms) {
      Json& sequences = draws.emplace_back(Json::array());
      for (const Terms& terms : draw) sequences.push_back(terms[term]);
    }
  }
  return json;
}

Json ToJson(const Comparison& comparison) {
  Json json = {{"schema", 1}, {"tokens", comparison.loss_tokens}, {"linears", Json::object()}};
  for (size_t i = 0; i < comparison.cases.size(); ++i) {
    const FidelityCase& one = comparison.cases[i];
    for (const auto& [name, format] : comparison.observations[i]) {
      const WindowKls& kls = comparison.measured.at(one.name).at(name);
      Json predicted = Json::object();
      for (const Estimator& estimator : AllEstimators()) {
        predicted[estimator.name()] = estimator.Predict(format, comparison.loss_tokens).kl;
      }
      json["linears"][one.name]["formats"][name] = {
          {"kl", kls.Mean(comparison.windows)},
          {"kl_stderr", kls.StandardError(comparison.windows)},
          {"predicted", predicted},
          {"terms", TermsToJson(format)}};
    }
  }
  return json;
}

Status RunFidelity(const Flags& flags) {
  PQ_ASSIGN_OR_RETURN(const Comparison comparison, Measure(flags));
  fmt::print("{} cases; calibration {} tokens, {} draws; measured on {} windows of {}\n",
             comparison.cases.size(), comparison.loss_tokens, flags.draws, comparison.windows,
             kEvaluationWindow);
  for (const std::string& format : flags.formats) PrintFormat(comparison, format);
  if (flags.json.empty()) return {};
  return WriteFileAtomically(FileSystem::Default(), flags.json, ToJson(comparison).dump() + "\n");
}

std::vector<std::string> QuantizedFormats() {
  std::vector<std::string> names;
  for (const Format* format : AllFormats()) {
    if (format != &SourceFormat()) names.emplace_back(format->name());
  }
  return names;
}

void Register(CLI::App& app, Flags& flags) {
  const auto positive = CLI::Range(1, 1 << 30);
  app.add_option("SRC", flags.source, "Source checkpoint folder")->required();
  app.add_option("--calibration", flags.calibration_file, "Calibration text")->required();
  app.add_option("--samples", flags.calibration.samples, "Calibration sequences")
      ->check(positive)
      ->capture_default_str();
  app.add_option("--tokens", flags.calibration.tokens, "Tokens per sequence")
      ->check(positive)
      ->capture_default_str();
  app.add_option("--seed", flags.calibration.seed, "Draws windows, labels and Linears")
      ->capture_default_str();
  app.add_option("--draws", flags.draws, "Draws of labels per sequence")
      ->check(positive)
      ->capture_default_str();
  app.add_option("--text", flags.text,
                 "Held-out text (default: the last tenth of the calibration text)");
  app.add_option("--eval-tokens", flags.eval_tokens, "Tokens to measure on")
      ->check(positive)
      ->capture_default_str();
  app.add_option("--linears", flags.linears, "How many Linears to draw from the text body")
      ->check(positive)
      ->capture_default_str();
  app.add_option("--formats", flags.formats, "Formats to compare in")
      ->delimiter(',')
      ->check(CLI::IsMember(QuantizedFormats()))
      ->capture_default_str();
  app.add_flag("--units", flags.units, "Draw fused units instead of Linears");
  app.add_flag("--weights-only", flags.weights_only, "Activations stay as they are");
  app.add_option("--measured", flags.measured, "JSON file that keeps what was measured");
  app.add_option("--json", flags.json, "Write all figures as JSON");
}

}  // namespace
}  // namespace prismaquant

int main(int argc, char** argv) {
  CLI::App app("Compares cost models with the measured KL of single Linears.", "cost_fidelity");
  prismaquant::Flags flags;
  prismaquant::Register(app, flags);
  CLI11_PARSE(app, argc, argv);
  flags.calibration.file = flags.calibration_file;
  const prismaquant::Status status =
      prismaquant::GuardTorch("cost_fidelity", [&] { return prismaquant::RunFidelity(flags); });
  if (!status.ok()) fmt::print(stderr, "cost_fidelity: {}\n", status.message());
  return status.exit_code();
}

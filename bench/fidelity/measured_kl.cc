#include "bench/fidelity/measured_kl.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <utility>

#include "base/progress.h"
#include "io/file_system.h"

namespace prismaquant {
namespace {

constexpr int64_t kChunkWindows = 4;
constexpr int64_t kBlockElements = 8'000'000;  // float32 logits held

// The source's Linears but for those of a case.
class QuantizedCase : public LinearRunner {
 public:
  QuantizedCase(const SourceBody& body, const FidelityCase& one, const Format& format,
                bool weights_only)
      : weights_(body.weights(one.layer())),
        scales_(one.scales),
        format_(format),
        quantize_(format.quantizes_activations() && !weights_only) {
    for (const LinearInfo& linear : one.linears) {
      rounded_[linear.name] = RoundedWeight(body, one, linear, format);
    }
  }

  at::Tensor Apply(const LinearInfo& linear, const at::Tensor& x) override {
    const auto rounded = rounded_.find(linear.name);
    if (rounded == rounded_.end()) return Multiply(weights_, linear.name, x);
    const bool quantized = quantize_ && x.numel() > 0;
    return MultiplyLinear(quantized ? format_.QuantizeActivation(x, scales_) : x, rounded->second,
                          weights_.bias.at(linear.name));
  }

 private:
  const LayerWeights& weights_;
  const SharedScales& scales_;
  const Format& format_;
  std::map<std::string, at::Tensor> rounded_;
  bool quantize_;
};

Result<MeasuredKls> ReadMeasured(const MeasureOptions& options) {
  MeasuredKls measured;
  if (options.file.empty() || !std::filesystem::exists(options.file)) return measured;
  PQ_ASSIGN_OR_RETURN(const std::string text, ReadFile(options.file));
  PQ_ASSIGN_OR_RETURN(const Json json, ParseJson(text, options.file.string()));
  PQ_RETURN_IF_ERROR(GuardJson(options.file.string(), [&]() -> Status {
    if (json.at("identity") != options.identity) {
      return Status::InvalidInput(fmt::format("{}: measured with {}, expected {}",
                                              options.file.string(), json.at("identity").dump(),
                                              options.identity.dump()));
    }
    for (const auto& [linear, formats] : json.at("linears").items()) {
      for (const auto& [format, kl] : formats.items()) {
        measured[linear][format].windows = kl.at("windows").get<std::vector<double>>();
      }
    }
    return {};
  }));
  return measured;
}

Status WriteMeasured(const MeasuredKls& measured, const MeasureOptions& options, int64_t length) {
  if (options.file.empty()) return {};
  Json json = {{"schema", 1}, {"identity", options.identity}, {"linears", Json::object()}};
  for (const auto& [linear, formats] : measured) {
    for (const auto& [format, kl] : formats) {
      const size_t count = kl.windows.size();
      json["linears"][linear][format] = {{"kl", kl.Mean(count)},
                                         {"kl_stderr", kl.StandardError(count)},
                                         {"tokens", static_cast<int64_t>(count) * length},
                                         {"windows", kl.windows}};
    }
  }
  return WriteFileAtomically(FileSystem::Default(), options.file, json.dump(1) + "\n");
}

class CaseMeter {
 public:
  CaseMeter(const SourceBody& body, const std::vector<FidelityCase>& cases,
            const TokenWindows& windows, const MeasureOptions& options)
      : body_(body),
        cases_(cases),
        windows_(windows),
        options_(options),
        context_(body.Context(windows.length())),
        block_(
            std::clamp<int64_t>(kBlockElements / body.head().vocab_size(), 1, windows.length())) {}

  Result<MeasuredKls> Run() {
    PQ_ASSIGN_OR_RETURN(measured_, ReadMeasured(options_));
    int64_t per_chunk = 0;
    for (const FidelityCase& one : cases_) per_chunk += static_cast<int64_t>(one.formats.size());
    const int64_t chunks = (windows_.count() + kChunkWindows - 1) / kChunkWindows;
    Progress progress("measured KL", per_chunk * chunks, "cases in a format");
    for (int64_t first = 0; first < windows_.count(); first += kChunkWindows) {
      count_ = std::min(kChunkWindows, windows_.count() - first);
      PQ_RETURN_IF_ERROR(MeasureChunk(first, progress));
    }
    return std::move(measured_);
  }

 private:
  Status MeasureChunk(int64_t first, Progress& progress) {
    bool loaded = false;
    for (const FidelityCase& one : cases_) {
      bool added = false;
      for (const Format* format : one.formats) {
        std::vector<double>& kls = measured_[one.name][std::string(format->name())].windows;
        if (static_cast<int64_t>(kls.size()) >= first + count_) {
          progress.Skip(1);
          continue;
        }
        if (!loaded) PQ_RETURN_IF_ERROR(LoadSource(first));
        loaded = added = true;
        kls.resize(static_cast<size_t>(first));
        MeasureCase(one, *format, kls);
        progress.Advance();
      }
      if (added) PQ_RETURN_IF_ERROR(WriteMeasured(measured_, options_, windows_.length()));
    }
    return {};
  }

  // Hidden states before every layer, and what the source predicts.
  Status LoadSource(int64_t first) {
    hidden_.clear();
    log_probs_.clear();
    PQ_ASSIGN_OR_RETURN(at::Tensor embedded, body_.Embed(windows_, first, count_));
    hidden_.push_back(std::move(embedded));
    for (int layer = 0; layer < body_.layers(); ++layer) {
      SourceLinears linears(body_.weights(layer));
      hidden_.push_back(body_.Run(layer, context_, hidden_.back(), linears));
    }
    ForBlocks(hidden_.back(), [&](int64_t, const at::Tensor& x) {
      log_probs_.push_back(at::log_softmax(body_.head().Logits(x), -1));
    });
    return {};
  }

  void MeasureCase(const FidelityCase& one, const Format& format, std::vector<double>& kls) const {
    QuantizedCase quantized(body_, one, format, options_.weights_only);
    at::Tensor x =
        body_.Run(one.layer(), context_, hidden_[static_cast<size_t>(one.layer())], quantized);
    for (int layer = one.layer() + 1; layer < body_.layers(); ++layer) {
      SourceLinears linears(body_.weights(layer));
      x = body_.Run(layer, context_, x, linears);
    }
    std::vector<double> sums(static_cast<size_t>(count_), 0);
    size_t block = 0;
    ForBlocks(x, [&](int64_t window, const at::Tensor& hidden) {
      const at::Tensor& p = log_probs_[block++];
      const at::Tensor q = at::log_softmax(body_.head().Logits(hidden), -1);
      const at::Tensor kl = (p.exp() * (p - q)).sum(-1);
      sums[static_cast<size_t>(window)] += kl.sum(at::kDouble).item<double>();
    });
    for (const double sum : sums) kls.push_back(sum / static_cast<double>(windows_.length()));
  }

  // Blocks of tokens of each window of hidden [windows, tokens, hidden_size], in order.
  template <typename Body>
  void ForBlocks(const at::Tensor& hidden, Body body) const {
    for (int64_t window = 0; window < count_; ++window) {
      for (int64_t begin = 0; begin < windows_.length(); begin += block_) {
        body(window, hidden[window].narrow(0, begin, std::min(block_, windows_.length() - begin)));
      }
    }
  }

  const SourceBody& body_;
  const std::vector<FidelityCase>& cases_;
  const TokenWindows& windows_;
  const MeasureOptions& options_;
  SequenceContext context_;
  int64_t block_;
  int64_t count_ = 0;  // windows of the chunk
  std::vector<at::Tensor> hidden_, log_probs_;
  MeasuredKls measured_;
};

}  // namespace

double WindowKls::Mean(size_t count) const {
  return std::accumulate(windows.begin(), windows.begin() + static_cast<ptrdiff_t>(count), 0.0) /
         static_cast<double>(count);
}

double WindowKls::StandardError(size_t count) const {
  if (count < 2) return 0;
  const double mean = Mean(count);
  double squares = 0;
  for (size_t i = 0; i < count; ++i) squares += (windows[i] - mean) * (windows[i] - mean);
  return std::sqrt(squares / static_cast<double>(count * (count - 1)));
}

Result<MeasuredKls> MeasureKl(const SourceBody& body, const std::vector<FidelityCase>& cases,
                              const TokenWindows& windows, const MeasureOptions& options) {
  const at::NoGradGuard no_grad;
  return CaseMeter(body, cases, windows, options).Run();
}

}  // namespace prismaquant

#include "bench/fidelity/observations.h"

#include <torch/torch.h>

#include <algorithm>
#include <utility>

#include "base/progress.h"
#include "bench/fidelity/case_observer.h"
#include "probe/linear_probe.h"
#include "probe/loss.h"

namespace prismaquant {
namespace {

// Set in the streams of a draw's labels; draw 0 has the probe's.
constexpr int kDrawShift = 44;

// A layer's Linears; those of cases are observed.
class ObservedLayer : public LinearRunner, public LinearObserver {
 public:
  explicit ObservedLayer(const LayerWeights& weights) : weights_(weights) {}
  void Add(const FidelityCase& one, CaseObserver observer) {
    for (size_t member = 0; member < one.linears.size(); ++member) {
      ids_[one.linears[member].name] = static_cast<int>(places_.size());
      places_.emplace_back(observers_.size(), member);
    }
    observers_.push_back(std::move(observer));
  }
  void BeginSequence() {
    for (CaseObserver& observer : observers_) observer.BeginSequence();
  }
  void EndDraw(size_t draw, size_t sequence) {
    for (CaseObserver& observer : observers_) observer.EndDraw(draw, sequence);
  }

  at::Tensor Apply(const LinearInfo& linear, const at::Tensor& x) override {
    const auto found = ids_.find(linear.name);
    if (found == ids_.end() || x.numel() == 0) return Multiply(weights_, linear.name, x);
    return ApplyProbed(x, weights_.weight.at(linear.name), weights_.bias.at(linear.name),
                       found->second, *this);
  }
  void Observe(int id, const at::Tensor& x, const at::Tensor& g, const at::Tensor& dx) override {
    const at::NoGradGuard no_grad;
    const auto& [observer, member] = places_[static_cast<size_t>(id)];
    observers_[observer].Observe(member, x, g, dx);
  }

 private:
  const LayerWeights& weights_;
  std::map<std::string, int> ids_;
  std::vector<std::pair<size_t, size_t>> places_;  // observer and member, by id
  std::vector<CaseObserver> observers_;
};

class Observation {
 public:
  Observation(const SourceBody& body, const std::vector<FidelityCase>& cases,
              const Calibration& calibration, const CalibrationPass& pass,
              const ObserveOptions& options)
      : body_(body),
        cases_(cases),
        calibration_(calibration),
        pass_(pass),
        options_(options),
        draws_(static_cast<size_t>(options.draws)),
        sequences_(static_cast<size_t>(calibration.text.count())),
        context_(body.Context(calibration.text.length())),
        results_(cases.size()) {}

  std::vector<CaseObservations> Run() {
    DrawLabels();
    int lowest = body_.layers();
    for (const FidelityCase& one : cases_) lowest = std::min(lowest, one.layer());
    Progress progress("predicted KL, backward", body_.layers() - lowest, "layers");
    for (int layer = body_.layers() - 1; layer >= lowest; --layer) {
      RunLayerBackward(layer);
      progress.Advance();
    }
    return std::move(results_);
  }

 private:
  void DrawLabels() {
    Progress progress("predicted KL, labels", static_cast<int64_t>(sequences_), "sequences");
    gradients_.resize(sequences_);
    for (size_t n = 0; n < sequences_; ++n) {
      const auto sequence = static_cast<int64_t>(n);
      LossSpan span = SpanOf(Part::kText, calibration_, sequence, LabelRule::kSampled);
      for (size_t draw = 0; draw < draws_; ++draw) {
        span.stream = static_cast<uint64_t>(sequence) | (static_cast<uint64_t>(draw) << kDrawShift);
        const SequenceLoss loss =
            LossAndGradient(body_.head(), pass_.hidden.back()[n][0], calibration_.ids(sequence),
                            span, {.seed = options_.seed});
        gradients_[n].push_back(loss.gradient.unsqueeze(0));
      }
      progress.Advance();
    }
  }

  CaseObservations EmptyObservations(const FidelityCase& one) const {
    CaseObservations result;
    for (const Format* format : one.formats) {
      result[std::string(format->name())].terms.assign(draws_,
                                                       std::vector<Terms>(sequences_, Terms{}));
    }
    return result;
  }

  void RunLayerBackward(int layer) {
    ObservedLayer runner(body_.weights(layer));
    for (size_t i = 0; i < cases_.size(); ++i) {
      if (cases_[i].layer() != layer) continue;
      results_[i] = EmptyObservations(cases_[i]);
      runner.Add(cases_[i], CaseObserver(body_, cases_[i], options_.weights_only, results_[i]));
    }
    for (size_t n = 0; n < sequences_; ++n) {
      runner.BeginSequence();
      const at::Tensor x =
          pass_.hidden[static_cast<size_t>(layer)][n].detach().requires_grad_(true);
      const at::Tensor y = body_.Run(layer, context_, x, runner);
      for (size_t draw = 0; draw < draws_; ++draw) {
        at::Tensor& gradient = gradients_[n][draw];
        gradient = torch::autograd::grad({y}, {x}, {gradient}, draw + 1 < draws_)[0];
        runner.EndDraw(draw, n);
      }
    }
  }

  const SourceBody& body_;
  const std::vector<FidelityCase>& cases_;
  const Calibration& calibration_;
  const CalibrationPass& pass_;
  const ObserveOptions& options_;
  size_t draws_, sequences_;
  SequenceContext context_;
  std::vector<std::vector<at::Tensor>> gradients_;  // per sequence and draw
  std::vector<CaseObservations> results_;
};

}  // namespace

std::vector<double> FormatObservations::PerSequence(const std::vector<WeightedTerm>& sum) const {
  std::vector<double> values(terms.front().size(), 0);
  for (const std::vector<Terms>& draw : terms) {
    for (size_t n = 0; n < values.size(); ++n) {
      for (const auto& [term, weight] : sum) {
        values[n] += weight * draw[n][static_cast<size_t>(term)];
      }
    }
  }
  for (double& value : values) value /= static_cast<double>(terms.size());
  return values;
}

Result<CalibrationPass> RunCalibration(const SourceBody& body, const TokenWindows& windows) {
  const at::NoGradGuard no_grad;
  CalibrationPass pass;
  pass.hidden.resize(static_cast<size_t>(body.layers()) + 1);
  for (int64_t n = 0; n < windows.count(); ++n) {
    PQ_ASSIGN_OR_RETURN(at::Tensor embedded, body.Embed(windows, n, 1));
    pass.hidden.front().push_back(std::move(embedded));
  }
  const SequenceContext context = body.Context(windows.length());
  Progress progress("calibration", body.layers(), "layers");
  for (int layer = 0; layer < body.layers(); ++layer) {
    MaximaRunner runner(body.weights(layer));
    for (const at::Tensor& x : pass.hidden[static_cast<size_t>(layer)]) {
      pass.hidden[static_cast<size_t>(layer) + 1].push_back(body.Run(layer, context, x, runner));
    }
    for (const LinearInfo& linear : body.model().LayerLinears(layer)) {
      pass.input_amax[linear.name] = runner.maximum(linear.name);
    }
    progress.Advance();
  }
  return pass;
}

std::vector<CaseObservations> ObserveCases(const SourceBody& body,
                                           const std::vector<FidelityCase>& cases,
                                           const Calibration& calibration,
                                           const CalibrationPass& pass,
                                           const ObserveOptions& options) {
  return Observation(body, cases, calibration, pass, options).Run();
}

}  // namespace prismaquant

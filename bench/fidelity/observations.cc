#include "bench/fidelity/observations.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/progress.h"
#include "probe/linear_probe.h"
#include "probe/loss.h"

namespace prismaquant {
namespace {

// Set in the streams of a draw's labels; draw 0 has the probe's.
constexpr int kDrawShift = 44;

double Sum(const at::Tensor& values) { return values.sum(at::kDouble).item<double>(); }

// Squares are summed along rows in float32 and the row sums in float64.
double SumOfSquares(const at::Tensor& values) {
  return Sum(values.dim() > 1 ? values.square().sum(-1) : values.to(at::kDouble).square());
}

// Pieces are `length` consecutive rows of [tokens, ..].
double WindowSquares(const at::Tensor& values, int64_t length) {
  double squares = 0;
  for (int64_t begin = 0; begin < values.size(0); begin += length) {
    const int64_t count = std::min(length, values.size(0) - begin);
    squares += SumOfSquares(values.narrow(0, begin, count).sum(0));
  }
  return squares;
}

// One case: its errors in every format, and those of the current sequence.
class CaseObserver {
 public:
  CaseObserver(const SourceBody& body, const FidelityCase& one, const ObserveOptions& options,
               int64_t sequences, CaseObservations& result)
      : weight_(body.weights(one.linear.layer).weight.at(one.linear.name)),
        scales_(one.scales),
        weights_only_(options.weights_only),
        draws_(static_cast<double>(options.draws)),
        result_(result) {
    result_.fisher_traces.assign(static_cast<size_t>(sequences), 0);
    for (const Format* format : one.formats) {
      FormatObservations& found = result_.formats[std::string(format->name())];
      found.terms.assign(static_cast<size_t>(options.draws),
                         std::vector<Terms>(static_cast<size_t>(sequences), Terms{}));
      const at::Tensor error = RoundedWeight(body, one, *format) - weight_;
      found.weight_mse = SumOfSquares(error) / static_cast<double>(error.numel());
      errors_.push_back({format, error, {}, {}, &found});
    }
  }

  // Another sequence comes; every draw shows the same x.
  void BeginSequence() { fresh_ = true; }

  void Observe(size_t draw, size_t sequence, const at::Tensor& x, const at::Tensor& g,
               const at::Tensor& dx) {
    if (fresh_) SetInput(x);
    fresh_ = false;
    const at::Tensor g_square = g.square(), x_square = x.square();
    const at::Tensor energies = g_square.sum(-1).to(at::kDouble) * x_square.sum(-1);
    result_.fisher_traces[sequence] += Sum(energies) / draws_;
    const at::Tensor weight_gradient = at::matmul(g.t(), x);
    const at::Tensor weight_gradient_squares = at::matmul(g_square.t(), x_square);
    for (const Errors& errors : errors_) {
      Terms& terms = errors.found->terms[draw][sequence];
      AddWholes(g * errors.output, terms);
      AddWeights(weight_gradient * errors.weight, terms);
      At(terms, Term::kWeightTokens) =
          Sum((weight_gradient_squares * errors.weight.square()).sum(-1));
      if (errors.input.defined()) AddInputs(dx * errors.input, terms);
    }
  }

 private:
  struct Errors {
    const Format* format;
    at::Tensor weight;  // [out, in]
    at::Tensor input;   // [tokens, in]; undefined if the activations stay
    at::Tensor output;  // [tokens, out]
    FormatObservations* found;
  };

  void SetInput(const at::Tensor& x) {
    for (Errors& errors : errors_) {
      errors.output = at::matmul(x, errors.weight.t());
      if (weights_only_ || !errors.format->quantizes_activations()) continue;
      errors.input = errors.format->QuantizeActivation(x, scales_) - x;
      errors.output = errors.output + at::matmul(errors.input, weight_.t());
    }
  }

  static double& At(Terms& terms, Term term) { return terms[static_cast<size_t>(term)]; }

  // change [tokens, out] sums to s.
  static void AddWholes(const at::Tensor& change, Terms& terms) {
    const at::Tensor per_token = change.sum(-1).to(at::kDouble);
    At(terms, Term::kWhole) = WindowSquares(per_token, per_token.size(0));
    At(terms, Term::kWhole16) = WindowSquares(per_token, 16);
    At(terms, Term::kWhole32) = WindowSquares(per_token, 32);
    At(terms, Term::kWhole64) = WindowSquares(per_token, 64);
    At(terms, Term::kWhole128) = WindowSquares(per_token, 128);
    At(terms, Term::kWhole256) = WindowSquares(per_token, 256);
    At(terms, Term::kTokens) = SumOfSquares(per_token);
    At(terms, Term::kRows) = SumOfSquares(change.sum(0));
    At(terms, Term::kRows64) = WindowSquares(change, 64);
    At(terms, Term::kElements) = SumOfSquares(change);
  }

  static void AddWeights(const at::Tensor& change, Terms& terms) {
    const at::Tensor rows = change.sum(1).to(at::kDouble);
    At(terms, Term::kWeights) = std::pow(Sum(rows), 2);
    At(terms, Term::kWeightRows) = SumOfSquares(rows);
    At(terms, Term::kWeightColumns) = SumOfSquares(change.sum(0));
    At(terms, Term::kWeightElements) = SumOfSquares(change);
  }

  static void AddInputs(const at::Tensor& change, Terms& terms) {
    const at::Tensor rows = change.sum(1).to(at::kDouble);
    At(terms, Term::kInputs) = std::pow(Sum(rows), 2);
    At(terms, Term::kInputTokens) = SumOfSquares(rows);
    At(terms, Term::kInputColumns) = SumOfSquares(change.sum(0));
    At(terms, Term::kInputElements) = SumOfSquares(change);
  }

  const at::Tensor& weight_;
  SharedScales scales_;
  bool weights_only_;
  double draws_;
  CaseObservations& result_;
  std::vector<Errors> errors_;
  bool fresh_ = true;
};

// A layer's Linears; those that are cases are observed.
class ObservedLayer : public LinearRunner, public LinearObserver {
 public:
  explicit ObservedLayer(const LayerWeights& weights) : weights_(weights) {}
  void Add(const std::string& linear, CaseObserver observer) {
    index_[linear] = static_cast<int>(observers_.size());
    observers_.push_back(std::move(observer));
  }
  void BeginSequence(size_t sequence) {
    sequence_ = sequence;
    for (CaseObserver& observer : observers_) observer.BeginSequence();
  }
  void BeginDraw(size_t draw) { draw_ = draw; }

  at::Tensor Apply(const LinearInfo& linear, const at::Tensor& x) override {
    const auto found = index_.find(linear.name);
    if (found == index_.end() || x.numel() == 0) return MultiplySource(weights_, linear, x);
    return ApplyProbed(x, weights_.weight.at(linear.name), weights_.bias.at(linear.name),
                       found->second, *this);
  }
  void Observe(int id, const at::Tensor& x, const at::Tensor& g, const at::Tensor& dx) override {
    const at::NoGradGuard no_grad;
    observers_[static_cast<size_t>(id)].Observe(draw_, sequence_, x, g, dx);
  }

 private:
  const LayerWeights& weights_;
  std::map<std::string, int> index_;
  std::vector<CaseObserver> observers_;
  size_t sequence_ = 0, draw_ = 0;
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
    for (const FidelityCase& one : cases_) lowest = std::min(lowest, one.linear.layer);
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

  void RunLayerBackward(int layer) {
    ObservedLayer runner(body_.weights(layer));
    for (size_t i = 0; i < cases_.size(); ++i) {
      if (cases_[i].linear.layer != layer) continue;
      runner.Add(cases_[i].linear.name,
                 CaseObserver(body_, cases_[i], options_, calibration_.text.count(), results_[i]));
    }
    for (size_t n = 0; n < sequences_; ++n) {
      runner.BeginSequence(n);
      const at::Tensor x =
          pass_.hidden[static_cast<size_t>(layer)][n].detach().requires_grad_(true);
      const at::Tensor y = body_.Run(layer, context_, x, runner);
      for (size_t draw = 0; draw < draws_; ++draw) {
        runner.BeginDraw(draw);
        at::Tensor& gradient = gradients_[n][draw];
        gradient = torch::autograd::grad({y}, {x}, {gradient}, draw + 1 < draws_)[0];
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

#include "cli/validate.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "evaluate/kl_meter.h"
#include "evaluate/quantized_linears.h"

namespace prismaquant {
namespace {

// The Linears of a model as the store holds them rendered.
LayerLinears RenderedLinears(const Model& model, const FormatChoice& formats, const RunStore& store,
                             const std::string& key, const ComputeOptions& compute) {
  return
      [&model, &formats, &store, key, compute](int layer) -> Result<std::shared_ptr<LinearRunner>> {
        std::map<std::string, StoredTensors> rendered;
        const std::vector<LinearInfo> linears = model.LayerLinears(layer);
        const bool quantized = std::any_of(linears.begin(), linears.end(), [&](const auto& linear) {
          return formats.at(linear.name) != &SourceFormat();
        });
        if (quantized) {
          PQ_ASSIGN_OR_RETURN(rendered, RenderedLayer(store, key, layer));
        }
        const auto tensors_of = [&](const LinearInfo& linear) -> Result<LinearTensors> {
          LinearTensors tensors{.format = formats.at(linear.name), .tensors = {}};
          if (tensors.format == &SourceFormat()) {
            PQ_ASSIGN_OR_RETURN(tensors.tensors["weight"], model.LoadWeight(linear));
          } else {
            tensors.tensors = std::move(rendered.at(linear.name));
          }
          return tensors;
        };
        PQ_ASSIGN_OR_RETURN(std::unique_ptr<QuantizedLinears> runner,
                            QuantizedLinears::Load(model, layer, compute, tensors_of));
        return std::shared_ptr<LinearRunner>(std::move(runner));
      };
}

class Validator {
 public:
  Validator(Session& session, const RenderOptions& options, const TokenWindows& text)
      : session_(session), options_(options), text_(text) {}

  // Adds the plan with its measured KL, unless it is among the points already.
  Status Add(const PlannedAllocation& plan) {
    for (const ValidatedPlan& point : points_) {
      if (point.plan.choices == plan.choices) return {};
    }
    PQ_ASSIGN_OR_RETURN(const FormatChoice formats, ToFormats(session_.model(), plan.choices));
    const std::string key = RenderKey(formats, options_);
    ValidatedPlan point{.plan = plan};
    PQ_ASSIGN_OR_RETURN(point.plan.file_bytes, ExactFileBytes(session_.model(), plan.choices));
    const std::string note = fmt::format("validation/{}/{}", key, text_.fingerprint);
    PQ_ASSIGN_OR_RETURN(const auto noted, session_.store().Note(note));
    if (!noted) {
      PQ_ASSIGN_OR_RETURN(const MeasuredKl measured, Measure(formats, key));
      point.kl = measured.kl;
      point.kl_stderr = measured.kl_stderr;
      const Json json = {{"kl", point.kl}, {"kl_stderr", point.kl_stderr}};
      PQ_RETURN_IF_ERROR(session_.store().PutNote(note, json.dump()));
    } else {
      PQ_ASSIGN_OR_RETURN(const Json json, ParseJson(*noted, note));
      point.kl = json["kl"].get<double>();
      point.kl_stderr = json["kl_stderr"].get<double>();
    }
    points_.push_back(std::move(point));
    return {};
  }

  const std::vector<ValidatedPlan>& points() const { return points_; }

  // By size, with the one that `choose` gives the index of; its rendering alone stays.
  template <class Choose>
  Result<Validation> Finish(const Choose& choose) {
    Validation validation{.points = std::move(points_)};
    std::stable_sort(
        validation.points.begin(), validation.points.end(),
        [](const auto& a, const auto& b) { return a.plan.file_bytes < b.plan.file_bytes; });
    double logarithm = 0, count = 0;
    for (const ValidatedPlan& point : validation.points) {
      if (!(point.kl > 0) || !(point.plan.losses.text > 0)) continue;
      logarithm += std::log(point.kl / point.plan.losses.text);
      ++count;
    }
    if (count > 0) validation.ratio = std::exp(logarithm / count);
    PQ_ASSIGN_OR_RETURN(validation.chosen, choose(validation.points));
    for (size_t i = 0; i < validation.points.size(); ++i) {
      if (i == validation.chosen) continue;
      PQ_ASSIGN_OR_RETURN(const FormatChoice formats,
                          ToFormats(session_.model(), validation.points[i].plan.choices));
      PQ_RETURN_IF_ERROR(DropRendering(session_.store(), RenderKey(formats, options_)));
    }
    return validation;
  }

 private:
  Result<MeasuredKl> Measure(const FormatChoice& formats, const std::string& key) {
    const ComputeOptions compute{.dtype = at::kFloat};
    PQ_RETURN_IF_ERROR(session_.Render(formats, options_, key));
    MeasuredKl measured;
    PQ_RETURN_IF_ERROR(session_.Timed("validate", [&]() -> Status {
      if (meter_ == nullptr) {
        PQ_ASSIGN_OR_RETURN(source_, Model::Open(session_.checkpoint()));
        PQ_ASSIGN_OR_RETURN(meter_, KlMeter::Make(*source_, text_, compute));
      }
      PQ_ASSIGN_OR_RETURN(
          measured, meter_->Measure(
                        session_.model(),
                        RenderedLinears(session_.model(), formats, session_.store(), key, compute),
                        fmt::format("validate, plan {}", points_.size() + 1)));
      return {};
    }));
    return measured;
  }

  Session& session_;
  const RenderOptions& options_;
  const TokenWindows& text_;
  std::unique_ptr<Model> source_;  // as it is, whatever the session smooths
  std::unique_ptr<KlMeter> meter_;
  std::vector<ValidatedPlan> points_;
};

// The smallest plan whose measured KL is within the limit.
Result<Validation> HoldLimit(Validator& validator, const Planner& planner,
                             const PlannedAllocation& first, int attempts) {
  const Budget limit = first.budget;
  Budget aim = limit;
  PlannedAllocation plan = first;
  for (int attempt = 0; attempt < attempts; ++attempt) {
    const size_t before = validator.points().size();
    PQ_RETURN_IF_ERROR(validator.Add(plan));
    if (validator.points().size() == before) break;
    const ValidatedPlan& last = validator.points().back();
    if (!(last.kl > 0) || !(last.plan.losses.text > 0)) break;
    aim.max_kl = limit.max_kl * last.plan.losses.text / last.kl;
    Result<PlannedAllocation> next = planner.Plan(aim);
    if (!next.ok()) break;
    plan = std::move(next).value();
    plan.budget = limit;
  }
  return validator.Finish([&](const std::vector<ValidatedPlan>& points) -> Result<size_t> {
    double least = points.front().kl;
    for (size_t i = 0; i < points.size(); ++i) {
      if (points[i].kl <= limit.max_kl) return i;
      least = std::min(least, points[i].kl);
    }
    return Status::Unmet(fmt::format(
        "--max-kl {}: the least KL of {} measured plans is {:.5f}; raise --validate or --max-kl",
        limit.max_kl, points.size(), least));
  });
}

// The points of the sweep, nearest to the plan's size first.
std::vector<const PlannedAllocation*> ByDistance(const ChosenPlan& chosen) {
  std::vector<const PlannedAllocation*> points;
  for (const PlannedAllocation& point : chosen.sweep) {
    if (point.feasible) points.push_back(&point);
  }
  const auto distance = [&](const PlannedAllocation* point) {
    return std::abs(point->bpp - chosen.plan.bpp);
  };
  std::stable_sort(points.begin(), points.end(),
                   [&](const auto* a, const auto* b) { return distance(a) < distance(b); });
  return points;
}

size_t KneeOfMeasured(const std::vector<ValidatedPlan>& points, size_t otherwise) {
  std::vector<PlannedAllocation> measured;
  for (const ValidatedPlan& point : points) {
    measured.push_back(point.plan);
    measured.back().feasible = true;
    measured.back().cost = point.kl;
  }
  const int knee = KneeOf(measured);
  return knee < 0 ? otherwise : static_cast<size_t>(knee);
}

}  // namespace

Json Validation::ToJson() const {
  Json json = {{"ratio", ratio}, {"points", Json::array()}};
  for (size_t i = 0; i < points.size(); ++i) {
    json["points"].push_back({{"bpp", points[i].plan.bpp},
                              {"file_bytes", points[i].plan.file_bytes},
                              {"predicted_kl", points[i].plan.losses.text},
                              {"kl", points[i].kl},
                              {"kl_stderr", points[i].kl_stderr},
                              {"chosen", i == chosen}});
  }
  return json;
}

Result<Validation> Validate(Session& session, const Planner& planner, const ChosenPlan& chosen,
                            bool knee, const RenderOptions& options, const TokenWindows& text,
                            int count) {
  Validator validator(session, options, text);
  if (chosen.plan.budget.kind == Budget::Kind::kMaxKl) {
    return HoldLimit(validator, planner, chosen.plan, count);
  }
  PQ_RETURN_IF_ERROR(validator.Add(chosen.plan));
  for (const PlannedAllocation* point : ByDistance(chosen)) {
    if (static_cast<int>(validator.points().size()) < count) {
      PQ_RETURN_IF_ERROR(validator.Add(*point));
    }
  }
  return validator.Finish([&](const std::vector<ValidatedPlan>& points) -> Result<size_t> {
    size_t own = 0;
    while (points[own].plan.choices != chosen.plan.choices) ++own;
    if (knee) return KneeOfMeasured(points, own);
    size_t best = own;
    for (size_t i = 0; i < own; ++i) {
      if (points[i].kl < points[best].kl) best = i;
    }
    return best;
  });
}

void PrintValidation(const Validation& validation) {
  fmt::print("{:>8}  {:>12}  {:>12}  {:>20}\n", "bpp", "size", "predicted KL", "measured KL");
  for (size_t i = 0; i < validation.points.size(); ++i) {
    const ValidatedPlan& point = validation.points[i];
    fmt::print("{:>8.4f}  {:>12}  {:>12.5f}  {:>9.5f} ± {:.5f}{}\n", point.plan.bpp,
               FormatBytes(point.plan.file_bytes), point.plan.losses.text, point.kl,
               point.kl_stderr, i == validation.chosen ? "  chosen" : "");
  }
  fmt::print("measured / predicted KL: {:.3f} (geometric mean)\n", validation.ratio);
}

}  // namespace prismaquant

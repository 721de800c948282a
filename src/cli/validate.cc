#include "cli/validate.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <utility>

#include "base/progress.h"
#include "cli/stored_pass.h"
#include "evaluate/quantized_linears.h"

namespace prismaquant {
namespace {

// No plan is larger.
constexpr double kAnyBpp = 64;

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

  // Adds the plan with its measured KL. False if it is among the points already.
  Result<bool> Add(const PlannedAllocation& plan) {
    for (const ValidatedPlan& point : points_) {
      if (point.plan.choices == plan.choices) return false;
    }
    PQ_ASSIGN_OR_RETURN(const FormatChoice formats, ToFormats(session_.model(), plan.choices));
    ValidatedPlan point{.plan = plan, .rendering = RenderKey(formats, options_), .measured = {}};
    MeasuredKl& measured = point.measured;
    const std::string note = fmt::format("validation/{}/{}", point.rendering, text_.fingerprint);
    PQ_ASSIGN_OR_RETURN(const auto noted, session_.store().Note(note));
    if (!noted) {
      PQ_ASSIGN_OR_RETURN(measured, Measure(formats, point.rendering));
      const Json json = {{"kl", measured.kl}, {"kl_stderr", measured.kl_stderr}};
      PQ_RETURN_IF_ERROR(session_.store().PutNote(note, json.dump()));
      PQ_RETURN_IF_ERROR(PassOf(point.rendering).Drop());
    } else {
      PQ_ASSIGN_OR_RETURN(const Json json, ParseJson(*noted, note));
      measured = {.kl = json["kl"].get<double>(), .kl_stderr = json["kl_stderr"].get<double>()};
    }
    points_.push_back(std::move(point));
    return true;
  }

  // Frees the store of a point's rendering.
  Status Drop(const ValidatedPlan& point) {
    return DropRendering(session_.store(), point.rendering);
  }

  const std::vector<ValidatedPlan>& points() const { return points_; }

 private:
  // Of the source, by its fingerprint, or of a plan, by its rendering.
  StoredPass PassOf(const std::string& model) {
    return {session_.store(), model + text_.fingerprint};
  }

  Result<MeasuredKl> Measure(const FormatChoice& formats, const std::string& key) {
    const ComputeOptions compute{.dtype = at::kFloat};
    PQ_RETURN_IF_ERROR(session_.Render(formats, options_, key));
    MeasuredKl measured;
    PQ_RETURN_IF_ERROR(session_.Timed("validate", [&]() -> Status {
      if (meter_ == nullptr) {
        PQ_ASSIGN_OR_RETURN(source_, Model::Open(session_.checkpoint()));
        StoredPass pass = PassOf(session_.identity().at("source"));
        PQ_ASSIGN_OR_RETURN(meter_, KlMeter::Make(*source_, text_, compute, &pass));
      }
      StoredPass pass = PassOf(key);
      PQ_ASSIGN_OR_RETURN(
          measured, meter_->Measure(
                        session_.model(),
                        RenderedLinears(session_.model(), formats, session_.store(), key, compute),
                        fmt::format("validate, plan {}", points_.size() + 1), &pass));
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

// The points by size, none of them chosen yet.
Validation Sorted(std::vector<ValidatedPlan> points) {
  Validation validation{.points = std::move(points)};
  std::stable_sort(
      validation.points.begin(), validation.points.end(),
      [](const auto& a, const auto& b) { return a.plan.file_bytes < b.plan.file_bytes; });
  double logarithm = 0, count = 0;
  for (const ValidatedPlan& point : validation.points) {
    if (!(point.measured.kl > 0) || !(point.plan.losses.text > 0)) continue;
    logarithm += std::log(point.measured.kl / point.plan.losses.text);
    ++count;
  }
  if (count > 0) validation.ratio = std::exp(logarithm / count);
  return validation;
}

size_t IndexOf(const std::vector<ValidatedPlan>& points, const PlannedAllocation& plan) {
  size_t i = 0;
  while (points[i].plan.choices != plan.choices) ++i;
  return i;
}

// The plan that would hold the limit if the KL of all were as much above or below the prediction as
// the last one's; the one that loses least if none would.
Result<PlannedAllocation> NextPlan(const Model& model, const Planner& planner, const Budget& limit,
                                   const ValidatedPlan& last) {
  Budget aim = limit;
  aim.max_kl = limit.max_kl * last.plan.cost / last.measured.kl;
  Result<PlannedAllocation> next = planner.Plan(aim);
  if (!next.ok() && next.status().code() == StatusCode::kUnmet) {
    next = planner.Plan({.kind = Budget::Kind::kBpp, .bpp = kAnyBpp});
  }
  PQ_RETURN_IF_ERROR(next.status());
  PlannedAllocation plan = std::move(next).value();
  plan.budget = limit;
  plan.slack = 0;
  plan.bytes_bound = 0;
  PQ_ASSIGN_OR_RETURN(plan.file_bytes, ExactFileBytes(model, plan.choices));
  return plan;
}

Result<Validation> HoldLimit(Validator& validator, const Model& model, const Planner& planner,
                             const PlannedAllocation& first, int attempts) {
  const Budget limit = first.budget;
  std::optional<ValidatedPlan> best;
  double least = std::numeric_limits<double>::infinity();
  PlannedAllocation plan = first;
  for (int attempt = 0; attempt < attempts; ++attempt) {
    PQ_ASSIGN_OR_RETURN(const bool fresh, validator.Add(plan));
    if (!fresh) break;
    const ValidatedPlan last = validator.points().back();
    const double kl = last.measured.kl;
    least = std::min(least, kl);
    const bool better =
        kl <= limit.max_kl && (!best || last.plan.file_bytes < best->plan.file_bytes);
    if (!better) {
      PQ_RETURN_IF_ERROR(validator.Drop(last));
    } else {
      if (best) PQ_RETURN_IF_ERROR(validator.Drop(*best));
      best = last;
    }
    if (!(kl > 0) || !(last.plan.cost > 0)) break;
    PQ_ASSIGN_OR_RETURN(plan, NextPlan(model, planner, limit, last));
  }
  if (!best) {
    return Status::Unmet(fmt::format("--max-kl {}: the least KL of {} measured plans is {:.5f}",
                                     limit.max_kl, validator.points().size(), least));
  }
  Validation validation = Sorted(validator.points());
  validation.chosen = IndexOf(validation.points, best->plan);
  return validation;
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
    measured.back().cost = point.measured.kl;
  }
  const int knee = KneeOf(measured);
  return knee < 0 ? otherwise : static_cast<size_t>(knee);
}

// The plan and the points of the sweep around it, `count` in all.
Result<Validation> MeasureSweep(Validator& validator, const ChosenPlan& chosen, bool knee,
                                int count) {
  PQ_RETURN_IF_ERROR(validator.Add(chosen.plan).status());
  for (const PlannedAllocation* point : ByDistance(chosen)) {
    if (static_cast<int>(validator.points().size()) == count) break;
    PQ_ASSIGN_OR_RETURN(const bool fresh, validator.Add(*point));
    if (fresh) PQ_RETURN_IF_ERROR(validator.Drop(validator.points().back()));
  }
  Validation validation = Sorted(validator.points());
  const size_t own = IndexOf(validation.points, chosen.plan);
  validation.chosen = knee ? KneeOfMeasured(validation.points, own) : own;
  if (validation.chosen != own) PQ_RETURN_IF_ERROR(validator.Drop(validation.points[own]));
  return validation;
}

}  // namespace

Json Validation::ToJson() const {
  Json json = {{"ratio", ratio}, {"points", Json::array()}};
  for (size_t i = 0; i < points.size(); ++i) {
    json["points"].push_back({{"bpp", points[i].plan.bpp},
                              {"file_bytes", points[i].plan.file_bytes},
                              {"predicted_kl", points[i].plan.losses.text},
                              {"kl", points[i].measured.kl},
                              {"kl_stderr", points[i].measured.kl_stderr},
                              {"chosen", i == chosen}});
  }
  return json;
}

Result<Validation> Validate(Session& session, const Planner& planner, const ChosenPlan& chosen,
                            bool knee, const RenderOptions& options, const TokenWindows& text,
                            int count) {
  Validator validator(session, options, text);
  const bool limited = chosen.plan.budget.kind == Budget::Kind::kMaxKl;
  return limited ? HoldLimit(validator, session.model(), planner, chosen.plan, count)
                 : MeasureSweep(validator, chosen, knee, count);
}

void PrintValidation(const Validation& validation) {
  fmt::print("{:>8}  {:>12}  {:>12}  {:>20}\n", "bpp", "size", "predicted KL", "measured KL");
  for (size_t i = 0; i < validation.points.size(); ++i) {
    const ValidatedPlan& point = validation.points[i];
    fmt::print("{:>8.4f}  {:>12}  {:>12.5f}  {:>9.5f} ± {:.5f}{}\n", point.plan.bpp,
               FormatBytes(point.plan.file_bytes), point.plan.losses.text, point.measured.kl,
               point.measured.kl_stderr, i == validation.chosen ? "  chosen" : "");
  }
  fmt::print("measured / predicted KL: {:.3f} (geometric mean)\n", validation.ratio);
}

}  // namespace prismaquant

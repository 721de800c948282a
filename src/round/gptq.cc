#include "round/gptq.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "kernels/gptq.h"
#include "round/scale_sweep.h"

namespace prismaquant {
namespace {

constexpr int64_t kBlockColumns = 128;
// A Hessian that cannot be factored is tried again with ten times the damping, at least this.
constexpr int kDampingRetries = 4;
constexpr double kSmallestRetry = 1e-4;
// Of the Hessian that a correction is solved with.
constexpr double kCorrectionDamping = 1;
constexpr double kLargestCorrection = 0.5;
// Up to this size the factorisation runs in float64.
constexpr int64_t kLargestFloat64 = 4096;

// The power of four next below `x`: dividing a Hessian by it changes the exponents of its factor
// and no other bit.
double PowerOfFour(double x) { return std::exp2(2 * std::floor(std::log2(x) / 2)); }

// The Cholesky factor of a damped Hessian over `unit`.
struct Factor {
  at::Tensor lower;  // undefined if it cannot be had
  double unit = 1;
};

// A column without inputs has the damping alone for its diagonal.
Factor FactorDamped(const at::Tensor& hessian, double damping) {
  const double mean = hessian.diagonal().to(at::kDouble).mean().item<double>();
  if (!(mean > 0) || !hessian.isfinite().all().item<bool>()) return {};
  const double unit = PowerOfFour(mean);
  const at::ScalarType type = hessian.size(0) <= kLargestFloat64 ? at::kDouble : at::kFloat;
  at::Tensor damped = hessian.to(type) / unit;
  damped.diagonal().add_(damping * mean / unit);
  const auto [lower, failed] = at::linalg_cholesky_ex(damped);
  if (failed.item<int>() != 0) return {};
  return {.lower = lower, .unit = unit};
}

// The upper Cholesky factor, up to a positive multiple, of the inverse of the damped Hessian,
// float32; undefined if it cannot be had.
at::Tensor InverseFactor(const at::Tensor& hessian, double damping) {
  for (int attempt = 0; attempt <= kDampingRetries; ++attempt) {
    const at::Tensor lower = FactorDamped(hessian, damping).lower;
    damping = std::max(damping * 10, kSmallestRetry);
    if (!lower.defined()) continue;
    const auto [upper, failed] =
        at::linalg_cholesky_ex(at::cholesky_inverse(lower), /*upper=*/true);
    if (failed.item<int>() != 0) continue;
    at::Tensor factor = upper.to(at::kFloat).contiguous();
    if (factor.isfinite().all().item<bool>() && (factor.diagonal() > 0).all().item<bool>())
      return factor;
  }
  return {};
}

double Ratio(double error, double reference) { return reference > 0 ? error / reference : 1; }

// What the loop writes for a format, and how it becomes the format's tensors.
struct GridState {
  ops::GptqGrid grid = ops::GptqGrid::kE2M1Group16;
  int64_t group = 0;  // columns per stored scale; 0: one per row
  double global_scale = 1;
  at::Tensor scale;  // as the operator wants it: [out, in / group], or float32 [out, 1]
  at::Tensor codes;  // U8 [out, in]
};

ops::GptqGrid GridOf(const Format& format) {
  switch (format.grid()) {
    case Grid::kE2M1Group16:
      return ops::GptqGrid::kE2M1Group16;
    case Grid::kE4M3Group32:
      return ops::GptqGrid::kE4M3Group32;
    case Grid::kE2M1Group32:
      return ops::GptqGrid::kE2M1Group32;
    case Grid::kInt4Group128:
      return ops::GptqGrid::kInt4Group128;
    case Grid::kInt8Group128:
      return ops::GptqGrid::kInt8Group128;
    default:
      return ops::GptqGrid::kE4M3Row;
  }
}

// The order in which columns are rounded: whole groups, the ones with the largest diagonal of H
// first, since what is rounded early can still be made up for.
struct Order {
  at::Tensor groups, columns;  // int64: which one comes next

  void Restore(GridState& state) const {
    const at::Tensor back = at::argsort(columns);
    state.codes = state.codes.index_select(1, back);
    if (state.group > 0) state.scale = state.scale.index_select(1, at::argsort(groups));
  }
};

Order OrderByImportance(const Format& format, const at::Tensor& hessian) {
  const int64_t in = hessian.size(0);
  const int64_t group = std::max<int64_t>(ops::GptqGroupSize(GridOf(format)), 1);
  const at::Tensor importance = hessian.diagonal().view({in / group, group}).sum(1);
  const at::Tensor groups =
      at::argsort(importance, /*stable=*/true, /*dim=*/0, /*descending=*/true);
  const at::Tensor columns =
      (groups.unsqueeze(1) * group + at::arange(group).unsqueeze(0)).flatten();
  return {.groups = groups, .columns = columns};
}

GridState MakeGrid(const Format& format, const StoredTensors& rtn, int64_t out, int64_t in) {
  GridState state{.grid = GridOf(format)};
  state.group = ops::GptqGroupSize(state.grid);
  state.codes = at::empty({out, in}, at::kByte);
  switch (format.grid()) {
    case Grid::kE2M1Group16:
      state.global_scale = rtn.at("weight_global_scale").item<double>();
      [[fallthrough]];
    case Grid::kE4M3Group32:
    case Grid::kE2M1Group32:
      state.scale = at::empty({out, in / state.group}, at::kByte);
      break;
    case Grid::kInt4Group128:
    case Grid::kInt8Group128:
      state.scale = at::empty_like(rtn.at("weight_scale"));
      break;
    default:
      state.scale = rtn.at("weight_scale").to(at::kFloat).contiguous();
  }
  return state;
}

// Codes of four bits, the even column's in the low ones.
at::Tensor PackPairs(const at::Tensor& codes) {
  const at::Tensor pairs = codes.view({codes.size(0), -1, 2});
  return pairs.select(2, 0).bitwise_or(pairs.select(2, 1).bitwise_left_shift(4)).contiguous();
}

StoredTensors ToStored(const Format& format, const GridState& state, StoredTensors stored) {
  switch (format.grid()) {
    case Grid::kE2M1Group16:
      stored["weight_packed"] = PackPairs(state.codes);
      stored["weight_scale"] = state.scale.view(at::kFloat8_e4m3fn);
      break;
    case Grid::kE2M1Group32:
      stored["weight_packed"] = PackPairs(state.codes);
      stored["weight_scale"] = state.scale;
      break;
    case Grid::kInt4Group128:
      stored["weight_packed"] = PackPairs(state.codes).view(at::kInt);
      stored["weight_scale"] = state.scale;
      break;
    case Grid::kInt8Group128:
      stored["weight_packed"] = state.codes.view(at::kInt);
      stored["weight_scale"] = state.scale;
      break;
    case Grid::kE4M3Group32:
      stored["weight_scale"] = state.scale;
      [[fallthrough]];
    default:
      stored["weight"] = state.codes.view(at::kFloat8_e4m3fn);
  }
  return stored;
}

void RunColumns(const at::Tensor& weight, const at::Tensor& factor, bool choose_scales,
                GridState& state) {
  const int64_t in = weight.size(1);
  at::Tensor remaining = weight.clone();
  for (int64_t begin = 0; begin < in; begin += kBlockColumns) {
    const int64_t columns = std::min(kBlockColumns, in - begin);
    at::Tensor block = remaining.narrow(1, begin, columns).contiguous();
    at::Tensor codes = at::empty(block.sizes(), at::kByte);
    at::Tensor error = at::empty_like(block);
    at::Tensor scale = state.scale;
    if (state.group > 0)
      scale = at::empty({block.size(0), columns / state.group}, state.scale.options());
    ops::GptqBlock(state.grid, block, factor.narrow(0, begin, columns).narrow(1, begin, columns),
                   scale, codes, error, state.global_scale, choose_scales);
    state.codes.narrow(1, begin, columns).copy_(codes);
    if (state.group > 0)
      state.scale.narrow(1, begin / state.group, columns / state.group).copy_(scale);
    const int64_t right = in - begin - columns;
    if (right == 0) break;
    remaining.narrow(1, begin + columns, right)
        .sub_(
            at::matmul(error, factor.narrow(0, begin, columns).narrow(1, begin + columns, right)));
  }
}

}  // namespace

Result<GptqResult> RenderGptq(const Format& format, const at::Tensor& weight,
                              const at::Tensor& hessian, const SharedScales& shared, DType source,
                              const GptqOptions& options) {
  if (format.grid() == Grid::kNone) {
    return Status::InvalidInput(fmt::format("format {} has no grid to round to", format.name()));
  }
  GptqResult result;
  StoredTensors rtn = format.Encode(weight, shared, source);
  const Order order = OrderByImportance(format, hessian);
  const at::Tensor factor = InverseFactor(
      hessian.index_select(0, order.columns).index_select(1, order.columns), options.damping);
  if (!factor.defined()) {
    result.decoded = format.Decode(rtn);
    result.stored = std::move(rtn);
    result.fell_back = true;
    return result;
  }
  GridState state = MakeGrid(format, rtn, weight.size(0), weight.size(1));
  RunColumns(weight.index_select(1, order.columns), factor, options.choose_scales, state);
  order.Restore(state);
  result.stored = ToStored(format, state, std::move(rtn));
  if (options.sweep && format.grid() == Grid::kE2M1Group16) {
    SweepScales(weight, hessian.diagonal().contiguous(), format, result.stored);
  }
  result.decoded = format.Decode(result.stored);
  return result;
}

CorrectedWeight Correct(const at::Tensor& weight, const InputMoments& train,
                        const InputMoments& held_out) {
  CorrectedWeight corrected{.weight = weight};
  if (!train.pull().defined() || !held_out.pull().defined()) return corrected;
  const Factor factor = FactorDamped(train.hessian(), kCorrectionDamping);
  if (!factor.lower.defined()) return corrected;
  const at::Tensor pull = train.pull().to(factor.lower.scalar_type()) / factor.unit;
  const at::Tensor step = at::cholesky_solve(pull.t(), factor.lower).t().to(at::kFloat);
  const double curvature = held_out.ErrorOf(weight + step, weight).weight;
  const double slope = (step * held_out.pull()).sum(-1).sum(at::kDouble).item<double>();
  if (!(curvature > 0) || !std::isfinite(slope)) return corrected;
  corrected.share = std::clamp(slope / curvature, 0.0, kLargestCorrection);
  corrected.weight = weight + corrected.share * step;
  return corrected;
}

Result<GptqResult> RenderGuarded(const Format& format, const at::Tensor& weight,
                                 const InputMoments& train, const InputMoments& held_out,
                                 const SharedScales& shared, DType source,
                                 const GptqOptions& options) {
  const CorrectedWeight target =
      options.correct ? Correct(weight, train, held_out) : CorrectedWeight{.weight = weight};
  PQ_ASSIGN_OR_RETURN(GptqResult gptq,
                      RenderGptq(format, target.weight, train.hessian(), shared, source, options));
  const InputMoments& judge = held_out.tokens() > 0 ? held_out : train;
  StoredTensors rtn = format.Encode(weight, shared, source);
  at::Tensor rtn_decoded = format.Decode(rtn);
  const RoundingError error = judge.ErrorOf(gptq.decoded, weight);
  const RoundingError rtn_error = judge.ErrorOf(rtn_decoded, weight);
  if (gptq.fell_back || !std::isfinite(error.output) || error.output > rtn_error.output) {
    return GptqResult{
        .stored = std::move(rtn), .decoded = std::move(rtn_decoded), .fell_back = true};
  }
  gptq.error_ratio = Ratio(error.output, rtn_error.output);
  gptq.weight_ratio = Ratio(error.weight, rtn_error.weight);
  return gptq;
}

}  // namespace prismaquant

#include "round/gptq.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "kernels/gather.h"
#include "kernels/gptq.h"
#include "kernels/symmetric.h"
#include "round/scale_sweep.h"

namespace prismaquant {
namespace {

// Of the Hessian that a correction is solved with.
constexpr double kCorrectionDamping = 1;
constexpr double kLargestCorrection = 0.5;

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
    case Grid::kE4M3Row:
    case Grid::kNone:
      break;
  }
  return ops::GptqGrid::kE4M3Row;
}

// Back to the weight's own order of columns.
void RestoreOrder(const FactoredHessian& hessian, GridState& state) {
  state.codes = ops::Gather(state.codes, at::argsort(hessian.columns()));
  if (state.group > 0) state.scale = ops::Gather(state.scale, at::argsort(hessian.groups()));
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
    case Grid::kE4M3Row:
      state.scale = rtn.at("weight_scale").to(at::kFloat).contiguous();
      break;
    case Grid::kNone:
      break;
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
    case Grid::kE4M3Row:
      stored["weight"] = state.codes.view(at::kFloat8_e4m3fn);
      break;
    case Grid::kNone:
      break;
  }
  return stored;
}

// x x^T, float32.
at::Tensor GramMatrix(const at::Tensor& x) {
  at::Tensor gram = at::zeros({x.size(0), x.size(0)}, at::kFloat);
  AddUpperProduct(x.t(), gram);
  ops::MirrorUpper(gram);
  return gram;
}

// S of CorrectedWeight, float32 [out, in]; undefined if it cannot be had. Of fewer tokens than
// inputs it is E^T (X X^T + d I)^-1 X, which is the same and less work, multiplied from the side
// that leaves the smaller matrix.
at::Tensor CorrectionStep(const at::Tensor& hessian, const InputRows& train) {
  const at::Tensor x = train.x(), lack = train.lack();
  const at::ScalarType products = x.scalar_type();
  const int64_t tokens = x.size(0), in = x.size(1), out = lack.size(1);
  const auto multiply = [&](const at::Tensor& a, const at::Tensor& b) {
    return at::matmul(a.to(products), b.to(products)).to(at::kFloat);
  };
  const at::ScalarType type = FactorType(std::min(tokens, in), products);
  const bool by_tokens = tokens < in;
  const double share = static_cast<double>(tokens) / static_cast<double>(in);
  DampedMatrix damped(by_tokens ? GramMatrix(x) : hessian.clone(), type);
  const at::Tensor factor = damped.Factor(kCorrectionDamping * (by_tokens ? share : 1));
  if (!factor.defined()) return {};
  const at::Tensor inverse = at::cholesky_inverse(factor);
  const at::Tensor wanted = lack.t();
  if (!by_tokens) return multiply(multiply(wanted, x), inverse).div_(damped.unit());
  const at::Tensor step =
      in < out ? multiply(wanted, multiply(inverse, x)) : multiply(multiply(wanted, inverse), x);
  return step.div_(damped.unit());
}

// Rounds a block of columns, some rows after the other. block: what is aimed at without regard to
// other rows, overwritten by the rounded weights; weight: the weight itself there. Returns what
// rounding left of what was aimed at in the end, [out, columns].
at::Tensor RoundRows(const at::Tensor& weight, const at::Tensor& inverse, bool choose_scales,
                     const RowFeedback& rows, GridState& state, at::Tensor& block) {
  const int64_t out = block.size(0);
  const int64_t step = rows.empty() ? out : rows.RowsAtATime(out);
  at::Tensor left = at::empty_like(block), error = at::empty_like(block);
  at::Tensor z = rows.empty() ? at::Tensor() : rows.Start(block.size(1));
  for (int64_t first = 0; first < out; first += step) {
    const int64_t count = std::min(step, out - first);
    const auto own = [&](const at::Tensor& of_all) { return of_all.narrow(0, first, count); };
    at::Tensor rounded = own(block), scale = own(state.scale), codes = own(state.codes),
               of_columns = own(error);
    const at::Tensor moved = rows.empty() ? at::Tensor() : rows.Moved(first, count, z);
    if (moved.defined()) rounded.add_(moved);
    ops::GptqBlock(state.grid, rounded, inverse, scale, codes, of_columns, state.global_scale,
                   choose_scales);
    const at::Tensor of_rows = own(weight) - rounded;
    own(left).copy_(moved.defined() ? of_rows + moved : of_rows);
    if (moved.defined()) rows.Add(first, of_rows, z);
  }
  return left;
}

// Rounds block by block of columns. What the columns before a block left, E = W - W_q, moves it by
// E R U_BB, where R are the factor's rows above the block and U_BB is the inverse of its own
// (docs/rendering.md). R is stored reversed; so is E here, which saves turning R around.
void RunColumns(const at::Tensor& weight, const FactoredHessian& hessian, const RowFeedback& rows,
                const GptqOptions& options, GridState& state) {
  constexpr int64_t kBlockColumns = FactoredHessian::kBlockColumns;
  const int64_t in = weight.size(1);
  const at::ScalarType products = hessian.factor().scalar_type();
  const at::Tensor left = at::empty(weight.sizes(), products);  // E, last column first
  for (int64_t begin = 0; begin < in; begin += kBlockColumns) {
    const int64_t columns = std::min(kBlockColumns, in - begin), after = in - begin - columns;
    const at::Tensor& inverse = hessian.inverse(begin / kBlockColumns);
    const at::Tensor target = weight.narrow(1, begin, columns);
    at::Tensor block = target.clone(at::MemoryFormat::Contiguous);
    if (begin > 0) {
      const at::Tensor above =
          hessian.factor().narrow(0, in - begin, begin).narrow(1, after, columns);
      const at::Tensor moved = at::matmul(left.narrow(1, in - begin, begin), above);
      block.addmm_(moved.to(at::kFloat), inverse.flip(0));
    }
    GridState own = state;
    own.codes = at::empty(block.sizes(), at::kByte);
    if (state.group > 0)
      own.scale = at::empty({block.size(0), columns / state.group}, state.scale.options());
    const at::Tensor error = RoundRows(target, inverse, options.choose_scales, rows, own, block);
    state.codes.narrow(1, begin, columns).copy_(own.codes);
    if (state.group > 0)
      state.scale.narrow(1, begin / state.group, columns / state.group).copy_(own.scale);
    left.narrow(1, after, columns).copy_(error.to(products).flip(1));
  }
}

}  // namespace

FactoredHessian FactorHessian(const Format& format, const at::Tensor& hessian,
                              const GptqOptions& options) {
  const int64_t group = std::max<int64_t>(ops::GptqGroupSize(GridOf(format)), 1);
  return FactoredHessian(hessian, group, options.damping, options.products);
}

Result<GptqResult> RenderGptq(const Format& format, const at::Tensor& weight,
                              const FactoredHessian& hessian, const SharedScales& shared,
                              DType source, const GptqOptions& options, const RowFeedback& rows) {
  if (format.grid() == Grid::kNone) {
    return Status::InvalidInput(fmt::format("format {} has no grid to round to", format.name()));
  }
  GptqResult result;
  StoredTensors rtn = format.Encode(weight, shared, source);
  if (!hessian.ok()) {
    result.decoded = format.Decode(rtn);
    result.stored = std::move(rtn);
    result.fell_back = true;
    return result;
  }
  GridState state = MakeGrid(format, rtn, weight.size(0), weight.size(1));
  RunColumns(ops::Gather(weight.contiguous(), hessian.columns()), hessian, rows, options, state);
  RestoreOrder(hessian, state);
  result.stored = ToStored(format, state, std::move(rtn));
  if (options.sweep && format.grid() == Grid::kE2M1Group16) {
    SweepScales(weight, hessian.diagonal(), format, result.stored);
  }
  result.decoded = format.Decode(result.stored);
  return result;
}

CorrectedWeight Correct(const at::Tensor& weight, const at::Tensor& hessian, const InputRows& train,
                        const InputRows& held_out) {
  CorrectedWeight corrected{.weight = weight};
  const double lack = held_out.LackEnergy();
  if (!(lack > 0)) return corrected;
  const at::Tensor step = CorrectionStep(hessian, train);
  if (!step.defined()) return corrected;
  const RoundingError whole = held_out.ErrorOf(weight + step, weight);
  const double slope = (lack + whole.weight - whole.output) / 2;
  if (!(whole.weight > 0) || !std::isfinite(slope)) return corrected;
  corrected.share = std::clamp(slope / whole.weight, 0.0, kLargestCorrection);
  corrected.weight = weight + corrected.share * step;
  return corrected;
}

Result<GptqResult> RenderGuarded(const Format& format, const at::Tensor& weight,
                                 const at::Tensor& target, const FactoredHessian& train,
                                 const RoundingJudge& judge, const SharedScales& shared,
                                 DType source, const GptqOptions& options,
                                 const RowFeedback& rows) {
  PQ_ASSIGN_OR_RETURN(GptqResult gptq,
                      RenderGptq(format, target, train, shared, source, options, rows));
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

#include "kernels/gptq_rows.h"

#include <algorithm>

#include "kernels/integer_codes.h"
#include "kernels/minifloat.h"

namespace prismaquant::rows {
namespace {

// Group scales of E2M1 are searched among this many E4M3 codes, two octaves, from half of the one
// that maps the largest magnitude to 6.
constexpr int kE2M1Candidates = 16;
constexpr float kSmallestMultiple = 0.5F;
// Of MX formats: the codec's scale, half of it and twice it.
constexpr int kE8M0Candidates = 3;
// Scales of integers are searched in twentieths of the codec's, from 0.5 to 1.1.
constexpr int kFirstIntStep = 10;
constexpr int kLastIntStep = 22;
constexpr float kIntStepsOfOne = 20;
constexpr int kIntStepsOfOneCandidate = 10;  // the codec's own among them
// Of the rows in step, those whose scales are searched in step, so that none waits for its own
// divisions.
constexpr int kRowsSearched = 4;
// Columns among which an error is spread at once; over those behind, tile by tile. Divides every
// group size.
constexpr int64_t kTile = 16;

// What a column's code can mean.
struct E2M1 {
  static PQ_INLINE float Round(float x) { return RoundToE2M1(WithoutNegativeZero(x)); }
  static PQ_INLINE uint8_t Encode(float value) { return EncodeE2M1(value); }
  static PQ_INLINE uint8_t MxScale(float amax) { return Mxfp4ScaleCode(amax); }
};
struct E4M3 {
  static PQ_INLINE float Round(float x) { return RoundToE4M3(x); }
  static PQ_INLINE uint8_t Encode(float value) { return EncodeE4M3(value); }
  static PQ_INLINE uint8_t MxScale(float amax) { return Mxfp8ScaleCode(amax); }
};
template <int kBits>
struct Int {
  static PQ_INLINE float Round(float x) { return RoundToInt<kBits>(x); }
  static PQ_INLINE uint8_t Encode(float value) { return EncodeInt<kBits>(value); }
};

// For each row and scale, the error that rounding the group column by column under it would leave,
// sum_j ((q_j - w_j) / u_jj)^2 with w_j as compensated by then. Candidates lie side by side, so
// that they are computed at once; rows do not wait for each other's divisions.
template <typename Grid, int kRows>
PQ_INLINE void GroupErrors(const GptqBlockView& block, int64_t begin, const float* w,
                           const float (*scales)[Grid::kCandidates],
                           float (*errors)[Grid::kCandidates]) {
  constexpr int kCandidates = Grid::kCandidates;
  float spread[kRows][Grid::kGroup][kCandidates];
  for (int r = 0; r < kRows; ++r) {
    PQ_LANES (int c = 0; c < kCandidates; ++c) errors[r][c] = 0;
  }
  for (int64_t j = 0; j < Grid::kGroup; ++j) {
    const float* u = block.u + begin * block.columns + begin + j;
    const float diagonal = u[j * block.columns];
    for (int r = 0; r < kRows; ++r) {
      float remaining[kCandidates];
      const float target = w[r * block.columns + begin + j];
      PQ_LANES (int c = 0; c < kCandidates; ++c) remaining[c] = target;
      for (int64_t i = 0; i < j; ++i) {
        const float factor = u[i * block.columns];
        PQ_LANES (int c = 0; c < kCandidates; ++c) remaining[c] -= spread[r][i][c] * factor;
      }
      PQ_LANES (int c = 0; c < kCandidates; ++c) {
        const float scale = scales[r][c];
        const float quantized = Grid::Element::Round(remaining[c] / scale) * scale;
        const float error = (remaining[c] - quantized) / diagonal;
        spread[r][j][c] = error;
        errors[r][c] += error * error;
      }
    }
  }
}

// The candidate with the least error; of equals `preferred`, else the first.
PQ_INLINE int Best(const float* errors, int count, int preferred) {
  int best = preferred;
  for (int c = 0; c < count; ++c) {
    if (errors[c] < errors[best]) best = c;
  }
  return best;
}

// A group's candidates, as stored and as they multiply; all are the codec's where there is no
// choice.
template <typename Scale, int kCount>
struct Candidates {
  Scale stored[kCount];
  float scales[kCount];
  int preferred = 0;

  PQ_INLINE void Fill(Scale scale, float effective) {
    for (int c = 0; c < kCount; ++c) {
      stored[c] = scale;
      scales[c] = effective;
    }
  }
};

// The E4M3 code that the codec chooses, or one in the searched range.
struct Nvfp4Grid {
  using Element = E2M1;
  using Scale = uint8_t;
  static constexpr int64_t kGroup = kNvfp4GroupSize;
  static constexpr int kCandidates = kE2M1Candidates;

  static PQ_INLINE void Propose(const GptqBlockView& block, const float* w,
                                Candidates<Scale, kCandidates>& found) {
    const float largest = LargestMagnitude(w, kGroup);
    const float ideal = block.global_scale * (largest / kE2M1Max);
    int rule = EncodeE4M3(RoundToE4M3(ideal));
    if (rule == 0) rule = EncodeE4M3(kNvfp4ZeroScale);
    if (!block.choose_scales || largest == 0) {
      const auto code = static_cast<uint8_t>(rule);
      return found.Fill(code, DecodeE4M3(code) / block.global_scale);
    }
    const int first = std::max<int>(1, EncodeE4M3(RoundToE4M3(ideal * kSmallestMultiple)));
    for (int c = 0; c < kCandidates; ++c) {
      found.stored[c] = static_cast<uint8_t>(std::min<int>(first + c, kE4M3LargestCode));
      found.scales[c] = DecodeE4M3(found.stored[c]) / block.global_scale;
    }
    found.preferred = std::clamp(rule - first, 0, kCandidates - 1);
  }
};

// The E8M0 code that the codec chooses, or one of its neighbours.
template <typename Value>
struct MxGrid {
  using Element = Value;
  using Scale = uint8_t;
  static constexpr int64_t kGroup = kMxGroupSize;
  static constexpr int kCandidates = kE8M0Candidates;

  static PQ_INLINE void Propose(const GptqBlockView& block, const float* w,
                                Candidates<Scale, kCandidates>& found) {
    const int rule = Element::MxScale(LargestMagnitude(w, kGroup));
    const auto code = static_cast<uint8_t>(rule);
    if (!block.choose_scales || rule <= 1 || rule >= 253) {
      return found.Fill(code, DecodeE8M0(code));
    }
    for (int c = 0; c < kCandidates; ++c) {
      found.stored[c] = static_cast<uint8_t>(rule + c - 1);
      found.scales[c] = DecodeE8M0(found.stored[c]);
    }
    found.preferred = 1;
  }
};

// The scale that the codec chooses, or a multiple of it in the searched range.
template <int kBits>
struct IntGrid {
  using Element = Int<kBits>;
  using Scale = float;
  static constexpr int64_t kGroup = kIntGroupSize;
  static constexpr int kCandidates = kLastIntStep - kFirstIntStep + 1;

  static PQ_INLINE void Propose(const GptqBlockView& block, const float* w,
                                Candidates<Scale, kCandidates>& found) {
    const float largest = LargestMagnitude(w, kGroup);
    const float ideal = largest / IntHalfRange(kBits);
    if (!block.choose_scales || largest == 0) {
      const float scale = block.stored_scale(ideal);
      return found.Fill(scale, scale);
    }
    for (int c = 0; c < kCandidates; ++c) {
      found.scales[c] =
          block.stored_scale(ideal * (static_cast<float>(kFirstIntStep + c) / kIntStepsOfOne));
      found.stored[c] = found.scales[c];
    }
    found.preferred = kIntStepsOfOneCandidate;
  }
};

// One scale per row, which is given.
struct RowGrid {
  using Element = E4M3;
  using Scale = const float;
  static constexpr int64_t kGroup = 0;
};

// Chooses the scales of a group of each row; `scale` is the first row's.
template <typename Grid, int kRows>
PQ_INLINE void ChooseScales(const GptqBlockView& block, int64_t begin, const float* w,
                            typename Grid::Scale* scale, float* effective) {
  Candidates<typename Grid::Scale, Grid::kCandidates> found[kRows];
  float scales[kRows][Grid::kCandidates], errors[kRows][Grid::kCandidates];
  for (int r = 0; r < kRows; ++r) {
    Grid::Propose(block, w + r * block.columns + begin, found[r]);
    std::copy(found[r].scales, found[r].scales + Grid::kCandidates, scales[r]);
  }
  if (block.choose_scales) GroupErrors<Grid, kRows>(block, begin, w, scales, errors);
  for (int r = 0; r < kRows; ++r) {
    const int best = block.choose_scales ? Best(errors[r], Grid::kCandidates, found[r].preferred)
                                         : found[r].preferred;
    scale[r * (block.columns / Grid::kGroup) + begin / Grid::kGroup] = found[r].stored[best];
    effective[r] = scales[r][best];
  }
}

// Rounds a tile of `count` columns of each row and spreads the errors within it. Rows lie side by
// side: all of them are as far at any time.
template <typename Element, int kRows>
PQ_INLINE void RoundTile(const GptqBlockView& block, int64_t begin, int64_t count,
                         const float* effective, float* w, uint8_t* codes, float* error) {
  const int64_t columns = block.columns;
  float moved[kTile][kRows], value[kTile][kRows], spread[kTile][kRows];
  for (int64_t j = 0; j < count; ++j) {
    PQ_LANES (int r = 0; r < kRows; ++r) moved[j][r] = w[r * columns + begin + j];
  }
  for (int64_t j = 0; j < count; ++j) {
    const float* u = block.u + (begin + j) * columns + begin;
    const float diagonal = u[j];
    PQ_LANES (int r = 0; r < kRows; ++r) {
      const float scale = effective[r];
      const float rounded = Element::Round(moved[j][r] / scale);
      const float quantized = rounded * scale;
      value[j][r] = rounded;
      spread[j][r] = (moved[j][r] - quantized) / diagonal;
      moved[j][r] = quantized;
    }
    for (int64_t k = j + 1; k < count; ++k) {
      const float factor = u[k];
      PQ_LANES (int r = 0; r < kRows; ++r) moved[k][r] -= spread[j][r] * factor;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const int64_t first = r * columns + begin;
    for (int64_t j = 0; j < count; ++j) {
      w[first + j] = moved[j][r];
      codes[first + j] = Element::Encode(value[j][r]);
      error[first + j] = spread[j][r];
    }
  }
}

// Spreads the errors of a whole tile over the columns right of it.
template <int kRows>
PQ_INLINE void Propagate(const GptqBlockView& block, int64_t begin, const float* error, float* w) {
  const int64_t columns = block.columns;
  int64_t k = begin + kTile;
  for (; k + kTile <= columns; k += kTile) {
    for (int r = 0; r < kRows; ++r) {
      float moved[kTile];
      PQ_LANES (int64_t l = 0; l < kTile; ++l) moved[l] = w[r * columns + k + l];
      for (int64_t j = begin; j < begin + kTile; ++j) {
        const float spread = error[r * columns + j];
        PQ_LANES (int64_t l = 0; l < kTile; ++l) moved[l] -= spread * block.u[j * columns + k + l];
      }
      PQ_LANES (int64_t l = 0; l < kTile; ++l) w[r * columns + k + l] = moved[l];
    }
  }
  for (; k < columns; ++k) {
    for (int r = 0; r < kRows; ++r) {
      for (int64_t j = begin; j < begin + kTile; ++j) {
        w[r * columns + k] -= error[r * columns + j] * block.u[j * columns + k];
      }
    }
  }
}

template <typename Grid, int kRows>
PQ_INLINE void RoundRows(const GptqBlockView& block, float* w, typename Grid::Scale* scale,
                         uint8_t* codes, float* error) {
  float effective[kRows] = {};
  if constexpr (Grid::kGroup == 0) std::copy(scale, scale + kRows, effective);
  for (int64_t begin = 0; begin < block.columns; begin += kTile) {
    if constexpr (Grid::kGroup > 0) {
      constexpr int kSearched = kRows < kRowsSearched ? kRows : kRowsSearched;
      const int64_t groups = block.columns / Grid::kGroup;
      for (int r = 0; begin % Grid::kGroup == 0 && r < kRows; r += kSearched) {
        ChooseScales<Grid, kSearched>(block, begin, w + r * block.columns, scale + r * groups,
                                      effective + r);
      }
    }
    RoundTile<typename Grid::Element, kRows>(block, begin, std::min(kTile, block.columns - begin),
                                             effective, w, codes, error);
    Propagate<kRows>(block, begin, error, w);
  }
}

template <typename Grid>
PQ_INLINE void RoundAll(const GptqBlockView& block, int64_t rows, float* w,
                        typename Grid::Scale* scale, uint8_t* codes, float* error) {
  const int64_t scales = Grid::kGroup > 0 ? block.columns / std::max<int64_t>(Grid::kGroup, 1) : 1;
  int64_t r = 0;
  for (; r + kRowsInStep <= rows; r += kRowsInStep) {
    const int64_t first = r * block.columns;
    RoundRows<Grid, kRowsInStep>(block, w + first, scale + r * scales, codes + first,
                                 error + first);
  }
  for (; r < rows; ++r) {
    const int64_t first = r * block.columns;
    RoundRows<Grid, 1>(block, w + first, scale + r * scales, codes + first, error + first);
  }
}

}  // namespace

PQ_MULTIVERSION
void GptqE2M1Group16(const GptqBlockView& block, int64_t rows, float* w, uint8_t* scale,
                     uint8_t* codes, float* error) {
  RoundAll<Nvfp4Grid>(block, rows, w, scale, codes, error);
}

PQ_MULTIVERSION
void GptqE4M3Group32(const GptqBlockView& block, int64_t rows, float* w, uint8_t* scale,
                     uint8_t* codes, float* error) {
  RoundAll<MxGrid<E4M3>>(block, rows, w, scale, codes, error);
}

PQ_MULTIVERSION
void GptqE2M1Group32(const GptqBlockView& block, int64_t rows, float* w, uint8_t* scale,
                     uint8_t* codes, float* error) {
  RoundAll<MxGrid<E2M1>>(block, rows, w, scale, codes, error);
}

PQ_MULTIVERSION
void GptqInt4Group128(const GptqBlockView& block, int64_t rows, float* w, float* scale,
                      uint8_t* codes, float* error) {
  RoundAll<IntGrid<4>>(block, rows, w, scale, codes, error);
}

PQ_MULTIVERSION
void GptqInt8Group128(const GptqBlockView& block, int64_t rows, float* w, float* scale,
                      uint8_t* codes, float* error) {
  RoundAll<IntGrid<8>>(block, rows, w, scale, codes, error);
}

PQ_MULTIVERSION
void GptqE4M3Row(const GptqBlockView& block, int64_t rows, float* w, const float* scale,
                 uint8_t* codes, float* error) {
  RoundAll<RowGrid>(block, rows, w, scale, codes, error);
}

}  // namespace prismaquant::rows

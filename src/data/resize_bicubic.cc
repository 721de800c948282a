#include <algorithm>
#include <cmath>
#include <utility>

#include "data/image.h"

namespace prismaquant {
namespace {

constexpr int kPrecision = 22;  // fractional bits of a weight

// The weights of one output position: consecutive input positions from `first` on.
struct Taps {
  int64_t first = 0;
  std::vector<int32_t> weights;
};

double Cubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

std::vector<Taps> AxisTaps(int64_t in, int64_t out) {
  const double scale = static_cast<double>(in) / static_cast<double>(out);
  const double widening = std::max(scale, 1.0), support = 2.0 * widening;
  std::vector<Taps> axis(static_cast<size_t>(out));
  std::vector<double> weights;
  for (int64_t position = 0; position < out; ++position) {
    const double center = (static_cast<double>(position) + 0.5) * scale;
    const int64_t first = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
    const int64_t end = std::min(static_cast<int64_t>(center + support + 0.5), in);
    weights.clear();
    double sum = 0;
    for (int64_t i = first; i < end; ++i) {
      weights.push_back(Cubic((static_cast<double>(i) - center + 0.5) * (1.0 / widening)));
      sum += weights.back();
    }
    Taps& taps = axis[static_cast<size_t>(position)];
    taps.first = first;
    for (const double weight : weights) {
      const double scaled = weight / sum * (1 << kPrecision);
      taps.weights.push_back(static_cast<int32_t>(scaled < 0 ? scaled - 0.5 : scaled + 0.5));
    }
  }
  return axis;
}

// Weighted sum of every stride-th byte from `source` on.
uint8_t Weigh(const uint8_t* source, int64_t stride, const std::vector<int32_t>& weights) {
  int32_t sum = 1 << (kPrecision - 1);
  for (const int32_t weight : weights) {
    sum += *source * weight;
    source += stride;
  }
  return static_cast<uint8_t>(std::clamp(sum >> kPrecision, 0, 255));
}

Image ResizeColumns(const Image& image, int64_t width) {
  const std::vector<Taps> axis = AxisTaps(image.width, width);
  Image result{.height = image.height, .width = width, .rgb = {}};
  result.rgb.reserve(static_cast<size_t>(image.height * width * 3));
  for (int64_t row = 0; row < image.height; ++row) {
    const uint8_t* line = image.rgb.data() + row * image.width * 3;
    for (const Taps& taps : axis) {
      for (int channel = 0; channel < 3; ++channel) {
        result.rgb.push_back(Weigh(line + taps.first * 3 + channel, 3, taps.weights));
      }
    }
  }
  return result;
}

Image ResizeRows(const Image& image, int64_t height) {
  const int64_t stride = image.width * 3;
  Image result{.height = height, .width = image.width, .rgb = {}};
  result.rgb.reserve(static_cast<size_t>(height * stride));
  for (const Taps& taps : AxisTaps(image.height, height)) {
    const uint8_t* line = image.rgb.data() + taps.first * stride;
    for (int64_t i = 0; i < stride; ++i) {
      result.rgb.push_back(Weigh(line + i, stride, taps.weights));
    }
  }
  return result;
}

}  // namespace

Image ResizeBicubic(const Image& image, int64_t height, int64_t width) {
  if (image.height > 100 * image.width && height < image.height) {
    const Image rows = ResizeRows(image, height);
    return rows.width == width ? rows : ResizeColumns(rows, width);
  }
  const Image columns = image.width == width ? image : ResizeColumns(image, width);
  return columns.height == height ? columns : ResizeRows(columns, height);
}

}  // namespace prismaquant

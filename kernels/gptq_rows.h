#ifndef PRISMAQUANT_KERNELS_GPTQ_ROWS_H_
#define PRISMAQUANT_KERNELS_GPTQ_ROWS_H_

// GPTQ on rows of a block: the CPU inner loops behind kernels/gptq.h, where the arguments are
// described.

#include <cstdint>

namespace prismaquant::rows {

// Rows that are rounded at once, side by side; what is left over, one by one.
inline constexpr int kRowsInStep = 16;

// What is the same for all rows of a block.
struct GptqBlockView {
  int64_t columns = 0;
  const float* u = nullptr;  // [columns, columns], row-major
  float global_scale = 1;
  float (*stored_scale)(float) = nullptr;  // INT4, INT8: a scale as its dtype holds it
  bool choose_scales = true;
};

// Each overwrites w [rows, columns] by the quantized rows and writes codes and error of that shape,
// and scale [rows, columns / group size] but for GptqE4M3Row, which reads it, one per row.
void GptqE2M1Group16(const GptqBlockView& block, int64_t rows, float* w, uint8_t* scale,
                     uint8_t* codes, float* error);
void GptqE4M3Group32(const GptqBlockView& block, int64_t rows, float* w, uint8_t* scale,
                     uint8_t* codes, float* error);
void GptqE2M1Group32(const GptqBlockView& block, int64_t rows, float* w, uint8_t* scale,
                     uint8_t* codes, float* error);
void GptqInt4Group128(const GptqBlockView& block, int64_t rows, float* w, float* scale,
                      uint8_t* codes, float* error);
void GptqInt8Group128(const GptqBlockView& block, int64_t rows, float* w, float* scale,
                      uint8_t* codes, float* error);
void GptqE4M3Row(const GptqBlockView& block, int64_t rows, float* w, const float* scale,
                 uint8_t* codes, float* error);

}  // namespace prismaquant::rows

#endif  // PRISMAQUANT_KERNELS_GPTQ_ROWS_H_

#ifndef PRISMAQUANT_PERFORMANCE_MACHINE_RATES_H_
#define PRISMAQUANT_PERFORMANCE_MACHINE_RATES_H_

// MachineRates: how fast this machine does what the stages of a run are made of, measured in about
// two seconds on operands of the sizes that the run will have. Per second, with the threads that
// libtorch is set to.

#include <ATen/core/ScalarType.h>

#include <cstdint>
#include <filesystem>

#include "base/json.h"
#include "base/status.h"
#include "io/checkpoint.h"

namespace prismaquant {

struct MachineRates {
  double product = 0;        // FLOP of matrix products in the compute dtype
  double float_product = 0;  // the same in float32
  double factor = 0;         // FLOP of a Cholesky factorization in float32
  double nearest = 0;        // weights rounded to nearest and decoded
  double columns = 0;        // weights rounded in GPTQ's inner loop, scales chosen
  double memory = 0;         // bytes that elementwise operators read and write
  double read = 0;           // bytes from the source's storage
  double write = 0;          // bytes to the run store's storage, synced

  Json ToJson() const;
};

// What a product multiplies: x [tokens, in] and W [out, in].
struct ProductShape {
  int64_t tokens = 0, in = 0, out = 0;
};

// Writes and removes a file of up to 256 MB in `scratch`, an existing folder.
Result<MachineRates> MeasureMachine(const ProductShape& shape, at::ScalarType compute,
                                    const Checkpoint& source, const std::filesystem::path& scratch);

}  // namespace prismaquant

#endif  // PRISMAQUANT_PERFORMANCE_MACHINE_RATES_H_

#ifndef PRISMAQUANT_PERFORMANCE_OPERATOR_WORK_H_
#define PRISMAQUANT_PERFORMANCE_OPERATOR_WORK_H_

// The arithmetic and the memory traffic of one call of an operator, from its name and the shapes of
// its operands. Pure functions.

#include <ATen/core/ivalue.h>

#include <span>
#include <string>

namespace prismaquant {

// Multiplications and additions, counted as two, of matrix products, factorizations, triangular
// solves, attention and the inner products and moves of prismaquant's own operators; 0 for others.
// `name` with its namespace, as in "aten::mm".
double OperatorFlop(const std::string& name, std::span<const c10::IValue> inputs);

// Bytes of all tensors among `values`, lists included.
double TensorBytesOf(std::span<const c10::IValue> values);

// "mm bf16": the name without "aten::", and the dtype of the first tensor.
std::string KernelName(const std::string& name, std::span<const c10::IValue> inputs);

}  // namespace prismaquant

#endif  // PRISMAQUANT_PERFORMANCE_OPERATOR_WORK_H_

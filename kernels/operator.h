#ifndef PRISMAQUANT_KERNELS_OPERATOR_H_
#define PRISMAQUANT_KERNELS_OPERATOR_H_

// Operator: how C++ calls torch.ops.prismaquant.*: through libtorch's dispatcher, which picks the
// kernel by the tensors' device. For the files that define operators.

#include <ATen/core/dispatch/Dispatcher.h>

namespace prismaquant::ops {

// `name`: "prismaquant::gather". Throws c10::Error if there is no such operator or its schema is
// not Signature.
template <typename Signature>
c10::TypedOperatorHandle<Signature> Operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace prismaquant::ops

#endif  // PRISMAQUANT_KERNELS_OPERATOR_H_

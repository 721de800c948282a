#include "performance/operator_work.h"

#include <torch/torch.h>

#include <functional>
#include <map>
#include <string_view>
#include <vector>

namespace prismaquant {
namespace {

using Values = std::span<const c10::IValue>;

std::vector<at::Tensor> Tensors(Values values) {
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& value : values) {
    if (value.isTensor() && value.toTensor().defined()) tensors.push_back(value.toTensor());
    if (!value.isTensorList()) continue;
    for (const at::Tensor& tensor : value.toTensorVector()) {
      if (tensor.defined()) tensors.push_back(tensor);
    }
  }
  return tensors;
}

double Size(const at::Tensor& tensor, int64_t from_end) {
  return tensor.dim() < from_end ? 1 : static_cast<double>(tensor.size(-from_end));
}

double Elements(const at::Tensor& tensor) { return static_cast<double>(tensor.numel()); }

// a [.., m, k] times a matrix with n columns.
double Product(const at::Tensor& a, const at::Tensor& b) { return 2 * Elements(a) * Size(b, 1); }

// q [batch, heads, queries, size], k [batch, heads, keys, size]; scores and their mixture.
double Attention(const at::Tensor& q, const at::Tensor& k) { return 4 * Elements(q) * Size(k, 2); }

struct Work {
  size_t operands = 0;  // at least
  std::function<double(const std::vector<at::Tensor>&)> flop;
};

const std::map<std::string_view, Work>& Works() {
  using List = std::vector<at::Tensor>;
  static const std::map<std::string_view, Work> works = {
      {"aten::mm", {2, [](const List& t) { return Product(t[0], t[1]); }}},
      {"aten::bmm", {2, [](const List& t) { return Product(t[0], t[1]); }}},
      {"aten::addmm", {3, [](const List& t) { return Product(t[1], t[2]); }}},
      {"aten::addmm_", {3, [](const List& t) { return Product(t[1], t[2]); }}},
      {"aten::baddbmm", {3, [](const List& t) { return Product(t[1], t[2]); }}},
      {"aten::baddbmm_", {3, [](const List& t) { return Product(t[1], t[2]); }}},
      {"prismaquant::cholesky_",
       {1, [](const List& t) { return Elements(t[0]) * Size(t[0], 1) / 3; }}},
      {"aten::cholesky_inverse",
       {1, [](const List& t) { return 2 * Elements(t[0]) * Size(t[0], 1) / 3; }}},
      {"aten::linalg_solve_triangular",
       {2, [](const List& t) { return Elements(t[1]) * Size(t[0], 1); }}},
      {"aten::_scaled_dot_product_flash_attention_for_cpu",
       {2, [](const List& t) { return Attention(t[0], t[1]); }}},
      {"aten::_scaled_dot_product_flash_attention_for_cpu_backward",
       {3, [](const List& t) { return 2.5 * Attention(t[1], t[2]); }}},
      {"prismaquant::row_products",
       {2, [](const List& t) { return 2 * Elements(t[0]) * static_cast<double>(t.size() - 1); }}},
      // Each column moves those of its block that come after it.
      {"prismaquant::gptq_block",
       {1, [](const List& t) { return Elements(t[0]) * Size(t[0], 1); }}},
  };
  return works;
}

}  // namespace

double OperatorFlop(const std::string& name, Values inputs) {
  const auto work = Works().find(name);
  if (work == Works().end()) return 0;
  const std::vector<at::Tensor> tensors = Tensors(inputs);
  return tensors.size() < work->second.operands ? 0 : work->second.flop(tensors);
}

double TensorBytesOf(Values values) {
  double bytes = 0;
  for (const at::Tensor& tensor : Tensors(values)) {
    bytes += static_cast<double>(tensor.numel()) * static_cast<double>(tensor.itemsize());
  }
  return bytes;
}

std::string KernelName(const std::string& name, Values inputs) {
  constexpr std::string_view kAten = "aten::";
  std::string kernel = name.rfind(kAten, 0) == 0 ? name.substr(kAten.size()) : name;
  const std::vector<at::Tensor> tensors = Tensors(inputs);
  if (tensors.empty()) return kernel;
  switch (tensors.front().scalar_type()) {
    case at::kBFloat16:
      return kernel + " bf16";
    case at::kFloat:
      return kernel + " float32";
    case at::kDouble:
      return kernel + " float64";
    default:
      return kernel + " " + c10::toString(tensors.front().scalar_type());
  }
}

}  // namespace prismaquant

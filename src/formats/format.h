#ifndef PRISMAQUANT_FORMATS_FORMAT_H_
#define PRISMAQUANT_FORMATS_FORMAT_H_

// Format: how a Linear is stored and multiplied: the tensors it writes, their exact bytes,
// encoding, decoding, the activation quantizer, and the compressed-tensors scheme that describes
// it. One subclass per number format, one file each; the numeric work is done by the operators
// torch.ops.prismaquant.* of kernels/. Formats are immutable singletons without state and safe to
// use from any thread. Tensors stay on the device they come on.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "base/status.h"
#include "io/dtype.h"
#include "io/safetensors.h"

namespace prismaquant {

// The stored form of one Linear: tensors by the suffix after "<module>.", as "weight_packed".
using StoredTensors = std::map<std::string, at::Tensor>;

// What fused siblings share, fixed before any of them is encoded.
struct SharedScales {
  double weight_amax = 0;  // largest |w| over the fused set
  double input_amax = 0;   // |x| that scales must reach; 0 when no activation was seen
};

// The grid that GPTQ rounds to: per row, groups of consecutive columns with one scale each.
enum class Grid {
  kNone,
  kE2M1Group16,   // E4M3 scales
  kE2M1Group32,   // E8M0 scales
  kE4M3Group32,   // E8M0 scales
  kE4M3Row,       // scales in the source's dtype
  kInt4Group128,  // scales in the source's dtype
  kInt8Group128   // scales in the source's dtype
};

class Format {
 public:
  virtual ~Format() = default;

  virtual std::string_view name() const = 0;  // "nvfp4", as on the command line
  // Whether a weight [out, in] can be stored.
  virtual bool Supports(int64_t out, int64_t in) const = 0;
  // The tensors written for a weight [out, in] of a source in `source` (BF16, F16 or F32); names
  // are suffixes.
  virtual std::vector<TensorSpec> Layout(int64_t out, int64_t in, DType source) const = 0;
  // Bytes of all tensors of Layout.
  int64_t Bytes(int64_t out, int64_t in, DType source) const;
  // Bytes of codes and of group or channel scales, without per-tensor scales: what bpp counts.
  virtual int64_t PayloadBytes(int64_t out, int64_t in, DType source) const = 0;

  // Round-to-nearest encoding of float32 weight [out, in], bit for bit compressed-tensors'.
  virtual StoredTensors Encode(const at::Tensor& weight, const SharedScales& shared,
                               DType source) const = 0;
  // float32 [out, in].
  virtual at::Tensor Decode(const StoredTensors& stored) const = 0;
  // The activation [tokens, in] as the format's GEMM sees it, in x's dtype (computed in float32); x
  // itself if the format leaves activations alone. `stored` supplies a static scale where the
  // format has one.
  virtual at::Tensor QuantizeActivation(const at::Tensor& x, const StoredTensors& stored) const = 0;
  // The same before any weight is stored: the static scale follows from the calibration maximum.
  virtual at::Tensor QuantizeActivation(const at::Tensor& x, const SharedScales& shared) const = 0;
  virtual bool quantizes_activations() const = 0;

  virtual Grid grid() const = 0;
  // Which output-size multiple vLLM's GPU kernels want of the fused Linear (1 if any will do).
  virtual int64_t kernel_out_multiple() const { return 1; }

  // compressed-tensors "format" of the config group and the group's body (weights,
  // input_activations); empty for a format that stays outside quantization_config.
  virtual std::string_view compression_format() const = 0;
  virtual Json Scheme() const = 0;
};

// Whether the tensors are what Layout says, with values that a reader can decode: no NaN codes, no
// negative group scale, finite positive global scales. The error names the tensor's suffix, what
// was found and what was expected.
Status CheckStored(const Format& format, const StoredTensors& stored, int64_t out, int64_t in,
                   DType source);

// Null if there is no such format.
const Format* FindFormat(std::string_view name);
// All formats, smallest bits first.
std::span<const Format* const> AllFormats();
// Which format stored tensors with these suffixes and dtypes are in; null if none fits.
const Format* DetectFormat(const StoredTensors& stored);

// The unquantized format ("bf16": the source's own dtype).
const Format& SourceFormat();

// A tensor over the view's bytes without copying; the file must outlive it.
at::Tensor TensorFromView(const TensorView& view);
at::ScalarType ToScalarType(DType dtype);
DType FromScalarType(at::ScalarType type);

}  // namespace prismaquant

#endif  // PRISMAQUANT_FORMATS_FORMAT_H_

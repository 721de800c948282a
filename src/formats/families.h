#ifndef PRISMAQUANT_FORMATS_FAMILIES_H_
#define PRISMAQUANT_FORMATS_FAMILIES_H_

// The formats, one per file. FindFormat and AllFormats are how the rest of the program reaches
// them.

#include "formats/format.h"

namespace prismaquant {

const Format& Int4Format();
const Format& Mxfp4Format();
const Format& Nvfp4Format();
const Format& Nvfp4A16Format();
const Format& Fp8Format();
const Format& Int8Format();
const Format& Mxfp8Format();

// vLLM's weight-only kernel (Marlin) works on 64 outputs at a time and pads, or refuses, others.
inline constexpr int64_t kMarlinOutMultiple = 64;

// The body of compressed-tensors QuantizationArgs with every key that readers look at.
struct SchemeArgs {
  int bits = 8;
  const char* type = "float";
  const char* strategy = "channel";
  Json group_size = nullptr;
  Json dynamic = false;  // true, false, or "local"
  Json scale_dtype = nullptr;
  Json observer = nullptr;
};
Json QuantizationArgs(const SchemeArgs& args);

}  // namespace prismaquant

#endif  // PRISMAQUANT_FORMATS_FAMILIES_H_

#ifndef PRISMAQUANT_FORMATS_FAMILIES_H_
#define PRISMAQUANT_FORMATS_FAMILIES_H_

// The formats, one per file. FindFormat and AllFormats are how the rest of the program reaches
// them.

#include "formats/format.h"

namespace prismaquant {

const Format& Nvfp4Format();
const Format& Fp8Format();
const Format& Mxfp8Format();

// The body of compressed-tensors QuantizationArgs with every key that readers look at.
struct SchemeArgs {
  int bits = 8;
  const char* strategy = "channel";
  Json group_size = nullptr;
  Json dynamic = false;  // true, false, or "local"
  Json scale_dtype = nullptr;
  Json observer = nullptr;
};
Json QuantizationArgs(const SchemeArgs& args);

}  // namespace prismaquant

#endif  // PRISMAQUANT_FORMATS_FAMILIES_H_

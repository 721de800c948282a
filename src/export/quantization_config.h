#ifndef PRISMAQUANT_EXPORT_QUANTIZATION_CONFIG_H_
#define PRISMAQUANT_EXPORT_QUANTIZATION_CONFIG_H_

// quantization_config: the part of config.json that tells compressed-tensors readers (transformers,
// vLLM) which module is stored in which format. No class is ever a target, every module is named
// exactly, but for experts and the output projection, and what matches a pattern matches nothing
// else, so that neither reader's order of matching matters. Pure functions.
//
// A multimodal checkpoint has two names for a body module: transformers' multimodal class uses the
// checkpoint's, its text-only class drops "language_model.". A target in only one spelling leaves
// the other class with weights that are random or read without their scales, and without an error;
// so both spellings are listed (docs/checkpoint.md).

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "formats/format.h"
#include "model/profile.h"

namespace prismaquant {

// Orders names as their modules stand in the model: runs of digits compare as numbers.
struct ModelOrder {
  bool operator()(std::string_view a, std::string_view b) const;
};

// The name that the checkpoint gives to a module, then the one of transformers' text-only class if
// it differs.
std::vector<std::string> Spellings(const Profile& profile, const std::string& module);

// `formats`: every Linear of the model -> its format. `other_linears`: module names of all Linears
// elsewhere, which stay unquantized. Null if every format is the source's.
Json BuildQuantizationConfig(const Profile& profile,
                             const std::map<std::string, const Format*>& formats,
                             const std::vector<std::string>& other_linears);

}  // namespace prismaquant

#endif  // PRISMAQUANT_EXPORT_QUANTIZATION_CONFIG_H_

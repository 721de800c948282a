#include "probe/passes.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "base/json.h"
#include "probe/probe.h"

namespace prismaquant {
namespace {

// A list of {"rounding", "formats"}, one per pass.
constexpr char kPassesNote[] = "passes";
constexpr char kNearest[] = "rtn";
constexpr char kGptq[] = "gptq";

Result<Json> ReadPasses(RunStore& store) {
  PQ_ASSIGN_OR_RETURN(const auto note, store.Note(kPassesNote));
  if (!note) return Json::array();
  return ParseJson(*note, (store.folder() / kPassesNote).string());
}

PassFormats PassOf(const Json& json, size_t index) {
  const std::string suffix = index == 0 ? "" : fmt::format("/{}", index);
  PassFormats pass{.rounding = json["rounding"] == kGptq ? Rounding::kGptq : Rounding::kNearest,
                   .first = index == 0,
                   .forward_stage = "forward" + suffix,
                   .head_stage = "head" + suffix,
                   .backward_stage = "backward" + suffix};
  for (const Json& name : json["formats"]) {
    if (const Format* format = FindFormat(name.get<std::string>())) pass.formats.push_back(format);
  }
  return pass;
}

// Adds a pass for the wanted formats that no pass of this rounding has.
void AddMissing(const std::string& rounding, const std::vector<const Format*>& wanted,
                Json& passes) {
  std::set<std::string> known;
  for (const Json& pass : passes) {
    if (pass["rounding"] != rounding) continue;
    for (const Json& name : pass["formats"]) known.insert(name.get<std::string>());
  }
  Json missing = Json::array();
  for (const Format* format : AllFormats()) {
    const bool asked = std::find(wanted.begin(), wanted.end(), format) != wanted.end();
    const bool can = rounding != kGptq || format->grid() != Grid::kNone;
    if (asked && can && known.count(std::string(format->name())) == 0) {
      missing.push_back(format->name());
    }
  }
  if (!missing.empty()) passes.push_back({{"rounding", rounding}, {"formats", missing}});
}

}  // namespace

Result<std::vector<PassFormats>> PlanPasses(RunStore& store,
                                            const std::vector<const Format*>& nearest,
                                            const std::vector<const Format*>& gptq) {
  PQ_ASSIGN_OR_RETURN(Json passes, ReadPasses(store));
  const size_t before = passes.size();
  AddMissing(kNearest, nearest, passes);
  AddMissing(kGptq, gptq, passes);
  if (passes.size() > before) PQ_RETURN_IF_ERROR(store.PutNote(kPassesNote, passes.dump()));
  std::vector<PassFormats> planned;
  for (size_t i = 0; i < passes.size(); ++i) planned.push_back(PassOf(passes[i], i));
  return planned;
}

}  // namespace prismaquant

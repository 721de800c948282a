#include "probe/passes.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "base/json.h"
#include "probe/probe.h"

namespace prismaquant {
namespace {

// A list of lists of format names, one per pass.
constexpr char kPassesNote[] = "formats";

Result<Json> ReadPasses(RunStore& store) {
  PQ_ASSIGN_OR_RETURN(const auto note, store.Note(kPassesNote));
  if (!note) return Json::array();
  return ParseJson(*note, (store.folder() / kPassesNote).string());
}

std::set<std::string> NamesOf(const Json& passes) {
  std::set<std::string> names;
  for (const Json& pass : passes) {
    for (const Json& name : pass) names.insert(name.get<std::string>());
  }
  return names;
}

PassFormats PassOf(const Json& names, size_t index) {
  const std::string suffix = index == 0 ? "" : fmt::format("/{}", index);
  PassFormats pass{.first = index == 0,
                   .forward_stage = "forward" + suffix,
                   .head_stage = "head" + suffix,
                   .backward_stage = "backward" + suffix};
  for (const Json& name : names) {
    if (const Format* format = FindFormat(name.get<std::string>())) pass.formats.push_back(format);
  }
  return pass;
}

}  // namespace

Result<std::vector<PassFormats>> PlanPasses(RunStore& store,
                                            const std::vector<const Format*>& wanted) {
  PQ_ASSIGN_OR_RETURN(Json passes, ReadPasses(store));
  const std::set<std::string> known = NamesOf(passes);
  Json missing = Json::array();
  for (const Format* format : AllFormats()) {
    const bool asked =
        wanted.empty() || std::find(wanted.begin(), wanted.end(), format) != wanted.end();
    if (asked && known.count(std::string(format->name())) == 0) missing.push_back(format->name());
  }
  if (!missing.empty()) {
    passes.push_back(missing);
    PQ_RETURN_IF_ERROR(store.PutNote(kPassesNote, passes.dump()));
  }
  std::vector<PassFormats> planned;
  for (size_t i = 0; i < passes.size(); ++i) planned.push_back(PassOf(passes[i], i));
  return planned;
}

Result<bool> IsProbed(RunStore& store) {
  PQ_ASSIGN_OR_RETURN(const auto note, store.Note(kProbedNote));
  return note.has_value();
}

}  // namespace prismaquant

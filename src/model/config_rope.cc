#include "model/config_rope.h"

#include <fmt/format.h>

namespace prismaquant {
namespace {

constexpr char kFull[] = "full_attention", kSliding[] = "sliding_attention";

const Json& NoSettings() {
  static const Json none = Json::object();
  return none;
}

// An object under `key`; an empty one if it is left out.
const Json& Settings(ConfigReader& reader, const char* key) {
  if (!reader.Has(key)) return NoSettings();
  const Json& found = reader.object()[key];
  if (found.is_object()) return found;
  reader.Refuse(fmt::format("{} is {}, expected an object", key, found.type_name()));
  return NoSettings();
}

std::string RopeType(ConfigReader& rope) {
  return rope.StringOr("rope_type", rope.StringOr("type", "default").c_str());
}

// Reads what may stand in `rope` or, in old files, beside it.
double Number(ConfigReader& rope, ConfigReader& body, const char* key, double fallback) {
  return rope.Has(key) ? rope.Double(key) : body.DoubleOr(key, fallback);
}

void ParseFraction(double fraction, bool partial, ConfigReader& body, ModelConfig& config) {
  if (fraction > 1 || (!partial && fraction != 1)) {
    body.Refuse(fmt::format("partial_rotary_factor {} is not supported, expected {}", fraction,
                            partial ? "at most 1" : "1"));
  } else {
    config.rotary_dim = static_cast<int64_t>(static_cast<double>(config.head_dim) * fraction);
  }
  if (config.rotary_dim <= 0 || config.rotary_dim % 2 != 0) {
    body.Refuse(fmt::format("rotary dimension {} of a head of {}, expected an even number",
                            config.rotary_dim, config.head_dim));
  }
}

void ParseScaling(ConfigReader& rope, ConfigReader& body, ModelConfig& config) {
  const std::string type = RopeType(rope);
  if (type == "llama3") {
    const double context = Number(rope, body, "original_max_position_embeddings",
                                  body.DoubleOr("max_position_embeddings", 8192));
    config.rope_scaling = {.factor = rope.Double("factor"),
                           .low_freq_factor = rope.Double("low_freq_factor"),
                           .high_freq_factor = rope.Double("high_freq_factor"),
                           .original_max_position = static_cast<int64_t>(context)};
  } else if (type == "linear") {
    config.rope_factor = rope.Double("factor");
  } else if (type != "default") {
    rope.Refuse(
        fmt::format("rope type {} is not supported, known are default, linear and llama3", type));
  }
}

// "mrope_section": frequencies for time, rows and columns, interleaved.
void ParseSections(ConfigReader& rope, ModelConfig& config) {
  if (!rope.Has("mrope_section")) return;
  const Json& sections = rope.object()["mrope_section"];
  int64_t sum = 0;
  bool valid = sections.is_array() && sections.size() == 3;
  for (const Json& section : sections) {
    valid = valid && section.is_number_integer() && section.get<int64_t>() >= 0;
    if (valid) sum += section.get<int64_t>();
  }
  if (!valid || sum != config.rotary_dim / 2) {
    rope.Refuse(fmt::format("mrope_section is {}, expected three counts that sum to {}",
                            sections.dump(), config.rotary_dim / 2));
    return;
  }
  if (!rope.BoolOr("mrope_interleaved", false)) {
    rope.Refuse("mrope_interleaved: false is not supported");
  }
  config.row_frequencies = sections[1].get<int64_t>();
  config.column_frequencies = sections[2].get<int64_t>();
}

void ParseLocal(ConfigReader& rope, ConfigReader& body, double theta, ModelConfig& config) {
  config.local_rope_theta = rope.Has("rope_theta") ? rope.Double("rope_theta")
                                                   : body.DoubleOr("rope_local_base_freq", theta);
  const std::string type = RopeType(rope);
  if (type != "default") {
    rope.Refuse(fmt::format("rope type {} is not supported, expected default", type));
  }
}

}  // namespace

void ParseRope(ConfigReader& body, const RopeKeys& keys, ModelConfig& config) {
  const char* key = body.Has("rope_parameters") ? "rope_parameters" : "rope_scaling";
  ConfigReader outer(Settings(body, key), body.origin() + ": " + key);
  const bool by_type = outer.Has(kFull) || outer.Has(kSliding);
  const bool local = keys.local_theta > 0;
  const bool expected = local && key == std::string("rope_parameters");
  if (by_type != expected && !outer.object().empty()) {
    outer.Refuse(fmt::format("settings {} are not supported in {}",
                             by_type ? "per layer type" : "for all layer types alike",
                             config.architecture));
  }
  ConfigReader rope(by_type ? Settings(outer, kFull) : outer.object(),
                    by_type ? outer.origin() + ": " + kFull : outer.origin());
  config.rope_theta = Number(rope, body, "rope_theta", keys.theta);
  ParseFraction(Number(rope, body, "partial_rotary_factor", keys.fraction), keys.partial_rotary,
                body, config);
  ParseScaling(rope, body, config);
  ConfigReader sliding(by_type ? Settings(outer, kSliding) : NoSettings(),
                       outer.origin() + ": " + kSliding);
  if (keys.sections) ParseSections(rope, config);
  if (local) ParseLocal(sliding, body, keys.local_theta, config);
  for (const ConfigReader* reader : {&outer, &rope, &sliding}) {
    if (!reader->status().ok()) body.Refuse(reader->status());
  }
}

}  // namespace prismaquant

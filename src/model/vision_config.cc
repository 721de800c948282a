#include "model/vision_config.h"

#include <fmt/format.h>

#include <cmath>

#include "model/config_reader.h"

namespace prismaquant {
namespace {

// Products of the sizes that occur together stay within 64 bits.
constexpr int64_t kLargest = int64_t{1} << 24;
constexpr int64_t kMostBlocks = 10000, kMostPatchSide = 256, kMostFrames = 16, kMostMerge = 16;
constexpr char kActivation[] = "gelu_pytorch_tanh";

void ParseSizes(ConfigReader& reader, VisionConfig& config) {
  config.depth = reader.Int("depth", kMostBlocks);
  config.hidden_size = reader.Int("hidden_size", kLargest);
  config.intermediate_size = reader.Int("intermediate_size", kLargest);
  config.num_heads = reader.Int("num_heads", kLargest);
  config.in_channels = reader.Int("in_channels", 3);
  config.patch_size = reader.Int("patch_size", kMostPatchSide);
  config.temporal_patch_size = reader.Int("temporal_patch_size", kMostFrames);
  config.merge_size = reader.Int("spatial_merge_size", kMostMerge);
  config.out_hidden_size = reader.Int("out_hidden_size", kLargest);
  const int64_t positions = reader.Int("num_position_embeddings", kLargest);
  config.table_side = std::llround(std::sqrt(static_cast<double>(positions)));
  if (config.table_side * config.table_side != positions) {
    reader.Refuse(
        fmt::format("num_position_embeddings is {}, expected the square of a number", positions));
  }
  if (config.in_channels != 3) {
    reader.Refuse(fmt::format("in_channels is {}, expected 3", config.in_channels));
  }
  if (config.hidden_size % config.num_heads != 0 || config.head_dim() % 4 != 0) {
    reader.Refuse(
        fmt::format("hidden_size {} over num_heads {}, expected heads of a multiple of 4 elements",
                    config.hidden_size, config.num_heads));
  }
}

void RefuseUnsupported(ConfigReader& reader, const VisionConfig& config) {
  const Json& object = reader.object();
  if (reader.Has("hidden_act") && object["hidden_act"] != kActivation) {
    reader.Refuse(fmt::format("hidden_act {} is not supported, expected {}",
                              object["hidden_act"].dump(), kActivation));
  }
  if (reader.Has("deepstack_visual_indexes") &&
      object["deepstack_visual_indexes"] != Json::array()) {
    reader.Refuse(fmt::format("deepstack_visual_indexes {} is not supported, expected []",
                              object["deepstack_visual_indexes"].dump()));
  }
  if (reader.Has("head_dim") && object["head_dim"] != config.head_dim()) {
    reader.Refuse(fmt::format("head_dim {} is not supported, expected {}",
                              object["head_dim"].dump(), config.head_dim()));
  }
}

void ParseRope(ConfigReader& reader, VisionConfig& config) {
  if (!reader.Has("rope_parameters")) return;
  const Json& rope = reader.object()["rope_parameters"];
  if (!rope.is_object()) {
    reader.Refuse(fmt::format("rope_parameters is {}, expected an object", rope.type_name()));
    return;
  }
  if (rope.contains("rope_type") && rope["rope_type"] != "axial") {
    reader.Refuse(fmt::format("rope_parameters: rope_type {} is not supported, expected axial",
                              rope["rope_type"].dump()));
  }
  if (!rope.contains("rope_theta")) return;
  const Json& theta = rope["rope_theta"];
  config.rope_theta = theta.is_number() ? theta.get<double>() : 0;
  if (!(config.rope_theta > 0 && config.rope_theta <= 1e12)) {
    reader.Refuse(
        fmt::format("rope_parameters: rope_theta is {}, expected a positive number", theta.dump()));
  }
}

// The tower's outputs take the place of token embeddings.
void CheckTextWidth(const Json& json, ConfigReader& reader, const VisionConfig& config) {
  if (!json.contains("text_config") || !json["text_config"].is_object()) return;
  const Json& text = json["text_config"];
  if (!text.contains("hidden_size") || text["hidden_size"] == config.out_hidden_size) return;
  reader.Refuse(fmt::format("out_hidden_size is {}, expected text_config's hidden_size {}",
                            config.out_hidden_size, text["hidden_size"].dump()));
}

}  // namespace

Result<VisionConfig> VisionConfig::Parse(const Json& json, const std::string& origin) {
  if (!json.is_object() || !json.contains("vision_config") || !json["vision_config"].is_object()) {
    return Status::InvalidInput(fmt::format("{}: no object \"vision_config\"", origin));
  }
  ConfigReader reader(json["vision_config"], origin + ": vision_config");
  VisionConfig config;
  ParseSizes(reader, config);
  RefuseUnsupported(reader, config);
  ParseRope(reader, config);
  CheckTextWidth(json, reader, config);
  PQ_RETURN_IF_ERROR(reader.status());
  return config;
}

}  // namespace prismaquant

#ifndef PRISMAQUANT_ALLOCATE_QWEN3_6_27B_H_
#define PRISMAQUANT_ALLOCATE_QWEN3_6_27B_H_

// For tests and benchmarks: every allocated Linear of Qwen3.6-27B (text body, MTP head, vision
// tower), fused as vLLM fuses them, with the exact bytes of five formats under its kernels' shape
// rules, and random losses that fall with the bits. The same for the same seed.

#include <fmt/format.h>

#include <cmath>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "allocate/plan.h"

namespace prismaquant {

struct MemberShape {
  std::string name;
  int64_t out = 0, in = 0;
};

inline PlanRules Qwen27bRules() {
  return {.formats = {"nvfp4", "fp8", "int8", "mxfp8", "bf16"}, .pin = {}, .forbid = {}};
}

class Qwen27b {
 public:
  explicit Qwen27b(unsigned seed) : random_(seed) {}

  std::vector<UnitCosts> Units() {
    for (int layer = 0; layer < kLayers; ++layer) {
      const std::string prefix = fmt::format("model.language_model.layers.{}.", layer);
      if ((layer + 1) % kFullInterval == 0) {
        AddAttention(prefix);
      } else {
        AddDeltaNet(prefix);
      }
      AddMlp(prefix);
    }
    Add("mtp.fc", {{"mtp.fc", kHidden, 2 * kHidden}});
    AddAttention("mtp.layers.0.");
    AddMlp("mtp.layers.0.");
    for (int block = 0; block < kBlocks; ++block)
      AddBlock(fmt::format("model.visual.blocks.{}.", block));
    constexpr int64_t kMerged = 4 * kVision;
    Add("model.visual.merger.linear_fc1", {{"model.visual.merger.linear_fc1", kMerged, kMerged}});
    Add("model.visual.merger.linear_fc2", {{"model.visual.merger.linear_fc2", kHidden, kMerged}});
    return std::move(units_);
  }

 private:
  static constexpr int kLayers = 64, kFullInterval = 4, kBlocks = 27;
  static constexpr int64_t kHidden = 5120, kMlp = 17408, kQueries = 2 * 24 * 256, kKeys = 4 * 256,
                           kAttended = 24 * 256, kMixed = 10240, kValues = 6144, kVision = 1152,
                           kVisionMlp = 4304;

  void AddAttention(const std::string& prefix) {
    const std::string attention = prefix + "self_attn.";
    Add(attention + "qkv_proj", {{attention + "q_proj", kQueries, kHidden},
                                 {attention + "k_proj", kKeys, kHidden},
                                 {attention + "v_proj", kKeys, kHidden}});
    Add(attention + "o_proj", {{attention + "o_proj", kHidden, kAttended}});
  }

  void AddDeltaNet(const std::string& prefix) {
    const std::string mixer = prefix + "linear_attn.";
    Add(mixer + "in_proj_qkvz",
        {{mixer + "in_proj_qkv", kMixed, kHidden}, {mixer + "in_proj_z", kValues, kHidden}});
    Add(mixer + "out_proj", {{mixer + "out_proj", kHidden, kValues}});
  }

  void AddMlp(const std::string& prefix) {
    const std::string mlp = prefix + "mlp.";
    Add(mlp + "gate_up_proj",
        {{mlp + "gate_proj", kMlp, kHidden}, {mlp + "up_proj", kMlp, kHidden}});
    Add(mlp + "down_proj", {{mlp + "down_proj", kHidden, kMlp}});
  }

  void AddBlock(const std::string& prefix) {
    Add(prefix + "attn.qkv", {{prefix + "attn.qkv", 3 * kVision, kVision}});
    Add(prefix + "attn.proj", {{prefix + "attn.proj", kVision, kVision}});
    Add(prefix + "mlp.linear_fc1", {{prefix + "mlp.linear_fc1", kVisionMlp, kVision}});
    Add(prefix + "mlp.linear_fc2", {{prefix + "mlp.linear_fc2", kVision, kVisionMlp}});
  }

  void Add(const std::string& name, const std::vector<MemberShape>& members) {
    UnitCosts unit{.name = name, .linears = {}, .weights = 0, .formats = {}};
    int64_t out = 0, in = members.front().in, channels = 0, groups = 0, blocks = 0;
    for (const MemberShape& member : members) {
      unit.linears.push_back(member.name);
      unit.weights += member.out * member.in;
      out += member.out;
      channels += 2 * member.out;
      groups += 2 * member.out * (in / kIntGroup);
      blocks += member.out * (in / kMxGroup);
    }
    const int64_t weights = unit.weights;
    const double loss = std::lognormal_distribution<double>(-8, 1.3)(random_);
    const double fall = std::uniform_real_distribution<double>(0.6, 1.1)(random_);
    const auto offer = [&](const char* format, int64_t payload, int64_t global_scales) {
      const double bits = 8.0 * static_cast<double>(payload) / static_cast<double>(weights);
      const double noise = std::uniform_real_distribution<double>(0.9, 1.1)(random_);
      const double cost =
          payload == 2 * weights ? 0 : loss * noise * std::exp2(fall * (4.5 - bits));
      unit.formats.push_back({format, payload + global_scales, payload, cost, {.text = cost}});
    };
    const auto linears = static_cast<int64_t>(members.size());
    offer("nvfp4", weights / 2 + weights / kNvfp4Group, kGlobalScales * linears);
    offer("fp8", weights + channels, 0);
    if (in % kIntGroup == 0 && out % kMarlinOut == 0) offer("int8", weights + groups, 0);
    if (in % kMxGroup == 0 && out % kMxOut == 0) offer("mxfp8", weights + blocks, 0);
    offer("bf16", 2 * weights, 0);
    units_.push_back(std::move(unit));
  }

  static constexpr int64_t kNvfp4Group = 16, kMxGroup = 32, kIntGroup = 128, kMxOut = 128,
                           kMarlinOut = 64, kGlobalScales = 8;

  std::mt19937 random_;
  std::vector<UnitCosts> units_;
};

inline std::vector<UnitCosts> Qwen27bUnits(unsigned seed) { return Qwen27b(seed).Units(); }

}  // namespace prismaquant

#endif  // PRISMAQUANT_ALLOCATE_QWEN3_6_27B_H_

#ifndef PRISMAQUANT_EXPORT_MODEL_CARD_H_
#define PRISMAQUANT_EXPORT_MODEL_CARD_H_

// ModelCard: README.md of an exported checkpoint, as the Hugging Face hub shows it: front matter,
// sizes, precision mix, predicted and measured loss, how it was made and what to know before using
// it. The text depends on the card's values alone (no dates, times or paths), so that an export
// repeats byte for byte. Strings from outside are escaped.

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "base/status.h"
#include "export/summary.h"

namespace prismaquant {

struct ModelCard {
  // One budget of the sweep.
  struct Point {
    double bpp = 0;
    int64_t file_bytes = 0;
    double predicted = 0;  // nats per token
    bool chosen = false;
  };
  struct Measurement {
    std::string text;  // what it was measured on
    int64_t tokens = 0;
    double kl = 0, kl_stderr = 0;  // nats per token
    double ppl_source = 0, ppl = 0;
    double top1 = 0;  // share of positions
    // Of captions, nats per token; of the MTP head's first draft, a share; of experts, a share.
    std::optional<double> caption_kl, caption_loss_source, caption_loss;
    std::optional<double> draft_acceptance_source, draft_acceptance;
    std::optional<double> router_agreement;
  };
  struct Calibration {
    std::string file, labels;  // labels: "sampled" or "data"
    int64_t samples = 0, tokens = 0;
    uint64_t seed = 0;
  };

  std::string name;        // of the checkpoint
  std::string base_model;  // name of the source on the hub, or of its folder; none if empty
  std::map<std::string, std::string> license;  // front matter keys, as SourceLicense finds them
  CheckpointSummary summary;
  int64_t source_bytes = 0;         // of the source's *.safetensors
  std::optional<double> predicted;  // nats per token
  std::vector<Point> sweep;
  std::optional<Measurement> measured;
  std::optional<Calibration> calibration;
  std::string rendering;  // "gptq" or "rtn"
  bool smoothed = false;
  std::string command;  // that reproduces the checkpoint; none if empty
};

std::string RenderModelCard(const ModelCard& card);

// The keys license, license_name and license_link of the front matter of a checkpoint's README.md,
// or the license that its LICENSE file is recognised as (Apache 2.0, MIT). Empty if neither tells.
std::map<std::string, std::string> SourceLicense(const std::filesystem::path& folder);

}  // namespace prismaquant

#endif  // PRISMAQUANT_EXPORT_MODEL_CARD_H_

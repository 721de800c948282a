#include "export/model_card.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "base/progress.h"
#include "formats/format.h"
#include "io/file_system.h"

namespace prismaquant {
namespace {

// A double-quoted YAML scalar.
std::string Yaml(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) {
    const auto code = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      quoted += '\\';
      quoted += c;
    } else if (code < 0x20 || code == 0x7f) {
      quoted += fmt::format("\\x{:02x}", code);
    } else {
      quoted += c;
    }
  }
  return quoted + "\"";
}

// Text in a Markdown line or table cell, with nothing that Markdown or HTML would act on.
std::string Plain(const std::string& text) {
  std::string plain;
  for (const char c : text) {
    if (c == '<') {
      plain += "&lt;";
    } else if (static_cast<unsigned char>(c) < 0x20) {
      plain += ' ';
    } else {
      if (std::string_view("\\`*_[]|").find(c) != std::string_view::npos) plain += '\\';
      plain += c;
    }
  }
  return plain;
}

// One line of a fenced code block: a line break would let text out of the fence.
std::string CodeLine(std::string text) {
  std::replace_if(
      text.begin(), text.end(), [](char c) { return c == '\n' || c == '\r'; }, ' ');
  return text;
}

// "12,345"
std::string Grouped(int64_t number) {
  const std::string digits = std::to_string(number);
  std::string grouped;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) grouped += ',';
    grouped += digits[i];
  }
  return grouped;
}

std::string FormatTitle(std::string_view name) {
  if (name == "nvfp4") return "NVFP4 (W4A4)";
  if (name == "fp8") return "FP8 (W8A8, per channel)";
  if (name == "mxfp8") return "MXFP8 (W8A8)";
  if (name == "mxfp4") return "MXFP4 (W4A4)";
  if (name == "nvfp4a16") return "NVFP4 (weights alone)";
  if (name == "int4") return "INT4 (weights alone)";
  if (name == "int8") return "INT8 (weights alone)";
  return "unquantized";
}

// Format names present, smallest bits first, without the source's.
std::vector<std::string> QuantizedFormats(const CheckpointSummary& summary) {
  const std::map<std::string, FormatTotals> total = summary.Total();
  std::vector<std::string> names;
  for (const Format* format : AllFormats()) {
    const std::string name(format->name());
    if (!format->compression_format().empty() && total.count(name) > 0) names.push_back(name);
  }
  return names;
}

std::string FrontMatter(const ModelCard& card) {
  std::string text = "---\n";
  if (!card.base_model.empty()) {
    text += "base_model: " + Yaml(card.base_model) + "\nbase_model_relation: quantized\n";
  }
  text += "library_name: transformers\n";
  for (const auto& [key, value] : card.license) text += key + ": " + Yaml(value) + "\n";
  text += "tags:\n- prismaquant\n- vllm\n";
  const std::vector<std::string> formats = QuantizedFormats(card.summary);
  if (!formats.empty()) text += "- compressed-tensors\n";
  if (formats.size() > 1) text += "- mixed-precision\n";
  for (const std::string& name : formats) text += "- " + name + "\n";
  return text + "---\n\n";
}

std::string Percent(int64_t part, int64_t whole) {
  if (whole <= 0) return "-";
  return fmt::format("{:.1f} %", 100.0 * static_cast<double>(part) / static_cast<double>(whole));
}

const char* LossName(const ModelCard& card) {
  return card.calibration && card.calibration->labels == "data" ? "score" : "predicted KL";
}

std::string AtAGlance(const ModelCard& card) {
  const CheckpointSummary& summary = card.summary;
  std::string text = "## At a glance\n\n| | |\n|---|---|\n";
  text +=
      fmt::format("| size | {} of the source's {} ({}) |\n", FormatBytes(summary.file_bytes),
                  FormatBytes(card.source_bytes), Percent(summary.file_bytes, card.source_bytes));
  text += fmt::format("| parameters | {} |\n", Grouped(summary.parameters));
  text +=
      fmt::format("| bits per weight of the quantizable Linears (bpp) | {:.4f} |\n", summary.bpp);
  text +=
      fmt::format("| bits per parameter of the files (file bpp) | {:.4f} |\n", summary.file_bpp());
  if (card.predicted) {
    text += fmt::format("| {} | {:.5f} nats per token |\n", LossName(card), *card.predicted);
  }
  if (card.measured) {
    text += fmt::format("| measured KL | {:.5f} ± {:.5f} nats per token |\n", card.measured->kl,
                        card.measured->kl_stderr);
  }
  return text + "\n";
}

std::string PartRows(Part part, const PartSummary& content) {
  std::string rows;
  for (const Format* format : AllFormats()) {
    const auto found = content.formats.find(std::string(format->name()));
    if (found == content.formats.end()) continue;
    const FormatTotals& totals = found->second;
    rows +=
        fmt::format("| {} | {} | {} | {} | {} |\n", PartName(part), FormatTitle(found->first),
                    Grouped(totals.linears), Grouped(totals.weights), FormatBytes(totals.bytes));
  }
  if (content.other_parameters > 0) {
    rows += fmt::format("| {} | other tensors, unquantized | - | {} | {} |\n", PartName(part),
                        Grouped(content.other_parameters), FormatBytes(content.other_bytes));
  }
  return rows;
}

std::string PrecisionMix(const ModelCard& card) {
  std::string text =
      "## Precision\n\n| part | format | Linears | weights | bytes |\n|---|---|---:|---:|---:|\n";
  for (const auto& [part, content] : card.summary.parts) text += PartRows(part, content);
  text += card.smoothed
              ? "\nChannels were scaled by powers of two between norms and Linears "
                "(prismaquant.json: smoothing); of the rest, what is unquantized is the source's"
              : "\nWhat is unquantized is the source's";
  return text +
         ", bit for bit; so are the tokenizer, the chat template and the processor settings. "
         "Modules that vLLM fuses share one format and their global scales.\n\n";
}

std::string SignedBytes(int64_t difference) {
  return fmt::format("{}{}", difference < 0 ? '-' : '+', FormatBytes(std::abs(difference)));
}

std::string Sweep(const ModelCard& card) {
  const auto chosen = std::find_if(card.sweep.begin(), card.sweep.end(),
                                   [](const ModelCard::Point& point) { return point.chosen; });
  if (card.sweep.empty()) return "";
  std::string text = fmt::format(
      "## Other budgets\n\nThe best allocation of each budget{}.\n\n| bpp | size | {} (nats per "
      "token) |",
      chosen == card.sweep.end() ? "" : ", and its difference to this checkpoint", LossName(card));
  text += chosen == card.sweep.end() ? "\n|---:|---:|---:|\n"
                                     : " Δ bpp | Δ size | Δ |\n|---:|---:|---:|---:|---:|---:|\n";
  for (const ModelCard::Point& point : card.sweep) {
    text += fmt::format("| {:.4f} | {} | {:.5f} |", point.bpp, FormatBytes(point.file_bytes),
                        point.predicted);
    if (point.chosen) {
      text += " this one | | |";
    } else if (chosen != card.sweep.end()) {
      text += fmt::format(" {:+.4f} | {} | {:+.5f} |", point.bpp - chosen->bpp,
                          SignedBytes(point.file_bytes - chosen->file_bytes),
                          point.predicted - chosen->predicted);
    }
    text += "\n";
  }
  return text + "\n";
}

std::string Measured(const ModelCard& card) {
  if (!card.measured) return "";
  const ModelCard::Measurement& m = *card.measured;
  std::string text = fmt::format(
      "## Measured\n\nOn {} tokens of {}, against the source.\n\n| | source | this checkpoint "
      "|\n|---|---:|---:|\n",
      Grouped(m.tokens), Plain(m.text));
  text += fmt::format("| KL(source ‖ quantized), nats per token | 0 | {:.5f} ± {:.5f} |\n", m.kl,
                      m.kl_stderr);
  text += fmt::format("| perplexity | {:.3f} | {:.3f} |\n", m.ppl_source, m.ppl);
  text += fmt::format("| same most likely token | 100 % | {:.2f} % |\n", 100 * m.top1);
  if (m.caption_kl) {
    text +=
        fmt::format("| KL on captions of images, nats per token | 0 | {:.5f} |\n", *m.caption_kl);
    text += fmt::format("| loss of the captions, nats per token | {:.4f} | {:.4f} |\n",
                        *m.caption_loss_source, *m.caption_loss);
  }
  if (m.draft_acceptance) {
    text += fmt::format("| accepted first drafts of the MTP head | {:.1f} % | {:.1f} % |\n",
                        100 * *m.draft_acceptance_source, 100 * *m.draft_acceptance);
  }
  if (m.router_agreement) {
    text += fmt::format("| same experts | 100 % | {:.2f} % |\n", 100 * *m.router_agreement);
  }
  const bool comparable = card.predicted && std::string(LossName(card)) != "score" && m.kl > 0;
  if (comparable) {
    text += fmt::format("\nPredicted / measured: {:.3f}.\n", *card.predicted / m.kl);
  }
  return text + "\n";
}

std::string Use(const ModelCard& card) {
  return fmt::format("## Use\n\n```\nvllm serve {}\n```\n\n", CodeLine(card.name));
}

std::string Making(const ModelCard& card) {
  std::string text = "## How it was made\n\n";
  if (card.calibration) {
    const ModelCard::Calibration& c = *card.calibration;
    text += fmt::format("- calibration: {}, {} samples of {} tokens, seed {}, {} labels\n",
                        Plain(c.file), c.samples, c.tokens, c.seed, Plain(c.labels));
  }
  if (card.rendering == "gptq") {
    text +=
        "- weights rounded by GPTQ through the already quantized layers, group scales chosen "
        "inside its loop\n";
  } else if (card.rendering == "rtn") {
    text += "- weights rounded to nearest\n";
  }
  text +=
      "- formats chosen by an exact allocation of the byte budget; every choice is in "
      "`prismaquant.json`\n";
  if (!card.command.empty()) text += fmt::format("\n```\n{}\n```\n", CodeLine(card.command));
  return text + "\n";
}

std::string Limits(const ModelCard& card) {
  std::string text = "## Known limits\n\n";
  if (std::string(LossName(card)) == "score") {
    text += "- The score ranks allocations; with labels from the text it is no estimate of a KL.\n";
  } else {
    text +=
        "- The predicted KL is a second-order estimate of the calibration text's; other texts "
        "differ.\n";
  }
  if (card.measured) {
    text +=
        "- Measured in an emulation of the quantized arithmetic on a CPU, weights and "
        "activations, not on a GPU's kernels.\n";
  }
  for (const auto& [part, name] :
       {std::pair(Part::kVision, "vision tower"), std::pair(Part::kMtp, "MTP head")}) {
    const auto found = card.summary.parts.find(part);
    if (found == card.summary.parts.end()) continue;
    const auto& formats = found->second.formats;
    const bool unquantized = std::all_of(formats.begin(), formats.end(), [](const auto& entry) {
      return entry.first == SourceFormat().name();
    });
    if (unquantized) text += fmt::format("- The {} is unquantized.\n", name);
  }
  if (card.summary.Total().count("nvfp4") > 0) {
    text +=
        "- GPUs before SM100 (Blackwell) have no NVFP4 arithmetic: vLLM runs such Linears there "
        "with unquantized activations (Marlin), so results differ a little from those above.\n";
  }
  return text;
}

// "key: value" of a front matter line, quotes removed; empty key if it is something else.
std::pair<std::string, std::string> FrontMatterEntry(std::string_view line) {
  const size_t colon = line.find(':');
  if (colon == std::string_view::npos || line.starts_with(' ')) return {};
  std::string_view value = line.substr(colon + 1);
  while (!value.empty() && (value.front() == ' ' || value.front() == '\t')) value.remove_prefix(1);
  while (!value.empty() && (value.back() == ' ' || value.back() == '\r')) value.remove_suffix(1);
  const bool quoted = value.size() > 1 && (value.front() == '"' || value.front() == '\'') &&
                      value.back() == value.front();
  if (quoted) {
    value.remove_prefix(1);
    value.remove_suffix(1);
  }
  return {std::string(line.substr(0, colon)), std::string(value)};
}

std::map<std::string, std::string> LicenseOfReadme(const std::string& readme) {
  std::map<std::string, std::string> license;
  if (!readme.starts_with("---\n") && !readme.starts_with("---\r\n")) return license;
  size_t begin = readme.find('\n') + 1;
  while (begin < readme.size()) {
    const size_t end = std::min(readme.find('\n', begin), readme.size());
    const std::string line = readme.substr(begin, end - begin);
    if (line.starts_with("---")) break;
    const auto [key, value] = FrontMatterEntry(line);
    if (key == "license" || key == "license_name" || key == "license_link") license[key] = value;
    begin = end + 1;
  }
  return license;
}

}  // namespace

std::string RenderModelCard(const ModelCard& card) {
  std::string text = FrontMatter(card) + "# " + Plain(card.name) + "\n\n";
  text +=
      card.base_model.empty() ? "A quantized checkpoint" : Plain(card.base_model) + " quantized";
  text += " by PrismaQuant: each Linear has the number format that its sensitivity deserves.\n\n";
  return text + AtAGlance(card) + PrecisionMix(card) + Measured(card) + Sweep(card) + Use(card) +
         Making(card) + Limits(card);
}

std::map<std::string, std::string> SourceLicense(const std::filesystem::path& folder) {
  if (const Result<std::string> readme = ReadFile(folder / "README.md"); readme.ok()) {
    const std::map<std::string, std::string> license = LicenseOfReadme(*readme);
    if (license.count("license") > 0) return license;
  }
  for (const char* name : {"LICENSE", "LICENSE.txt", "LICENSE.md"}) {
    const Result<std::string> text = ReadFile(folder / name);
    if (!text.ok()) continue;
    const std::string head = text->substr(0, 400);
    const bool apache = head.find("Apache License") != std::string::npos;
    if (apache && head.find("Version 2.0") != std::string::npos) return {{"license", "apache-2.0"}};
    if (head.find("MIT License") != std::string::npos) return {{"license", "mit"}};
  }
  return {};
}

}  // namespace prismaquant

#include "export/model_card.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

namespace prismaquant {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::Pair;
using ::testing::UnorderedElementsAre;

ModelCard Card() {
  ModelCard card;
  card.name = "Tiny-PQ";
  card.base_model = "example/Tiny";
  card.license = {{"license", "apache-2.0"}};
  PartSummary& text = card.summary.parts[Part::kText];
  text.formats["nvfp4"] = {10, 1'000'000, 562'580, 562'500};
  text.formats["bf16"] = {2, 20'000, 40'000, 40'000};
  text.other_parameters = 512;
  text.other_bytes = 1024;
  card.summary.parts[Part::kMtp].formats["bf16"] = {1, 100, 200, 200};
  card.summary.parameters = 1'020'612;
  card.summary.file_bytes = 604'000;
  card.summary.bpp = 4.5;
  card.source_bytes = 2'042'000;
  card.predicted = 0.05;
  card.sweep = {{4.5, 604'000, 0.05, true}, {8, 1'040'000, 0.01, false}};
  card.measured = {"text.txt", 8176, 0.04, 0.002, 10.5, 11, 0.875};
  card.calibration = {"calibration.txt", "sampled", 32, 512, 0};
  card.rendering = "gptq";
  card.command = "prismaquant quantize SRC OUT --bpp 4.5";
  return card;
}

TEST(ModelCard, Golden) {
  EXPECT_EQ(RenderModelCard(Card()), R"(---
base_model: "example/Tiny"
base_model_relation: quantized
library_name: transformers
license: "apache-2.0"
tags:
- prismaquant
- vllm
- compressed-tensors
- nvfp4
---

# Tiny-PQ

example/Tiny quantized by PrismaQuant: each Linear has the number format that its sensitivity deserves.

## At a glance

| | |
|---|---|
| size | 604.0 kB of the source's 2.042 MB (29.6 %) |
| parameters | 1,020,612 |
| bits per weight of the quantizable Linears (bpp) | 4.5000 |
| bits per parameter of the files (file bpp) | 4.7344 |
| predicted KL | 0.05000 nats per token |
| measured KL | 0.04000 ± 0.00200 nats per token |

## Precision

| part | format | Linears | weights | bytes |
|---|---|---:|---:|---:|
| text body | NVFP4 (W4A4) | 10 | 1,000,000 | 562.6 kB |
| text body | unquantized | 2 | 20,000 | 40.0 kB |
| text body | other tensors, unquantized | - | 512 | 1.0 kB |
| MTP | unquantized | 1 | 100 | 200 bytes |

What is unquantized is the source's, bit for bit; so are the tokenizer, the chat template and the processor settings. Modules that vLLM fuses share one format and their global scales.

## Measured

On 8,176 tokens of text.txt, against the source.

| | source | this checkpoint |
|---|---:|---:|
| KL(source ‖ quantized), nats per token | 0 | 0.04000 ± 0.00200 |
| perplexity | 10.500 | 11.000 |
| same most likely token | 100 % | 87.50 % |

Predicted / measured: 1.250.

## Other budgets

The best allocation of each budget, and its difference to this checkpoint.

| bpp | size | predicted KL (nats per token) | Δ bpp | Δ size | Δ |
|---:|---:|---:|---:|---:|---:|
| 4.5000 | 604.0 kB | 0.05000 | this one | | |
| 8.0000 | 1.040 MB | 0.01000 | +3.5000 | +436.0 kB | -0.04000 |

## Use

```
vllm serve Tiny-PQ
```

## How it was made

- calibration: calibration.txt, 32 samples of 512 tokens, seed 0, sampled labels
- weights rounded by GPTQ through the already quantized layers, group scales chosen inside its loop
- formats chosen by an exact allocation of the byte budget; every choice is in `prismaquant.json`

```
prismaquant quantize SRC OUT --bpp 4.5
```

## Known limits

- The predicted KL is a second-order estimate of the calibration text's; other texts differ.
- Measured in an emulation of the quantized arithmetic on a CPU, weights and activations, not on a GPU's kernels.
- The MTP head is unquantized.
- GPUs before SM100 (Blackwell) have no NVFP4 arithmetic: vLLM runs such Linears there with unquantized activations (Marlin), so results differ a little from those above.
)");
}

TEST(ModelCard, EscapesWhatComesFromOutside) {
  ModelCard card = Card();
  card.base_model = "a\"b\\c\n---\ninjected: yes";
  card.measured->text = "x|y<b>`z`\nnext";
  card.command = "run\n```\n<script>";
  const std::string text = RenderModelCard(card);
  EXPECT_THAT(text, HasSubstr("base_model: \"a\\\"b\\\\c\\x0a---\\x0ainjected: yes\"\n"));
  EXPECT_THAT(text, Not(HasSubstr("\ninjected")));
  EXPECT_THAT(text, HasSubstr("x\\|y&lt;b>\\`z\\` next"));
  EXPECT_THAT(text, HasSubstr("```\nrun ``` <script>\n```"));
}

TEST(ModelCard, LeavesOutWhatIsUnknown) {
  ModelCard card;
  card.name = "x";
  const std::string text = RenderModelCard(card);
  EXPECT_THAT(text, Not(HasSubstr("base_model")));
  EXPECT_THAT(text, Not(HasSubstr("license")));
  EXPECT_THAT(text, Not(HasSubstr("## Measured")));
  EXPECT_THAT(text, Not(HasSubstr("## Other budgets")));
  EXPECT_THAT(text, Not(HasSubstr("predicted KL |")));
  EXPECT_THAT(text, Not(HasSubstr("calibration:")));
}

TEST(ModelCard, DataLabelsGiveScoresAndNoRatio) {
  ModelCard card = Card();
  card.calibration->labels = "data";
  const std::string text = RenderModelCard(card);
  EXPECT_THAT(text, HasSubstr("| score | 0.05000"));
  EXPECT_THAT(text, Not(HasSubstr("predicted KL")));
  EXPECT_THAT(text, Not(HasSubstr("Predicted / measured")));
}

class License : public ::testing::Test {
 protected:
  License() : folder_(std::filesystem::path(::testing::TempDir()) / "pq_license") {
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
  }
  ~License() override { std::filesystem::remove_all(folder_); }
  void Write(const std::string& file, const std::string& text) const {
    std::ofstream(folder_ / file) << text;
  }
  const std::filesystem::path folder_;
};

TEST_F(License, OfTheFrontMatter) {
  Write("LICENSE", "MIT License\n");
  Write("README.md",
        "---\nlanguage: en\nlicense: 'other'\nlicense_name: \"own\"\r\nlicense_link: "
        "https://x.y/L\n---\nlicense: no\n");
  EXPECT_THAT(SourceLicense(folder_),
              UnorderedElementsAre(Pair("license", "other"), Pair("license_name", "own"),
                                   Pair("license_link", "https://x.y/L")));
}

TEST_F(License, OfTheLicenseFile) {
  Write("README.md", "# No front matter\nlicense: no\n");
  Write("LICENSE", "\n      Apache License\n   Version 2.0, January 2004\n");
  EXPECT_THAT(SourceLicense(folder_), UnorderedElementsAre(Pair("license", "apache-2.0")));
  Write("LICENSE", "Something else\n");
  EXPECT_THAT(SourceLicense(folder_), IsEmpty());
}

}  // namespace
}  // namespace prismaquant

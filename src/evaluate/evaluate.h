#ifndef PRISMAQUANT_EVALUATE_EVALUATE_H_
#define PRISMAQUANT_EVALUATE_EVALUATE_H_

// Evaluation: how far a checkpoint is from its source on a text and on captioned images, measured
// by this program's own forward pass with weights and activations quantized as the checkpoint says.
// Layers are streamed; logits exist for a block of tokens.

#include <cstdint>
#include <optional>
#include <vector>

#include "base/json.h"
#include "base/status.h"
#include "data/calibration.h"
#include "evaluate/drafts.h"
#include "model/model.h"

namespace prismaquant {

struct TokenLogProbs {
  std::vector<int32_t> ids;               // of one window
  std::vector<double> source, quantized;  // log p(ids[i] | ids[<i]), from i = 1
};

// How far the quantized model is from the source on the captions of images.
struct CaptionEvaluation {
  int64_t images = 0, tokens = 0;    // tokens of the captions
  double kl = 0, kl_stderr = 0;      // nats per token; standard error over the images' means
  double loss_source = 0, loss = 0;  // cross-entropy of the captions, nats per token
  double top1 = 0;                   // share of tokens with the same most likely one
  double accuracy_source = 0, accuracy = 0;  // share of tokens that are the most likely ones
};

struct Evaluation {
  int64_t tokens = 0;    // scored positions: each window's but its last
  double kl = 0;         // mean KL(source || quantized), nats per token
  double kl_stderr = 0;  // standard error over the windows' means; 0 for one window
  double ppl_source = 0, ppl = 0;
  double top1 = 0;                      // share of positions with the same most likely token
  int64_t bytes_source = 0, bytes = 0;  // of *.safetensors
  std::optional<CaptionEvaluation> captions;
  // Of models with an MTP head: what each accepts of its own drafts.
  std::optional<DraftAcceptance> drafts_source, drafts;
  // Of mixtures of experts: the share of a token's experts that both models choose, mean over
  // tokens and layers.
  std::optional<double> router_agreement;
  std::vector<TokenLogProbs> log_probs;

  // As the evaluate command prints it; predicted_kl null if negative.
  Json ToJson(double predicted_kl) const;
};

class PassKeeper;

// What keeps the passes of an evaluation (evaluate/forward.h); null: nothing does.
struct EvaluationKeepers {
  PassKeeper* source = nullptr;
  PassKeeper* quantized = nullptr;
};

// Windows and captions of `data`. kInvalidInput unless both models are of one family with the same
// vocabulary, hidden size, number of layers and parts, and the windows have at least two tokens.
Result<Evaluation> Evaluate(const Model& source, const Model& quantized, const Calibration& data,
                            const ComputeOptions& compute, const EvaluationKeepers& keepers = {});

}  // namespace prismaquant

#endif  // PRISMAQUANT_EVALUATE_EVALUATE_H_

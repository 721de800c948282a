#ifndef PRISMAQUANT_MODEL_SEQUENCES_H_
#define PRISMAQUANT_MODEL_SEQUENCES_H_

// Sequences: how calibration and evaluation data enter the parts of a model. The vision tower sees
// the images of the captions; the body and the output projection see all sequences, an image's
// tokens being what the tower made of it; the MTP head sees the text windows. A sequence keeps its
// number in all parts. Holds positions, no weights and no activations; model and calibration must
// outlive it. Const methods may run concurrently.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "base/status.h"
#include "data/calibration.h"
#include "model/model.h"

namespace prismaquant {

// Sequence numbers [first, end).
struct SequenceRange {
  int64_t first = 0, end = 0;
  int64_t count() const { return end - first; }
};

class Sequences {
 public:
  // kInvalidInput if there are captions, but the model has no vision tower or the image's tokens do
  // not fit it.
  static Result<Sequences> Make(const Model& model, const Calibration& calibration,
                                const ComputeOptions& options);

  SequenceRange Range(Part part) const;
  // Of a sequence on its way through a part.
  const SequenceContext& Context(Part part, int64_t sequence) const;

  // The part whose outputs a part's inputs are made from, if there is one.
  std::optional<Part> Before(Part part) const;
  // The input of a part's first layer, a tensor of its own: patch embeddings [1, patches, vision
  // hidden size], embeddings [1, tokens, hidden_size], the body's output, or MtpInput. `before`:
  // the sequence's output of that other part; undefined if it has none, as a text has no image.
  Result<at::Tensor> Input(Part part, int64_t sequence, const at::Tensor& before) const;
  // MTP head: [1, tokens - 1, 2 hidden_size] from the body's output of a text window.
  Result<at::Tensor> MtpInput(int64_t sequence, const at::Tensor& hidden) const;
  // The part of a gradient [1, tokens, hidden_size] at the body's input that belongs to the image,
  // [1, image tokens, hidden_size].
  at::Tensor ImageRows(int64_t sequence, const at::Tensor& gradient) const;

 private:
  Sequences(const Model& model, const Calibration& calibration, const ComputeOptions& options)
      : model_(&model), calibration_(&calibration), options_(options) {}
  Status AddCaption(const CaptionSequence& caption);
  Result<at::Tensor> PatchEmbeddings(int64_t sequence) const;
  // `image`: the tower's output [1, image tokens, hidden_size], of captions only.
  Result<at::Tensor> Embeddings(int64_t sequence, const at::Tensor& image) const;
  // Ids [1, tokens].
  at::Tensor Ids(int64_t sequence) const;
  // Where the image's tokens stand, int64.
  at::Tensor ImagePlaces(int64_t sequence) const;

  const Model* model_;
  const Calibration* calibration_;
  ComputeOptions options_;
  SequenceContext text_, mtp_;
  std::vector<SequenceContext> captions_, images_;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_MODEL_SEQUENCES_H_

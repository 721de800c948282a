#ifndef PRISMAQUANT_BENCH_FIDELITY_CASE_OBSERVER_H_
#define PRISMAQUANT_BENCH_FIDELITY_CASE_OBSERVER_H_

// CaseObserver: turns what the backward passes show of the Linears of one case into its terms, for
// every format. Fed sequence by sequence, draw by draw and Linear by Linear, by one thread.

#include <ATen/core/Tensor.h>

#include <vector>

#include "bench/fidelity/cases.h"
#include "bench/fidelity/observations.h"
#include "bench/fidelity/source_body.h"

namespace prismaquant {

class CaseObserver {
 public:
  // Adds to `result`, which has the terms of all formats, and must outlive the observer as the
  // body and the case must.
  CaseObserver(const SourceBody& body, const FidelityCase& one, bool weights_only,
               CaseObservations& result);

  // The draws of another sequence follow, which all have the same x.
  void BeginSequence();
  // x [tokens, in], g [tokens, out], dx [tokens, in] of the case's Linear number `member`.
  void Observe(size_t member, const at::Tensor& x, const at::Tensor& g, const at::Tensor& dx);
  // All Linears that a token reached have been shown.
  void EndDraw(size_t draw, size_t sequence);

 private:
  struct Member {
    const at::Tensor* weight;
    std::vector<at::Tensor> errors;   // per format, [out, in]
    std::vector<at::Tensor> outputs;  // per format, error of the output [tokens, out]; if none, the
                                      // sequence has not been seen
  };
  struct Priced {
    const Format* format;
    FormatObservations* found;
    at::Tensor input_error = {};  // [tokens, in]; undefined if activations stay
    Terms terms = {};             // of the draw
    at::Tensor per_token = {};    // s by token
    double weights = 0;           // the weights' part of s
  };

  void SetInput(const at::Tensor& x, Member& member);

  SharedScales scales_;
  bool weights_only_;
  std::vector<Member> members_;
  std::vector<Priced> formats_;
  at::Tensor dx_;  // of all Linears
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_BENCH_FIDELITY_CASE_OBSERVER_H_

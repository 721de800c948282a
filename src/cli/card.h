#ifndef PRISMAQUANT_CLI_CARD_H_
#define PRISMAQUANT_CLI_CARD_H_

// The model card of a delivery: gathers what export/model_card.h prints.

#include <string>

#include "base/status.h"
#include "evaluate/evaluate.h"

namespace prismaquant {

class Session;
struct Delivery;

// `evaluation` may be null; `text_name` is the held-out text it was made on.
Result<std::string> MakeCard(const Session& session, const Delivery& delivery,
                             const Evaluation* evaluation, const std::string& text_name);

}  // namespace prismaquant

#endif  // PRISMAQUANT_CLI_CARD_H_

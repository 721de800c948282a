#include "cli/card.h"

namespace prismaquant {

Result<std::string> MakeCard(const Session&, const Delivery&, const Evaluation*, const std::string&) {
  return std::string();
}

}  // namespace prismaquant

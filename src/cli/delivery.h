#ifndef PRISMAQUANT_CLI_DELIVERY_H_
#define PRISMAQUANT_CLI_DELIVERY_H_

// Delivery: from a plan to a checkpoint folder with its record and model card. The folder's
// contents depend on the source, the calibration and the settings, and through the last bits of
// matrix products on the machine, never on times or on how often the run was interrupted.
//
// OUT/prismaquant.json carries the key of the run that made it, so that a repeated command
// recognises its own finished export and goes on behind it.

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "cli/session.h"
#include "cli/validate.h"

namespace prismaquant {

// What is delivered and what the record says of it.
struct Delivery {
  std::filesystem::path out;  // without a separator at its end
  bool overwrite = false;
  std::string base_model;   // name in the card; the source folder's name if empty
  std::string command;      // how to make it again, for the card
  std::string calibration;  // name of the calibration text, empty if not known
  PlannedAllocation plan;
  std::vector<PlannedAllocation> sweep;
  // Of text and captions: KL. Text negative: there is no prediction.
  PartLosses predicted = {.text = -1};
  PartLosses joint = {.text = -1};  // with the cross terms between units
  FormatChoice formats;
  RenderOptions render;
  std::optional<Validation> validation;  // by which the plan was chosen
};

// Identifies a delivery: two with the same key give the same bytes on one machine.
std::string DeliveryKey(const Session& session, const Delivery& delivery);

// Whether OUT is what this delivery makes. OUT existing otherwise, without overwrite, is
// kInvalidInput.
Result<bool> IsDelivered(const Session& session, const Delivery& delivery);

// Renders and writes OUT unless it is delivered already; then drops the rendered tensors from the
// store.
Status Deliver(Session& session, const Delivery& delivery);

// What rendering did, as it stands in OUT's record.
Result<Json> RenderingRecord(const Delivery& delivery);

// Puts measured figures into OUT's record and card.
Status RecordEvaluation(Session& session, const Delivery& delivery, const Evaluation& evaluation,
                        const std::string& text_name);

}  // namespace prismaquant

#endif  // PRISMAQUANT_CLI_DELIVERY_H_

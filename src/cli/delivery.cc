#include "cli/delivery.h"

#include <utility>

#include "base/sha256.h"
#include "base/version.h"
#include "cli/card.h"
#include "export/exporter.h"
#include "io/checkpoint.h"
#include "io/file_system.h"

namespace prismaquant {
namespace {

Json RenderSettings(const RenderOptions& options) {
  const bool gptq = options.mode == RenderMode::kGptq;
  Json json = {{"mode", gptq ? "gptq" : "rtn"},
               {"precision", options.compute.dtype == at::kBFloat16 ? "bf16" : "float32"}};
  if (gptq)
    json.update(
        {{"damping", options.gptq.damping}, {"hessian", options.guided ? "guided" : "plain"}});
  return json;
}

// Linears that no calibration data reached: they stay in the source's format.
Json Unmeasured(const Session& session) {
  Json names = Json::array();
  if (!session.calibration().captions.empty()) return names;
  for (const LinearInfo& linear : session.model().linears()) {
    if (linear.part == Part::kVision) names.push_back(linear.name);
  }
  return names;
}

Result<Json> MakeRecord(Session& session, const Delivery& delivery) {
  const std::string key = RenderKey(delivery.formats, delivery.render);
  PQ_ASSIGN_OR_RETURN(Json rendering,
                      RenderReport(session.store(), key, session.model().num_layers()));
  const Smoothing* smoothing = session.model().smoothing();
  Json plan = PlanToJson(delivery.plan, delivery.sweep);
  Json record = {{"schema", 1},
                 {"prismaquant", kVersion},
                 {"key", DeliveryKey(session, delivery)},
                 {"run", session.identity()},
                 {kSmoothingKey, nullptr},
                 {"calibration", nullptr},
                 {"render", RenderSettings(delivery.render)},
                 {"rendering", std::move(rendering)},
                 {"predicted_kl", nullptr},
                 {"predicted_kl_joint", nullptr},
                 {"evaluation", nullptr}};
  if (smoothing != nullptr) record[kSmoothingKey] = SmoothingToJson(smoothing->exponents());
  if (!delivery.calibration.empty()) record["calibration"] = delivery.calibration;
  if (delivery.validation) record["validation"] = delivery.validation->ToJson();
  for (const auto& [name, value] : plan.items()) {
    if (!record.contains(name)) record[name] = value;
  }
  record["choices"] = Json::object();
  for (const auto& [linear, format] : delivery.formats) record["choices"][linear] = format->name();
  if (delivery.predicted.text >= 0) {
    record["predicted_kl"] = delivery.predicted.text;
  } else {
    for (const char* name : {"predicted", "objective", "lower_bound", "gap"})
      record[name] = nullptr;
  }
  if (delivery.joint.text >= 0) record["predicted_kl_joint"] = delivery.joint.text;
  record["unmeasured"] = Unmeasured(session);
  return record;
}

Status WriteCheckpoint(Session& session, const Delivery& delivery, const std::string& key) {
  ExportPlan plan;
  plan.model = &session.model();
  plan.formats = delivery.formats;
  PQ_ASSIGN_OR_RETURN(plan.run_record, MakeRecord(session, delivery));
  PQ_ASSIGN_OR_RETURN(plan.card, MakeCard(session, delivery, nullptr, ""));
  plan.options.overwrite = delivery.overwrite;
  std::map<std::string, int> layer_of;
  for (const LinearInfo& linear : session.model().linears()) layer_of[linear.name] = linear.layer;
  int loaded = -1;
  std::map<std::string, StoredTensors> tensors;
  plan.rendered = [&](const std::string& linear) -> Result<StoredTensors> {
    if (const int layer = layer_of.at(linear); layer != loaded) {
      PQ_ASSIGN_OR_RETURN(tensors, RenderedLayer(session.store(), key, layer));
      loaded = layer;
    }
    return tensors.at(linear);
  };
  return ExportCheckpoint(FileSystem::Default(), plan, delivery.out);
}

}  // namespace

std::string DeliveryKey(const Session& session, const Delivery& delivery) {
  Json json = {{"version", kVersion},
               {"run", session.identity()},
               {"render", RenderKey(delivery.formats, delivery.render)},
               {"base_model", delivery.base_model},
               {"plan", PlanToJson(delivery.plan, delivery.sweep)},
               {"command", delivery.command}};
  if (delivery.validation) json["validation"] = delivery.validation->ToJson();
  return Sha256Hex(json.dump());
}

Result<bool> IsDelivered(const Session& session, const Delivery& delivery) {
  std::error_code error;
  if (!std::filesystem::exists(delivery.out, error)) return false;
  if (std::filesystem::exists(delivery.out / kRecordFile, error)) {
    PQ_ASSIGN_OR_RETURN(const std::string text, ReadFile(delivery.out / kRecordFile));
    const Result<Json> record = ParseJson(text, kRecordFile);
    if (record.ok() && record->is_object() &&
        record->value("key", "") == DeliveryKey(session, delivery))
      return true;
  }
  if (delivery.overwrite) return false;
  return ExistsAlready(delivery.out);
}

Status Deliver(Session& session, const Delivery& delivery) {
  PQ_ASSIGN_OR_RETURN(const bool delivered, IsDelivered(session, delivery));
  const std::string key = RenderKey(delivery.formats, delivery.render);
  if (delivered) {
    PQ_RETURN_IF_ERROR(CheckpointWriter::RemoveLeftovers(FileSystem::Default(), delivery.out));
  } else {
    PQ_RETURN_IF_ERROR(session.Render(delivery.formats, delivery.render, key));
    PQ_RETURN_IF_ERROR(
        session.Timed("export", [&] { return WriteCheckpoint(session, delivery, key); }));
  }
  return DropRendering(session.store(), key);
}

Result<Json> RenderingRecord(const Delivery& delivery) {
  const std::filesystem::path path = delivery.out / kRecordFile;
  PQ_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  PQ_ASSIGN_OR_RETURN(const Json record, ParseJson(text, path.string()));
  return record.contains("rendering") ? record["rendering"] : Json::object();
}

Status RecordEvaluation(Session& session, const Delivery& delivery, const Evaluation& evaluation,
                        const std::string& text_name) {
  const std::filesystem::path path = delivery.out / kRecordFile;
  PQ_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  PQ_ASSIGN_OR_RETURN(Json record, ParseJson(text, path.string()));
  record["evaluation"] = evaluation.ToJson(delivery.predicted.text);
  record["evaluation"]["text"] = text_name;
  PQ_ASSIGN_OR_RETURN(const std::string card, MakeCard(session, delivery, &evaluation, text_name));
  PQ_RETURN_IF_ERROR(WriteFileAtomically(FileSystem::Default(), delivery.out / "README.md", card));
  return WriteFileAtomically(FileSystem::Default(), path, record.dump(2) + "\n");
}

}  // namespace prismaquant

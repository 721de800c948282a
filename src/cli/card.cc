#include "cli/card.h"

#include <utility>

#include "cli/delivery.h"
#include "export/model_card.h"
#include "export/summary.h"
#include "io/file_system.h"

namespace prismaquant {
namespace {

void AddParts(const Evaluation& evaluation, ModelCard::Measurement& measured) {
  if (evaluation.captions) {
    measured.caption_kl = evaluation.captions->kl;
    measured.caption_loss = evaluation.captions->loss;
    measured.caption_loss_source = evaluation.captions->loss_source;
  }
  if (evaluation.drafts && evaluation.drafts->judged[0] > 0) {
    measured.draft_acceptance = evaluation.drafts->rate(0);
    measured.draft_acceptance_source = evaluation.drafts_source->rate(0);
  }
  measured.router_agreement = evaluation.router_agreement;
}

}  // namespace

Result<std::string> MakeCard(const Session& session, const Delivery& delivery,
                             const Evaluation* evaluation, const std::string& text_name) {
  const Checkpoint& source = session.checkpoint();
  const std::map<std::string, std::string>& run = session.identity();
  ModelCard card;
  card.name = delivery.out.filename().string();
  card.base_model = delivery.base_model.empty()
                        ? WithoutSeparator(source.folder()).filename().string()
                        : delivery.base_model;
  card.license = SourceLicense(source.folder());
  PQ_ASSIGN_OR_RETURN(card.summary,
                      SummarizePlan(session.model(), delivery.formats, delivery.plan.file_bytes));
  card.source_bytes = source.file_bytes();
  if (delivery.predicted.text >= 0) card.predicted = delivery.predicted.text;
  for (const PlannedAllocation& point : delivery.sweep) {
    if (!point.feasible) continue;
    card.sweep.push_back(
        {point.bpp, point.file_bytes, point.losses.text, point.choices == delivery.plan.choices});
  }
  if (evaluation != nullptr) {
    card.measured = ModelCard::Measurement{text_name,
                                           evaluation->tokens,
                                           evaluation->kl,
                                           evaluation->kl_stderr,
                                           evaluation->ppl_source,
                                           evaluation->ppl,
                                           evaluation->top1};
    AddParts(*evaluation, *card.measured);
  }
  card.calibration =
      ModelCard::Calibration{delivery.calibration, run.at("labels"), std::stoll(run.at("samples")),
                             std::stoll(run.at("tokens")), std::stoull(run.at("seed"))};
  card.rendering = delivery.render.mode == RenderMode::kGptq ? "gptq" : "rtn";
  card.smoothed = session.model().smoothing() != nullptr;
  card.command = delivery.command;
  return RenderModelCard(card);
}

}  // namespace prismaquant

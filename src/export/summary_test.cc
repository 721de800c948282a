#include "export/summary.h"

#include <gtest/gtest.h>

#include "export/tiny_checkpoint.h"

namespace prismaquant {
namespace {

TEST(Summary, CountsTheSource) {
  const TinyCheckpoint tiny;
  const CheckpointSummary summary = TinyCheckpoint::Must(Summarize(tiny.model()));
  EXPECT_EQ(summary.parameters, tiny.checkpoint().parameters());
  EXPECT_EQ(summary.file_bytes, tiny.checkpoint().file_bytes());
  EXPECT_DOUBLE_EQ(summary.bpp, 16);
  EXPECT_EQ(summary.parts.at(Part::kText).formats.at("bf16").linears, 15);
  EXPECT_EQ(summary.parts.at(Part::kVision).formats.at("bf16").linears, 1);
  EXPECT_EQ(summary.parts.at(Part::kVision).other_parameters, 16 * 32 + 32);
  EXPECT_EQ(summary.parts.at(Part::kMtp).formats.at("bf16").linears, 5);
  EXPECT_EQ(summary.parts.at(Part::kHead).formats.at("bf16").weights, 48 * 64);
  EXPECT_EQ(summary.parts.at(Part::kHead).other_parameters, 48 * 64 + 64);
}

TEST(Summary, PlanEqualsWhatIsWritten) {
  const TinyCheckpoint tiny;
  const ExportPlan plan = tiny.Plan(tiny.MixedFormats());
  const int64_t bytes =
      TinyCheckpoint::Must(PlannedFileBytes(tiny.model(), plan.formats, plan.options));
  const CheckpointSummary planned =
      TinyCheckpoint::Must(SummarizePlan(tiny.model(), plan.formats, bytes));
  ASSERT_TRUE(ExportCheckpoint(FileSystem::Default(), plan, tiny.out()).ok());
  const Checkpoint out = TinyCheckpoint::Must(Checkpoint::Open(tiny.out()));
  const CheckpointSummary written =
      TinyCheckpoint::Must(Summarize(*TinyCheckpoint::Must(Model::Open(out))));
  EXPECT_EQ(SummaryToJson(planned), SummaryToJson(written));
  EXPECT_EQ(written.parameters, tiny.checkpoint().parameters());
  EXPECT_EQ(written.Total().at("nvfp4").linears, 3);
  EXPECT_EQ(written.Total().at("nvfp4").bytes, 3 * (128 * 64 / 2 + 128 * 64 / 16 + 8));
  EXPECT_EQ(written.layers.at(1).at("mxfp8").linears, 4);
}

TEST(Summary, BppCountsCodesAndGroupScalesOfAllocatableLinears) {
  const TinyCheckpoint tiny;
  std::map<std::string, const Format*> formats;
  for (const LinearInfo& linear : tiny.model().linears()) {
    formats[linear.name] = linear.allocatable ? FindFormat("nvfp4") : &SourceFormat();
  }
  EXPECT_DOUBLE_EQ(TinyCheckpoint::Must(SummarizePlan(tiny.model(), formats, 1)).bpp, 4.5);
}

}  // namespace
}  // namespace prismaquant

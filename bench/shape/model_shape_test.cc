#include "bench/shape/model_shape.h"

#include <gtest/gtest.h>

namespace prismaquant {
namespace {

struct Published {
  size_t tensors = 0;
  int64_t bytes = 0;
};

// From the indices of the published checkpoints.
Published Count(size_t shape) {
  const ModelShape& model = PublishedShapes().at(shape);
  Published found;
  for (const ShapedTensor& tensor : TensorsOf(model, model.layers)) {
    ++found.tensors;
    found.bytes += tensor.spec.bytes();
  }
  return found;
}

TEST(ModelShape, Dense27bHasThePublishedTensors) {
  const Published found = Count(0);
  EXPECT_EQ(found.tensors, 1199U);
  EXPECT_EQ(found.bytes, 55'562'855'904);
}

TEST(ModelShape, Experts35bHaveThePublishedTensors) {
  const Published found = Count(1);
  EXPECT_EQ(found.tensors, 1045U);
  EXPECT_EQ(found.bytes, 71'903'645'408);
}

TEST(ModelShape, Experts122bHaveThePublishedTensors) {
  // That release keeps A_log and the norms of 36 Gated DeltaNet layers in four bytes each.
  constexpr int64_t kWider = int64_t{36} * (64 + 128) * 2;
  EXPECT_EQ(Count(2).bytes + kWider, 250'173'007'840);
}

TEST(ModelShape, EveryFourthLayerAttends) {
  const Json config = ConfigOf(PublishedShapes().at(0), 8, Json::object());
  int full = 0;
  for (const Json& type : config.at("text_config").at("layer_types")) {
    full += type == "full_attention" ? 1 : 0;
  }
  EXPECT_EQ(full, 2);
  EXPECT_EQ(config.at("text_config").at("layer_types").at(3), "full_attention");
}

}  // namespace
}  // namespace prismaquant

#include "evaluate/quantized_linears.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <map>
#include <string>

#include "evaluate/checkpoint_pair.h"

namespace prismaquant {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kQuery[] = "model.layers.0.self_attn.q_proj";
constexpr char kUp[] = "model.layers.0.mlp.up_proj";

const LinearInfo& Info(const Model& model, const std::string& name) {
  for (const LinearInfo& linear : model.linears()) {
    if (linear.name == name) return linear;
  }
  ADD_FAILURE() << name;
  return model.linears().front();
}

std::map<std::string, std::string> AllIn(const Model& model, const std::string& format) {
  std::map<std::string, std::string> formats;
  for (const LinearInfo& linear : model.linears()) formats[linear.name] = format;
  return formats;
}

class QuantizedLinearsTest : public ::testing::Test {
 protected:
  at::Tensor Bias(const std::string& linear) const {
    const auto bias = pair_.source().find(linear + ".bias");
    return bias == pair_.source().end() ? at::Tensor() : bias->second.to(at::kFloat);
  }
  std::string Error(const CheckpointPair::Tensors& tensors, const std::string& linear) {
    const auto opened = pair_.Open("spoiled", tensors);
    const auto found = FindLinearTensors(*opened.checkpoint, Info(*opened.model, linear));
    EXPECT_EQ(found.status().code(), StatusCode::kInvalidInput);
    EXPECT_THAT(found.status().message(),
                AllOf(HasSubstr("spoiled"), HasSubstr(linear), Not(HasSubstr("\n"))));
    EXPECT_FALSE(QuantizedLinears::Load(*opened.model, 0, {}).ok());
    return found.status().message();
  }

  CheckpointPair pair_;
};

TEST_F(QuantizedLinearsTest, ApplyIsDecodeQuantizeMultiply) {
  const auto source = pair_.Open("source", pair_.source());
  torch::manual_seed(3);
  for (const std::string name : {"nvfp4", "fp8", "mxfp8", "bf16"}) {
    const Format& format = *FindFormat(name);
    const auto quantized = pair_.Open(name, pair_.Quantized(AllIn(*source.model, name)));
    const auto linears = QuantizedLinears::Load(*quantized.model, 0, {});
    ASSERT_TRUE(linears.ok()) << linears.status().message();
    for (const LinearInfo& linear : quantized.model->LayerLinears(0)) {
      const at::Tensor x = torch::randn({2, 5, linear.in}) * 3;
      const SharedScales shared{.weight_amax = 1.5, .input_amax = 6};
      const at::Tensor weight = pair_.source().at(linear.name + ".weight").to(at::kFloat);
      at::Tensor expected = format.QuantizeActivation(x, shared).matmul(
          format.Decode(format.Encode(weight, shared, DType::kBF16)).t());
      if (linear.has_bias) expected = expected + Bias(linear.name);
      EXPECT_TRUE(at::allclose((*linears)->Apply(linear, x), expected, 1e-5, 1e-5)) << linear.name;
      const at::Tensor plain =
          at::linear(x, weight) + (linear.has_bias ? Bias(linear.name) : at::zeros({1}));
      EXPECT_EQ(at::allclose((*linears)->Apply(linear, x), plain, 1e-5, 1e-5), name == "bf16");
    }
  }
}

TEST_F(QuantizedLinearsTest, SiblingsOfOneInputMayDifferInFormatAndScale) {
  auto tensors = pair_.Quantized({{"model.layers.0.self_attn.q_proj", "nvfp4"},
                                  {"model.layers.0.self_attn.k_proj", "nvfp4"},
                                  {"model.layers.0.self_attn.v_proj", "mxfp8"}});
  const std::string key = "model.layers.0.self_attn.k_proj.input_global_scale";
  tensors[key] = tensors[key] * 3.3;
  const auto opened = pair_.Open("mixed", tensors);
  const auto linears = QuantizedLinears::Load(*opened.model, 0, {});
  ASSERT_TRUE(linears.ok()) << linears.status().message();
  torch::manual_seed(4);
  const at::Tensor x = torch::randn({1, 9, 64});
  for (int repeat = 0; repeat < 2; ++repeat) {
    for (const char* leaf : {"q_proj", "k_proj", "v_proj", "q_proj"}) {
      const LinearInfo& linear =
          Info(*opened.model, std::string("model.layers.0.self_attn.") + leaf);
      const auto found = FindLinearTensors(*opened.checkpoint, linear);
      ASSERT_TRUE(found.ok());
      const at::Tensor expected =
          at::linear(found->format->QuantizeActivation(x, found->tensors),
                     found->format->Decode(found->tensors), Bias(linear.name));
      EXPECT_TRUE((*linears)->Apply(linear, x).equal(expected)) << leaf;
    }
  }
}

TEST_F(QuantizedLinearsTest, AnotherInputOfTheSameShapeIsQuantizedAnew) {
  const auto opened = pair_.Open("quantized", pair_.Quantized({{kQuery, "mxfp8"}}));
  const LinearInfo& linear = Info(*opened.model, kQuery);
  const auto linears = QuantizedLinears::Load(*opened.model, 0, {});
  const at::Tensor ones = at::ones({1, 2, 64});
  const at::Tensor first = (*linears)->Apply(linear, ones);
  const at::Tensor second = (*linears)->Apply(linear, ones * 2);
  EXPECT_FALSE(first.equal(second));
  EXPECT_TRUE((*linears)->Apply(linear, at::ones({1, 2, 64})).equal(first));
}

TEST_F(QuantizedLinearsTest, ComputesInTheDtypeAskedFor) {
  const auto opened = pair_.Open("quantized", pair_.Quantized({{kQuery, "fp8"}}));
  const auto linears = QuantizedLinears::Load(*opened.model, 0, {.dtype = at::kBFloat16});
  ASSERT_TRUE(linears.ok());
  const at::Tensor x = at::ones({1, 2, 64}, at::kBFloat16);
  EXPECT_EQ((*linears)->Apply(Info(*opened.model, kQuery), x).scalar_type(), at::kBFloat16);
}

TEST_F(QuantizedLinearsTest, TensorsInAnUnknownFormatAreListed) {
  auto tensors = pair_.source();
  tensors.erase(std::string(kUp) + ".weight");
  tensors[std::string(kUp) + ".weight_packed"] = at::zeros({96, 8}, at::kInt);
  tensors[std::string(kUp) + ".weight_scale"] = at::ones({96, 1}, at::kBFloat16);
  tensors[std::string(kUp) + ".weight_shape"] = at::ones({2}, at::kLong);
  EXPECT_THAT(Error(tensors, kUp),
              HasSubstr("(weight_packed I32, weight_scale BF16, weight_shape I64) are in no known "
                        "format"));
}

TEST_F(QuantizedLinearsTest, ATensorBeyondTheFormatsIsAnError) {
  auto tensors = pair_.Quantized({{kUp, "mxfp8"}});
  tensors[std::string(kUp) + ".weight_zero_point"] = at::zeros({96, 2}, at::kByte);
  EXPECT_THAT(Error(tensors, kUp), HasSubstr("3 tensors are stored, mxfp8 has 2"));
}

TEST_F(QuantizedLinearsTest, ValuesThatCannotBeDecodedAreNamedWithTheirLinear) {
  auto tensors = pair_.Quantized({{kUp, "nvfp4"}});
  tensors[std::string(kUp) + ".weight_scale"].view(at::kByte)[4][1] = 0x7f;
  EXPECT_THAT(Error(tensors, kUp), HasSubstr("up_proj: weight_scale holds a NaN code"));
}

}  // namespace
}  // namespace prismaquant

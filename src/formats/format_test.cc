#include "formats/format.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <limits>
#include <map>

#include "formats/tensor_bytes.h"
#include "kernels/ops.h"

namespace prismaquant {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

at::Tensor RandomWeight(int64_t out, int64_t in) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(17);
  return at::randn({out, in}, generator, at::kFloat) * 0.02;
}

SharedScales ScalesOf(const at::Tensor& weight, double input_amax = 7.5) {
  return {.weight_amax = weight.abs().max().item<double>(), .input_amax = input_amax};
}

std::vector<int> Codes(const at::Tensor& tensor) {
  const at::Tensor bytes = tensor.contiguous().view(at::kByte).flatten();
  return {bytes.data_ptr<uint8_t>(), bytes.data_ptr<uint8_t>() + bytes.numel()};
}

class EveryFormat : public ::testing::TestWithParam<const Format*> {};

INSTANTIATE_TEST_SUITE_P(Formats, EveryFormat, ::testing::ValuesIn(AllFormats()),
                         [](const auto& test) { return std::string(test.param->name()); });

TEST_P(EveryFormat, EncodesToItsLayoutAndBytes) {
  const Format& format = *GetParam();
  const at::Tensor weight = RandomWeight(6, 384).to(at::kHalf).to(at::kFloat);
  for (const DType source : {DType::kBF16, DType::kF16, DType::kF32}) {
    const StoredTensors stored = format.Encode(weight, ScalesOf(weight), source);
    const Status status = CheckStored(format, stored, 6, 384, source);
    EXPECT_TRUE(status.ok()) << status.message();
    int64_t bytes = 0;
    for (const auto& [suffix, tensor] : stored) {
      bytes += static_cast<int64_t>(TensorBytes(tensor).size());
    }
    EXPECT_EQ(format.Bytes(6, 384, source), bytes);
    EXPECT_EQ(DetectFormat(stored), &format);
  }
}

TEST_P(EveryFormat, EncodingWhatItDecodedChangesNothing) {
  const Format& format = *GetParam();
  // A group's largest decoded integer is 7 or -8, its scale was made for 7.5.
  if (format.compression_format() == "pack-quantized") return;
  const at::Tensor weight = RandomWeight(24, 256);
  const SharedScales scales = ScalesOf(weight);
  const at::Tensor once = format.Decode(format.Encode(weight, scales, DType::kBF16));
  const at::Tensor twice = format.Decode(format.Encode(once, scales, DType::kBF16));
  EXPECT_TRUE(at::equal(once, twice));
}

TEST_P(EveryFormat, DecodesCloseToTheWeight) {
  const Format& format = *GetParam();
  const at::Tensor weight = RandomWeight(24, 256);
  const at::Tensor decoded = format.Decode(format.Encode(weight, ScalesOf(weight), DType::kBF16));
  EXPECT_EQ(decoded.scalar_type(), at::kFloat);
  const double error = ((decoded - weight).norm() / weight.norm()).item<double>();
  const std::map<std::string_view, double> largest = {
      {"int4", 0.12}, {"mxfp4", 0.13}, {"nvfp4", 0.11}, {"nvfp4a16", 0.11},
      {"fp8", 0.03},  {"int8", 0.008}, {"mxfp8", 0.03}, {"bf16", 0.003}};
  EXPECT_LT(error, largest.at(format.name()));
}

TEST_P(EveryFormat, ActivationsKeepTheirDtypeAndAreComputedInFloat32) {
  const Format& format = *GetParam();
  const at::Tensor x = RandomWeight(5, 64) * 100;
  const SharedScales scales{.weight_amax = 1, .input_amax = x.abs().max().item<double>()};
  EXPECT_EQ(at::equal(format.QuantizeActivation(x, scales), x), !format.quantizes_activations());
  for (const at::ScalarType type : {at::kBFloat16, at::kHalf}) {
    const at::Tensor narrow = x.to(type);
    const at::Tensor found = format.QuantizeActivation(narrow, scales);
    ASSERT_EQ(found.scalar_type(), type);
    const at::Tensor wide = format.QuantizeActivation(narrow.to(at::kFloat), scales);
    EXPECT_TRUE(at::equal(found, wide.to(type)));
  }
}

TEST_P(EveryFormat, ActivationScaleIsThatOfTheStoredTensors) {
  const Format& format = *GetParam();
  const at::Tensor weight = RandomWeight(4, 128), x = RandomWeight(5, 128) * 50;
  const SharedScales scales = ScalesOf(weight, 3.25);
  const StoredTensors stored = format.Encode(weight, scales, DType::kBF16);
  EXPECT_TRUE(
      at::equal(format.QuantizeActivation(x, stored), format.QuantizeActivation(x, scales)));
}

TEST_P(EveryFormat, ZeroWeightDecodesToZero) {
  const Format& format = *GetParam();
  const at::Tensor zero = at::zeros({4, 128});
  const StoredTensors stored = format.Encode(zero, SharedScales{}, DType::kF16);
  const Status status = CheckStored(format, stored, 4, 128, DType::kF16);
  EXPECT_TRUE(status.ok()) << status.message();
  EXPECT_TRUE(at::equal(format.Decode(stored), zero));
}

TEST_P(EveryFormat, IsFoundByItsName) {
  EXPECT_EQ(FindFormat(GetParam()->name()), GetParam());
  EXPECT_EQ(FindFormat(fmt::format("{}x", GetParam()->name())), nullptr);
}

TEST_P(EveryFormat, SchemeNamesItsBitsAndGroups) {
  const Format& format = *GetParam();
  const Json scheme = format.Scheme();
  if (format.compression_format().empty()) {
    EXPECT_TRUE(scheme.is_null());
    return;
  }
  EXPECT_EQ(scheme.at("input_activations").is_object(), format.quantizes_activations());
  for (const char* side : {"weights", "input_activations"}) {
    const Json& args = scheme.at(side);
    if (args.is_null()) continue;
    EXPECT_EQ(args.at("num_bits"), format.name().find('4') == std::string_view::npos ? 8 : 4);
    EXPECT_EQ(args.at("type"), format.name().starts_with("int") ? "int" : "float");
    EXPECT_EQ(args.at("symmetric"), true);
    EXPECT_EQ(args.size(), 12U);
  }
  EXPECT_EQ(scheme.at("weights").at("dynamic"), false);
}

TEST(FormatSchemes, AreThePresetsOfCompressedTensors) {
  const auto parts = [](const char* name, const char* side) {
    const Json args = FindFormat(name)->Scheme().at(side);
    return Json{args.at("strategy"), args.at("group_size"), args.at("dynamic"),
                args.at("scale_dtype")};
  };
  const char* e4m3 = "torch.float8_e4m3fn";
  EXPECT_EQ(parts("nvfp4", "weights"), (Json{"tensor_group", 16, false, e4m3}));
  EXPECT_EQ(parts("nvfp4", "input_activations"), (Json{"tensor_group", 16, "local", e4m3}));
  EXPECT_EQ(parts("mxfp8", "weights"), (Json{"group", 32, false, "torch.uint8"}));
  EXPECT_EQ(parts("mxfp8", "input_activations"), (Json{"group", 32, true, "torch.uint8"}));
  EXPECT_EQ(parts("nvfp4a16", "weights"), parts("nvfp4", "weights"));
  EXPECT_EQ(parts("mxfp4", "weights"), (Json{"group", 32, false, "torch.uint8"}));
  EXPECT_EQ(parts("mxfp4", "input_activations"), (Json{"group", 32, true, "torch.uint8"}));
  EXPECT_EQ(parts("int4", "weights"), (Json{"group", 128, false, nullptr}));
  EXPECT_EQ(parts("int8", "weights"), (Json{"group", 128, false, nullptr}));
  EXPECT_EQ(parts("fp8", "weights"), (Json{"channel", nullptr, false, nullptr}));
  EXPECT_EQ(parts("fp8", "input_activations"), (Json{"token", nullptr, true, nullptr}));
}

TEST(FormatLayouts, AreThoseOfCompressedTensors) {
  const auto text = [](const char* name) {
    std::vector<std::string> lines;
    for (const TensorSpec& spec : FindFormat(name)->Layout(8, 256, DType::kBF16)) {
      lines.push_back(
          fmt::format("{} {} {}", spec.name, DTypeName(spec.dtype), fmt::join(spec.shape, " ")));
    }
    return lines;
  };
  EXPECT_THAT(text("nvfp4"), ElementsAre("weight_packed U8 8 128", "weight_scale F8_E4M3 8 16",
                                         "weight_global_scale F32 1", "input_global_scale F32 1"));
  EXPECT_THAT(text("nvfp4a16"), ElementsAre("weight_packed U8 8 128", "weight_scale F8_E4M3 8 16",
                                            "weight_global_scale F32 1"));
  EXPECT_THAT(text("mxfp4"), ElementsAre("weight_packed U8 8 128", "weight_scale U8 8 8"));
  EXPECT_THAT(text("int4"),
              ElementsAre("weight_packed I32 8 32", "weight_scale BF16 8 2", "weight_shape I64 2"));
  EXPECT_THAT(text("int8"),
              ElementsAre("weight_packed I32 8 64", "weight_scale BF16 8 2", "weight_shape I64 2"));
  EXPECT_THAT(text("mxfp8"), ElementsAre("weight F8_E4M3 8 256", "weight_scale U8 8 8"));
  EXPECT_THAT(text("fp8"), ElementsAre("weight F8_E4M3 8 256", "weight_scale BF16 8 1"));
  EXPECT_THAT(text("bf16"), ElementsAre("weight BF16 8 256"));
}

TEST(FormatBytes, PayloadLeavesOutThePerTensorScales) {
  const int64_t weights = 128 * 256;
  const auto payload_bits = [&](const char* name) {
    return 8.0 * static_cast<double>(FindFormat(name)->PayloadBytes(128, 256, DType::kBF16)) /
           static_cast<double>(weights);
  };
  EXPECT_EQ(payload_bits("nvfp4"), 4.5);
  EXPECT_EQ(payload_bits("nvfp4a16"), 4.5);
  EXPECT_EQ(payload_bits("mxfp4"), 4.25);
  EXPECT_EQ(payload_bits("int4"), 4 + 16.0 / 128);
  EXPECT_EQ(payload_bits("int8"), 8 + 16.0 / 128);
  EXPECT_EQ(payload_bits("mxfp8"), 8.25);
  EXPECT_EQ(payload_bits("fp8"), 8.0 + 16.0 / 256);
  EXPECT_EQ(payload_bits("bf16"), 16.0);
  const Format& nvfp4 = *FindFormat("nvfp4");
  EXPECT_EQ(nvfp4.Bytes(128, 256, DType::kBF16), nvfp4.PayloadBytes(128, 256, DType::kBF16) + 8);
  const Format& int4 = *FindFormat("int4");
  EXPECT_EQ(int4.Bytes(128, 256, DType::kF32), int4.PayloadBytes(128, 256, DType::kF32) + 16);
  EXPECT_EQ(int4.PayloadBytes(1, 128, DType::kF32), 64 + 4);
  EXPECT_EQ(FindFormat("bf16")->PayloadBytes(2, 3, DType::kF32), 24);
  EXPECT_EQ(FindFormat("fp8")->Bytes(2, 3, DType::kF32), 6 + 8);
}

TEST(FormatSupport, FollowsTheGroupSize) {
  EXPECT_TRUE(FindFormat("nvfp4")->Supports(1, 4304));
  EXPECT_FALSE(FindFormat("mxfp8")->Supports(1, 4304));
  EXPECT_FALSE(FindFormat("nvfp4")->Supports(64, 24));
  EXPECT_TRUE(FindFormat("nvfp4a16")->Supports(1, 4304));
  EXPECT_TRUE(FindFormat("mxfp8")->Supports(3, 32));
  EXPECT_TRUE(FindFormat("mxfp4")->Supports(3, 32));
  EXPECT_FALSE(FindFormat("mxfp4")->Supports(3, 48));
  for (const char* name : {"int4", "int8"}) {
    EXPECT_TRUE(FindFormat(name)->Supports(3, 384));
    EXPECT_FALSE(FindFormat(name)->Supports(128, 64));
    EXPECT_FALSE(FindFormat(name)->Supports(128, 192));
  }
  EXPECT_TRUE(FindFormat("fp8")->Supports(3, 7));
  EXPECT_TRUE(FindFormat("bf16")->Supports(3, 7));
  for (const Format* format : AllFormats()) EXPECT_FALSE(format->Supports(0, 32));
}

TEST(FormatSupport, OutputMultiplesOfTheKernels) {
  const std::map<std::string_view, int64_t> multiples = {
      {"mxfp4", 128}, {"mxfp8", 128}, {"int4", 64}, {"int8", 64}, {"nvfp4a16", 64}};
  for (const Format* format : AllFormats()) {
    const auto found = multiples.find(format->name());
    EXPECT_EQ(format->kernel_out_multiple(), found == multiples.end() ? 1 : found->second)
        << format->name();
  }
}

TEST(Nvfp4, ScalesOfKnownGroups) {
  at::Tensor weight = at::zeros({1, 48});
  weight[0][0] = 1.0;
  weight[0][16] = -0.1;
  const StoredTensors stored =
      FindFormat("nvfp4")->Encode(weight, {.weight_amax = 1, .input_amax = 0}, DType::kBF16);
  EXPECT_EQ(stored.at("weight_global_scale").item<float>(), 2688.0F);
  EXPECT_EQ(stored.at("input_global_scale").item<float>(), 1.0F);
  // 448; 2688 * 0.1 / 6 = 44.8 to 44; 0.125 in place of zero.
  EXPECT_THAT(Codes(stored.at("weight_scale")), ElementsAre(0x7e, 0x63, 0x20));
  const at::Tensor decoded = FindFormat("nvfp4")->Decode(stored);
  EXPECT_EQ(decoded[0][0].item<float>(), 1.0F);
  EXPECT_EQ(decoded[0][16].item<float>(), -6.0F * (44.0F / 2688.0F));
}

TEST(Nvfp4, NegativeWeightsThatRoundToZeroKeepTheirSignAndNegativeZeroDoesNot) {
  at::Tensor weight = at::zeros({1, 16});
  weight[0][0] = 6.0;
  weight[0][2] = -0.01;
  weight[0][3] = -0.0;
  const auto [packed, scale] = ops::Nvfp4Encode(weight, 448.0);
  EXPECT_THAT(Codes(packed), ElementsAre(0x07, 0x08, 0, 0, 0, 0, 0, 0));
  EXPECT_THAT(Codes(scale), ElementsAre(0x7e));
}

TEST(Nvfp4, GlobalScaleOfExtremes) {
  EXPECT_EQ(ops::Nvfp4GlobalScale(1.0), 2688.0F);
  EXPECT_EQ(ops::Nvfp4GlobalScale(0.0), 1.0F);
  EXPECT_EQ(ops::Nvfp4GlobalScale(1e-38), 1.0F);
  EXPECT_EQ(ops::Nvfp4GlobalScale(std::numeric_limits<double>::quiet_NaN()), 1.0F);
  EXPECT_EQ(ops::Nvfp4GlobalScale(1e38), 2688.0F / 1e38F);
}

TEST(Nvfp4, SiblingsShareTheGlobalScale) {
  const at::Tensor small = RandomWeight(4, 32);
  const SharedScales fused{.weight_amax = 10, .input_amax = 2};
  const StoredTensors stored = FindFormat("nvfp4")->Encode(small, fused, DType::kBF16);
  EXPECT_EQ(stored.at("weight_global_scale").item<float>(), 268.8F);
  EXPECT_EQ(stored.at("input_global_scale").item<float>(), 1344.0F);
}

TEST(Mxfp8, ScalesOfKnownGroups) {
  at::Tensor weight = at::zeros({1, 128});
  weight[0][0] = 1.0;
  weight[0][32] = 1.75;
  weight[0][64] = -1.74;
  const auto [codes, scale] = ops::Mxfp8Encode(weight);
  EXPECT_THAT(Codes(scale), ElementsAre(119, 120, 119, 0));
  const at::Tensor values = codes.to(at::kFloat);
  EXPECT_EQ(values[0][0].item<float>(), 256.0F);
  EXPECT_EQ(values[0][32].item<float>(), 224.0F);
  EXPECT_EQ(values[0][64].item<float>(), -448.0F);
}

TEST(Fp8, CodesAreChosenUnderTheStoredScale) {
  // 1.5 / 448 rounds up in bfloat16, so that 1.5 lies below the largest code.
  at::Tensor weight = at::full({1, 4}, 1.5F);
  weight[0][1] = -1.5;
  const auto [codes, scale] = ops::Fp8Encode(weight, at::kBFloat16);
  EXPECT_EQ(scale.scalar_type(), at::kBFloat16);
  const at::Tensor effective = scale.to(at::kFloat);
  EXPECT_NE(effective.item<float>(), 1.5F / 448.0F);
  const at::Tensor expected = (weight / effective).clamp(-448, 448).to(at::kFloat8_e4m3fn);
  EXPECT_EQ(Codes(codes), Codes(expected));
}

TEST(Fp8, ScaleThatVanishesInFloat16StaysPositive) {
  const at::Tensor weight = at::full({1, 8}, 5e-6F);
  const auto [codes, scale] = ops::Fp8Encode(weight, at::kHalf);
  EXPECT_GT(scale.to(at::kFloat).item<float>(), 0.0F);
  EXPECT_TRUE(at::allclose(ops::Fp8Decode(codes, scale), weight, 0.07, 0.0));
}

TEST(DetectFormat, NothingFits) {
  EXPECT_EQ(DetectFormat({}), nullptr);
  EXPECT_EQ(DetectFormat({{"weight_packed", at::zeros({2, 16}, at::kByte)},
                          {"weight_scale", at::zeros({2, 1}, at::kBFloat16)}}),
            nullptr);
  EXPECT_EQ(DetectFormat({{"weight", at::zeros({2, 16}, at::kChar)}}), nullptr);
  EXPECT_EQ(DetectFormat({{"weight", at::zeros({2, 16}).to(at::kFloat8_e4m3fn)}}), nullptr);
}

class CheckStoredTest : public ::testing::Test {
 protected:
  static StoredTensors Stored(const char* name) {
    const at::Tensor weight = RandomWeight(4, 64);
    return FindFormat(name)->Encode(weight, ScalesOf(weight), DType::kBF16);
  }
  static std::string Message(const char* name, const StoredTensors& stored) {
    return CheckStored(*FindFormat(name), stored, 4, 64, DType::kBF16).message();
  }
  static void SetByte(StoredTensors& stored, const char* suffix, int64_t index, int byte) {
    stored.at(suffix).view(at::kByte).flatten()[index] = byte;
  }
};

TEST_F(CheckStoredTest, MissingTensor) {
  StoredTensors stored = Stored("nvfp4");
  stored.erase("input_global_scale");
  EXPECT_THAT(Message("nvfp4", stored), HasSubstr("input_global_scale is missing"));
}

TEST_F(CheckStoredTest, TensorTooMany) {
  StoredTensors stored = Stored("fp8");
  stored["weight_zero_point"] = at::zeros({4, 1});
  EXPECT_THAT(Message("fp8", stored), HasSubstr("3 tensors are stored"));
}

TEST_F(CheckStoredTest, WrongShapeAndDtypeNameBoth) {
  StoredTensors stored = Stored("mxfp8");
  stored["weight_scale"] = stored["weight_scale"].reshape({2, 4});
  EXPECT_THAT(Message("mxfp8", stored), HasSubstr("weight_scale is U8 [2, 4], expected U8 [4, 2]"));
  stored = Stored("fp8");
  stored["weight_scale"] = stored["weight_scale"].to(at::kFloat);
  EXPECT_THAT(Message("fp8", stored), HasSubstr("is F32 [4, 1], expected BF16 [4, 1]"));
  stored = Stored("nvfp4");
  stored["weight_global_scale"] = stored["weight_global_scale"].reshape({});
  EXPECT_THAT(Message("nvfp4", stored), HasSubstr("is F32 [], expected F32 [1]"));
}

TEST_F(CheckStoredTest, NanCodes) {
  for (const int nan : {0x7f, 0xff}) {
    for (const char* name : {"fp8", "mxfp8"}) {
      StoredTensors stored = Stored(name);
      SetByte(stored, "weight", 9, nan);
      EXPECT_THAT(Message(name, stored), HasSubstr("weight holds a NaN code"));
    }
  }
  StoredTensors stored = Stored("nvfp4");
  SetByte(stored, "weight_scale", 3, 0x7f);
  EXPECT_THAT(Message("nvfp4", stored), HasSubstr("weight_scale holds a NaN code"));
}

TEST_F(CheckStoredTest, GroupAndChannelScales) {
  StoredTensors stored = Stored("nvfp4");
  SetByte(stored, "weight_scale", 3, 0x81);
  EXPECT_THAT(Message("nvfp4", stored), HasSubstr("weight_scale holds a negative scale"));
  stored = Stored("mxfp8");
  SetByte(stored, "weight_scale", 5, 255);
  EXPECT_THAT(Message("mxfp8", stored), HasSubstr("weight_scale holds the NaN scale 255"));
  stored = Stored("fp8");
  stored["weight_scale"][2] = -0.5;
  EXPECT_THAT(Message("fp8", stored), HasSubstr("weight_scale holds a negative scale"));
  stored["weight_scale"][2] = std::numeric_limits<float>::infinity();
  EXPECT_THAT(Message("fp8", stored), HasSubstr("weight_scale is not finite"));
}

TEST_F(CheckStoredTest, GlobalScales) {
  for (const char* suffix : {"weight_global_scale", "input_global_scale"}) {
    for (const float bad : {0.0F, -1.0F, std::numeric_limits<float>::infinity(),
                            std::numeric_limits<float>::quiet_NaN()}) {
      StoredTensors stored = Stored("nvfp4");
      stored[suffix] = at::full({1}, bad);
      EXPECT_EQ(Message("nvfp4", stored), fmt::format("{} is not finite and positive", suffix));
    }
  }
}

TEST_F(CheckStoredTest, SourceWeightMustBeFinite) {
  StoredTensors stored = Stored("bf16");
  EXPECT_EQ(Message("bf16", stored), "");
  stored["weight"] = stored["weight"].clone();
  stored["weight"][1][1] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(Message("bf16", stored), "weight is not finite");
}

TEST(ScalarTypes, RoundTripForEveryTensorTypeOfTorch) {
  for (const DType dtype : {DType::kBool, DType::kU8, DType::kF8E4M3, DType::kF16, DType::kBF16,
                            DType::kF32, DType::kI64, DType::kF64}) {
    EXPECT_EQ(FromScalarType(ToScalarType(dtype)), dtype);
  }
}

}  // namespace
}  // namespace prismaquant

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <limits>

#include "formats/format.h"
#include "kernels/integer_codes.h"
#include "kernels/ops.h"

namespace prismaquant {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

at::Tensor RandomWeight(int64_t out, int64_t in) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(23);
  return at::randn({out, in}, generator, at::kFloat) * 0.02;
}

StoredTensors Stored(const char* name, const at::Tensor& weight, DType source = DType::kBF16) {
  return FindFormat(name)->Encode(
      weight, {.weight_amax = weight.abs().max().item<double>(), .input_amax = 5}, source);
}

std::vector<int> Bytes(const at::Tensor& tensor, int64_t count) {
  const at::Tensor bytes = tensor.contiguous().view(at::kByte).flatten().narrow(0, 0, count);
  return {bytes.data_ptr<uint8_t>(), bytes.data_ptr<uint8_t>() + bytes.numel()};
}

TEST(IntegerCodes, RoundToTheNearestTiesToEvenAndSaturate) {
  const auto four = [](float x) { return RoundToInt<4>(x); };
  EXPECT_EQ(four(0.5F), 0);
  EXPECT_EQ(four(1.5F), 2);
  EXPECT_EQ(four(-2.5F), -2);
  EXPECT_EQ(four(6.5F), 6);
  EXPECT_EQ(four(7.5F), 7);
  EXPECT_EQ(four(-7.5F), -8);
  EXPECT_EQ(four(-8.5F), -8);
  EXPECT_EQ(four(std::numeric_limits<float>::infinity()), 7);
  EXPECT_EQ(four(-std::numeric_limits<float>::max()), -8);
  EXPECT_FALSE(std::signbit(four(-0.25F)));
  EXPECT_EQ(RoundToInt<8>(127.5F), 127);
  EXPECT_EQ(RoundToInt<8>(-1e9F), -128);
}

TEST(IntegerCodes, AreTheIntegersAboveTheSmallest) {
  for (int q = -8; q < 8; ++q) {
    EXPECT_EQ(EncodeInt<4>(static_cast<float>(q)), q + 8);
    EXPECT_EQ(DecodeInt<4>(static_cast<uint8_t>(q + 8)), q);
  }
  for (int q = -128; q < 128; ++q) {
    EXPECT_EQ(EncodeInt<8>(static_cast<float>(q)), q + 128);
    EXPECT_EQ(DecodeInt<8>(static_cast<uint8_t>(q + 128)), q);
  }
}

TEST(Int4, FirstColumnIsTheLowestNibble) {
  at::Tensor weight = at::zeros({1, 128});
  for (int64_t i = 0; i < 8; ++i) weight[0][i] = static_cast<float>(i - 8);
  weight[0][0] = -7.5;
  weight[0][9] = 7.5;
  const StoredTensors stored = Stored("int4", weight);
  EXPECT_EQ(stored.at("weight_scale").item<float>(), 1.0F);
  EXPECT_THAT(Bytes(stored.at("weight_packed"), 5), ElementsAre(0x10, 0x32, 0x54, 0x76, 0xf8));
  EXPECT_EQ(stored.at("weight_packed")[0][0].item<int32_t>(), 0x76543210);
  EXPECT_TRUE(at::equal(stored.at("weight_shape"), at::tensor({1, 128}, at::kLong)));
  EXPECT_EQ(FindFormat("int4")->Decode(stored)[0][9].item<float>(), 7.0F);
}

TEST(Int8, FirstColumnIsTheLowestByte) {
  at::Tensor weight = at::zeros({1, 128});
  weight[0][0] = -127.5;
  weight[0][1] = -127;
  weight[0][3] = 127.5;
  const StoredTensors stored = Stored("int8", weight);
  EXPECT_THAT(Bytes(stored.at("weight_packed"), 4), ElementsAre(0, 1, 128, 255));
}

TEST(Int4, CodesAreChosenUnderTheStoredScale) {
  const at::Tensor weight = RandomWeight(16, 256);
  for (const DType source : {DType::kBF16, DType::kF16, DType::kF32}) {
    const StoredTensors stored = Stored("int4", weight, source);
    const at::Tensor scale = stored.at("weight_scale").to(at::kFloat).repeat_interleave(128, 1);
    const at::Tensor nearest = (weight / scale).clamp(-8, 7).round() * scale;
    EXPECT_TRUE(at::equal(FindFormat("int4")->Decode(stored), nearest));
  }
}

TEST(Int8, ScaleOfZerosIsTheEpsilonOfItsType) {
  const at::Tensor zero = at::zeros({1, 128});
  const auto scale = [&](DType source) {
    return Stored("int8", zero, source).at("weight_scale").item<float>();
  };
  EXPECT_EQ(scale(DType::kF32), std::numeric_limits<float>::epsilon());
  EXPECT_EQ(scale(DType::kBF16), 0x1p-7F);
  EXPECT_EQ(scale(DType::kF16), 0x1p-10F);
}

TEST(Mxfp4, ScalesOfKnownGroups) {
  at::Tensor weight = at::zeros({1, 128});
  weight[0][0] = 6.0;
  weight[0][32] = 7.0;
  weight[0][33] = -0.25;
  weight[0][64] = -6.9;
  const StoredTensors stored = Stored("mxfp4", weight);
  EXPECT_THAT(Bytes(stored.at("weight_scale"), 4), ElementsAre(127, 128, 127, 0));
  const at::Tensor decoded = FindFormat("mxfp4")->Decode(stored);
  EXPECT_EQ(decoded[0][0].item<float>(), 6.0F);
  EXPECT_EQ(decoded[0][32].item<float>(), 8.0F);
  EXPECT_EQ(decoded[0][64].item<float>(), -6.0F);
  // 7 is the tie 3.5 under a scale of 2, and goes up; -0.25 keeps its sign as a zero.
  EXPECT_EQ(Bytes(stored.at("weight_packed").narrow(1, 16, 1), 1).front(), 0x86);
}

TEST(Nvfp4A16, StoresTheWeightsOfNvfp4) {
  const at::Tensor weight = RandomWeight(8, 64);
  StoredTensors full = Stored("nvfp4", weight);
  const StoredTensors stored = Stored("nvfp4a16", weight);
  full.erase("input_global_scale");
  ASSERT_EQ(stored.size(), full.size());
  for (const auto& [suffix, tensor] : full) {
    EXPECT_EQ(Bytes(stored.at(suffix), 4), Bytes(tensor, 4)) << suffix;
  }
  EXPECT_EQ(DetectFormat(full), FindFormat("nvfp4a16"));
}

TEST(WeightOnlyFormats, LeaveActivationsAlone) {
  const at::Tensor x = RandomWeight(3, 128).to(at::kBFloat16);
  for (const char* name : {"nvfp4a16", "int4", "int8"}) {
    EXPECT_TRUE(FindFormat(name)->QuantizeActivation(x, SharedScales{}).is_same(x)) << name;
    EXPECT_TRUE(FindFormat(name)->Scheme().at("input_activations").is_null()) << name;
  }
}

TEST(DetectPacked, StatedShapeTellsTheBits) {
  const at::Tensor weight = RandomWeight(4, 128);
  StoredTensors stored = Stored("int8", weight);
  EXPECT_EQ(DetectFormat(stored), FindFormat("int8"));
  stored["weight_shape"] = at::tensor({4, 256}, at::kLong);
  EXPECT_EQ(DetectFormat(stored), FindFormat("int4"));
  for (const at::Tensor& shape : {at::tensor({4, 100}, at::kLong), at::tensor({4, 0}, at::kLong),
                                  at::tensor({4}, at::kLong), at::tensor({4, 128}, at::kInt)}) {
    stored["weight_shape"] = shape;
    EXPECT_EQ(DetectFormat(stored), nullptr) << shape;
  }
  stored.erase("weight_shape");
  EXPECT_EQ(DetectFormat(stored), nullptr);
}

class CheckPacked : public ::testing::Test {
 protected:
  static std::string Message(const char* name, const StoredTensors& stored) {
    return CheckStored(*FindFormat(name), stored, 4, 128, DType::kBF16).message();
  }
  const at::Tensor weight_ = RandomWeight(4, 128);
};

TEST_F(CheckPacked, StatedShape) {
  StoredTensors stored = Stored("int4", weight_);
  EXPECT_EQ(Message("int4", stored), "");
  stored["weight_shape"] = at::tensor({128, 4}, at::kLong);
  EXPECT_EQ(Message("int4", stored), "weight_shape holds [128, 4], expected [4, 128]");
  stored["weight_shape"] = at::tensor({4, 128}, at::kInt);
  EXPECT_THAT(Message("int4", stored),
              HasSubstr("weight_shape is I32 [2], expected I64 [2] for int4"));
  stored.erase("weight_shape");
  EXPECT_EQ(Message("int4", stored), "weight_shape is missing, int4 needs it");
}

TEST_F(CheckPacked, IntegerScales) {
  for (const char* name : {"int4", "int8"}) {
    StoredTensors stored = Stored(name, weight_);
    stored["weight_scale"][2] = -0.5;
    EXPECT_EQ(Message(name, stored), "weight_scale holds a negative scale");
    stored["weight_scale"][2] = std::numeric_limits<float>::quiet_NaN();
    EXPECT_EQ(Message(name, stored), "weight_scale is not finite");
    stored["weight_scale"] = at::ones({4, 2}, at::kBFloat16);
    EXPECT_THAT(Message(name, stored), HasSubstr("is BF16 [4, 2], expected BF16 [4, 1]"));
    stored["weight_scale"] = at::ones({4, 1});
    EXPECT_THAT(Message(name, stored), HasSubstr("is F32 [4, 1], expected BF16 [4, 1]"));
  }
}

TEST_F(CheckPacked, WordsOfTheOtherWidth) {
  EXPECT_THAT(Message("int4", Stored("int8", weight_)),
              HasSubstr("weight_packed is I32 [4, 32], expected I32 [4, 16] for int4"));
}

TEST_F(CheckPacked, ZeroPointBesideSymmetricIntegers) {
  StoredTensors stored = Stored("int4", weight_);
  stored["weight_zero_point"] = at::zeros({1, 1}, at::kInt);
  EXPECT_EQ(Message("int4", stored), "4 tensors are stored, int4 has 3");
}

TEST_F(CheckPacked, NanScaleOfMxfp4) {
  StoredTensors stored = Stored("mxfp4", weight_);
  stored["weight_scale"][1][2] = 255;
  EXPECT_EQ(Message("mxfp4", stored), "weight_scale holds the NaN scale 255");
}

TEST_F(CheckPacked, InputScaleIsNoPartOfNvfp4A16) {
  EXPECT_EQ(Message("nvfp4a16", Stored("nvfp4", weight_)), "4 tensors are stored, nvfp4a16 has 3");
  StoredTensors stored = Stored("nvfp4a16", weight_);
  stored["weight_global_scale"] = at::zeros({1});
  EXPECT_EQ(Message("nvfp4a16", stored), "weight_global_scale is not finite and positive");
}

}  // namespace
}  // namespace prismaquant

#include "evaluate/evaluate.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "evaluate/checkpoint_pair.h"
#include "evaluate/forward.h"
#include "model/plain_linears.h"

namespace prismaquant {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kUp[] = "model.layers.1.mlp.up_proj";

TokenWindows Windows(int32_t count, int32_t length) {
  TokenWindows windows;
  for (int32_t n = 0; n < count; ++n) {
    std::vector<int32_t>& window = windows.windows.emplace_back();
    for (int32_t t = 0; t < length; ++t) window.push_back((n * 17 + t * t * 3 + t) % 40);
  }
  return windows;
}

class EvaluateTest : public ::testing::Test {
 protected:
  EvaluateTest() : source_(pair_.Open("source", pair_.source())) {}

  Evaluation Against(const Model& quantized, const TokenWindows& windows,
                     const ComputeOptions& compute = {}) {
    const Result<Evaluation> result = Evaluate(*source_.model, quantized, {windows, {}}, compute);
    EXPECT_TRUE(result.ok()) << result.status().message();
    return result.ok() ? *result : Evaluation();
  }
  std::string Refused(const Model& quantized, const TokenWindows& windows) {
    const Result<Evaluation> result = Evaluate(*source_.model, quantized, {windows, {}}, {});
    EXPECT_EQ(result.status().code(), StatusCode::kInvalidInput);
    EXPECT_THAT(result.status().message(), Not(HasSubstr("\n")));
    return result.status().message();
  }

  CheckpointPair pair_;
  CheckpointPair::Opened source_;
};

TEST_F(EvaluateTest, ASourceAgainstItself) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const Evaluation found = Against(*source_.model, Windows(3, 11), {.dtype = dtype});
    EXPECT_EQ(found.tokens, 30);
    EXPECT_EQ(found.kl, 0);
    EXPECT_EQ(found.kl_stderr, 0);
    EXPECT_EQ(found.top1, 1);
    EXPECT_EQ(found.ppl, found.ppl_source);
    EXPECT_EQ(found.bytes, found.bytes_source);
    EXPECT_EQ(found.bytes, source_.checkpoint->file_bytes());
  }
}

// Keeps a pass in memory and ends it after a number of layers.
class StoppingKeeper : public PassKeeper {
 public:
  explicit StoppingKeeper(int64_t stop) : stop_(stop) {}
  void GoOn() { stop_ = -1; }
  int64_t layers_run() const { return layers_run_; }

  Result<std::optional<PassState>> Load() override { return kept_; }
  Status Keep(const PassState& state, bool) override {
    kept_ = state;
    for (at::Tensor& hidden : kept_->outputs.hidden) hidden = hidden.clone();
    ++layers_run_;
    return state.layers == stop_ ? Status::Interrupted("stopped") : Status();
  }

 private:
  int64_t stop_, layers_run_ = 0;
  std::optional<PassState> kept_;
};

TEST_F(EvaluateTest, GoesOnWhereItWasEnded) {
  auto tensors = pair_.source();
  tensors[std::string(kUp) + ".weight"] = (tensors[std::string(kUp) + ".weight"] * 0.2).clone();
  const auto changed = pair_.Open("changed", tensors);
  const Calibration data{Windows(3, 9), {}};
  const Evaluation expected = Against(*changed.model, data.text);
  StoppingKeeper source(2), quantized(1);
  const EvaluationKeepers keepers{.source = &source, .quantized = &quantized};
  for (int i = 0; i < 2; ++i) {
    const auto stopped = Evaluate(*source_.model, *changed.model, data, {}, keepers);
    EXPECT_EQ(stopped.status().code(), StatusCode::kInterrupted);
  }
  quantized.GoOn();
  const auto found = Evaluate(*source_.model, *changed.model, data, {}, keepers);
  ASSERT_TRUE(found.ok()) << found.status().message();
  EXPECT_GT(found->kl, 1e-4);
  EXPECT_EQ(found->kl, expected.kl);
  EXPECT_EQ(found->ppl, expected.ppl);
  EXPECT_EQ(source.layers_run(), 2);
  EXPECT_EQ(quantized.layers_run(), 2);
}

TEST_F(EvaluateTest, FiguresAreThoseOfTheLogits) {
  auto tensors = pair_.source();
  tensors[std::string(kUp) + ".weight"] = (tensors[std::string(kUp) + ".weight"] * 0.2).clone();
  tensors["lm_head.weight"] = (tensors["lm_head.weight"] * 1.1).clone();
  const auto changed = pair_.Open("changed", tensors);
  const TokenWindows windows = Windows(4, 9);
  const Evaluation found = Against(*changed.model, windows);

  std::vector<double> means;
  double nll_source = 0, nll = 0;
  int64_t agree = 0;
  ASSERT_EQ(found.log_probs.size(), 4U);
  for (size_t n = 0; n < windows.windows.size(); ++n) {
    const auto& ids = windows.windows[n];
    const at::Tensor batch = at::tensor(std::vector<int64_t>(ids.begin(), ids.end())).unsqueeze(0);
    const auto log_probs = [&](const Model& model) {
      return at::log_softmax(ForwardLogits(model, batch, {})->squeeze(0).to(at::kDouble), -1);
    };
    const at::Tensor p = log_probs(*source_.model), q = log_probs(*changed.model);
    EXPECT_EQ(found.log_probs[n].ids, ids);
    ASSERT_EQ(found.log_probs[n].source.size(), ids.size() - 1);
    double kl = 0;
    for (size_t t = 0; t + 1 < ids.size(); ++t) {
      const auto row = static_cast<int64_t>(t);
      kl += (p[row].exp() * (p[row] - q[row])).sum().item<double>();
      agree += p[row].argmax().item<int64_t>() == q[row].argmax().item<int64_t>() ? 1 : 0;
      const double source = p[row][ids[t + 1]].item<double>();
      const double quantized = q[row][ids[t + 1]].item<double>();
      nll_source -= source;
      nll -= quantized;
      EXPECT_NEAR(found.log_probs[n].source[t], source, 1e-4);
      EXPECT_NEAR(found.log_probs[n].quantized[t], quantized, 1e-4);
    }
    means.push_back(kl / 8);
  }
  double mean = 0, squares = 0;
  for (const double m : means) mean += m / 4;
  for (const double m : means) squares += (m - mean) * (m - mean);
  EXPECT_EQ(found.tokens, 32);
  EXPECT_GT(found.kl, 1e-3);
  EXPECT_NEAR(found.kl, mean, 1e-4 * mean);
  EXPECT_GT(found.kl_stderr, 0);
  EXPECT_NEAR(found.kl_stderr, std::sqrt(squares / 3 / 4), 1e-3 * found.kl_stderr);
  EXPECT_NEAR(found.ppl_source, std::exp(nll_source / 32), 1e-3 * found.ppl_source);
  EXPECT_NEAR(found.ppl, std::exp(nll / 32), 1e-3 * found.ppl);
  EXPECT_EQ(found.top1, static_cast<double>(agree) / 32);
  EXPECT_LT(found.top1, 1);
}

TEST_F(EvaluateTest, OneWindowHasNoStandardError) {
  const auto changed = pair_.Open("changed", pair_.Quantized({{kUp, "nvfp4"}}));
  const Evaluation found = Against(*changed.model, Windows(1, 8));
  EXPECT_GT(found.kl, 0);
  EXPECT_EQ(found.kl_stderr, 0);
}

TEST_F(EvaluateTest, MoreBitsAreCloserAndLarger) {
  std::vector<Evaluation> found;
  for (const std::string format : {"nvfp4", "mxfp8", "bf16"}) {
    std::map<std::string, std::string> formats;
    for (const LinearInfo& linear : source_.model->linears()) formats[linear.name] = format;
    const auto quantized = pair_.Open(format, pair_.Quantized(formats));
    found.push_back(Against(*quantized.model, Windows(4, 12)));
  }
  EXPECT_GT(found[0].kl, 3 * found[1].kl);
  EXPECT_GT(found[1].kl, 0);
  EXPECT_EQ(found[2].kl, 0);
  EXPECT_LT(found[0].bytes, found[1].bytes);
  EXPECT_LT(found[1].bytes, found[2].bytes);
  EXPECT_EQ(found[2].bytes, found[2].bytes_source);
}

TEST_F(EvaluateTest, TensorsInAnUnknownFormat) {
  auto tensors = pair_.Quantized({{kUp, "fp8"}});
  tensors[std::string(kUp) + ".weight"] = at::zeros({96, 64}, at::kChar);
  const auto spoiled = pair_.Open("spoiled", tensors);
  EXPECT_THAT(Refused(*spoiled.model, Windows(1, 4)),
              AllOf(HasSubstr("spoiled"), HasSubstr(kUp), HasSubstr("in no known format")));
}

TEST_F(EvaluateTest, ModelsThatDoNotMatch) {
  auto tensors = pair_.source();
  Json config = CheckpointPair::Config();
  config["vocab_size"] = 38;
  for (const char* name : {"model.embed_tokens.weight", "lm_head.weight"})
    tensors[name] = tensors[name].narrow(0, 0, 38);
  const auto smaller = pair_.Open("smaller", tensors, config);
  EXPECT_THAT(Refused(*smaller.model, Windows(1, 4)),
              AllOf(HasSubstr("smaller"), HasSubstr("vocab_size is 38, expected 40")));

  config = CheckpointPair::Config();
  config["num_hidden_layers"] = 1;
  const auto shallower = pair_.Open("shallower", pair_.source(), config);
  EXPECT_THAT(Refused(*shallower.model, Windows(1, 4)),
              HasSubstr("num_hidden_layers is 1, expected 2"));

  config = CheckpointPair::Config();
  config["architectures"] = {"Qwen3ForCausalLM"};
  tensors = pair_.source();
  for (const std::string layer : {"model.layers.0.", "model.layers.1."}) {
    for (const std::string norm : {"self_attn.q_norm.weight", "self_attn.k_norm.weight"})
      tensors[layer + norm] = at::ones({32}, at::kBFloat16);
  }
  const auto other = pair_.Open("other", tensors, config);
  EXPECT_THAT(Refused(*other.model, Windows(1, 4)),
              AllOf(HasSubstr("family qwen3, expected llama"), HasSubstr("source")));
}

TEST_F(EvaluateTest, WindowsWithoutAScoredPosition) {
  EXPECT_THAT(Refused(*source_.model, Windows(3, 1)), HasSubstr("3 of 1 tokens"));
  EXPECT_THAT(Refused(*source_.model, {}), HasSubstr("0 of 0 tokens"));
}

TEST_F(EvaluateTest, IdsOutsideTheVocabulary) {
  TokenWindows windows = Windows(2, 5);
  windows.windows[1][3] = 40;
  EXPECT_THAT(Refused(*source_.model, windows), HasSubstr("token id 40"));
}

TEST(Evaluation, JsonHasThePredictionOrNull) {
  Evaluation evaluation;
  evaluation.tokens = 5;
  evaluation.kl = 0.25;
  const Json with = evaluation.ToJson(0.125), without = evaluation.ToJson(-1);
  EXPECT_EQ(with.at("kl"), 0.25);
  EXPECT_EQ(with.at("tokens"), 5);
  EXPECT_EQ(with.at("predicted_kl"), 0.125);
  EXPECT_TRUE(without.at("predicted_kl").is_null());
  EXPECT_EQ(with.at("schema"), 1);
}

}  // namespace
}  // namespace prismaquant

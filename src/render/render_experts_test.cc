#include <fmt/format.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "formats/write_tensors.h"
#include "io/temporary_folder.h"
#include "model/tiny_qwen3.h"
#include "render/render.h"
#include "render/stage_inputs.h"

namespace prismaquant {
namespace {

constexpr int64_t kHidden = 64, kExperts = 5, kTokens = 24, kWindows = 16;

template <typename T>
T Must(Result<T> result) {
  EXPECT_TRUE(result.ok()) << result.status().message();
  return std::move(result).value();
}

// Multiplies as the source does and keeps what every Linear reads, by call.
class RecordingRunner : public LinearRunner {
 public:
  explicit RecordingRunner(const std::map<std::string, at::Tensor>& tensors) : tensors_(tensors) {}
  at::Tensor Apply(const LinearInfo& linear, const at::Tensor& x) override {
    inputs_[linear.name].push_back(x.reshape({-1, linear.in}));
    return at::linear(x, tensors_.at(linear.name + ".weight").to(at::kFloat));
  }
  const std::vector<at::Tensor>& inputs(const std::string& name) const { return inputs_.at(name); }

 private:
  const std::map<std::string, at::Tensor>& tensors_;
  std::map<std::string, std::vector<at::Tensor>> inputs_;
};

// A Qwen3 mixture of one layer and five experts, the last of which hardly any token is sent to. Its
// attention stays as it is, so the experts' inputs are the source's.
class RenderExpertsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    at::set_num_threads(1);
    torch::manual_seed(2);
    Add("model.embed_tokens.weight", {48, kHidden});
    Add("model.norm.weight", {kHidden});
    const std::string layer = "model.layers.0.";
    AddTinyAttention(layer, [this](const std::string& name, const std::vector<int64_t>& shape) {
      Add(name, shape);
    });
    Add(layer + "mlp.gate.weight", {kExperts, kHidden});
    for (int64_t e = 0; e < kExperts; ++e) {
      const std::string expert = Expert(e);
      Add(expert + "gate_proj.weight", {32, kHidden});
      Add(expert + "up_proj.weight", {32, kHidden});
      Add(expert + "down_proj.weight", {kHidden, 32});
    }
    // Of each pair of opposite rows one is above zero, and the last row's product next to it.
    at::Tensor& router = tensors_.at(layer + "mlp.gate.weight");
    router[1] = -router[0];
    router[3] = -router[2];
    router[4].mul_(0.03);
    windows_ = TinyWindows(kWindows, kTokens);
    OpenModel();
  }

  static std::string Expert(int64_t e) { return fmt::format("model.layers.0.mlp.experts.{}.", e); }

  void Add(const std::string& name, const std::vector<int64_t>& shape) {
    tensors_[name] = (torch::randn(shape) * 0.3).to(at::kBFloat16);
  }

  void OpenModel() {
    const Json config = TinyQwen3Config({{"architectures", {"Qwen3MoeForCausalLM"}},
                                         {"num_hidden_layers", 1},
                                         {"intermediate_size", 64},
                                         {"moe_intermediate_size", 32},
                                         {"num_experts", kExperts},
                                         {"num_experts_per_tok", 2},
                                         {"norm_topk_prob", true}});
    const Status written = WriteTensors(folder_ / "source", tensors_, config);
    ASSERT_TRUE(written.ok()) << written.message();
    checkpoint_ = std::make_unique<Checkpoint>(Must(Checkpoint::Open(folder_ / "source")));
    model_ = Must(Model::Open(*checkpoint_));
  }

  // What the Linears of the source read.
  RecordingRunner Record() const {
    const at::NoGradGuard no_grad;
    RecordingRunner runner(tensors_);
    const auto layer = Must(model_->LoadLayer(0, {}));
    for (const auto& window : windows_.windows) {
      const at::Tensor ids = at::tensor(std::vector<int64_t>(window.begin(), window.end()));
      RunLayer(*layer, model_->Context(kTokens, {}), Must(model_->Embed(ids.unsqueeze(0), {})),
               runner);
    }
    return runner;
  }

  at::Tensor WeightOf(const std::string& linear) const {
    return tensors_.at(linear + ".weight").to(at::kFloat);
  }

  TemporaryFolder folder_;
  std::map<std::string, at::Tensor> tensors_;
  std::unique_ptr<Checkpoint> checkpoint_;
  std::unique_ptr<Model> model_;
  TokenWindows windows_;
};

double Amax(const at::Tensor& x) { return x.abs().max().to(at::kDouble).item<double>(); }

TEST_F(RenderExpertsTest, GateAndUpAreRoundedForTheExpertsOwnTokens) {
  const Format& format = *FindFormat("nvfp4");
  FormatChoice formats;
  for (const LinearInfo& linear : model_->linears()) {
    formats[linear.name] = linear.is_expert ? &format : &SourceFormat();
  }
  RunStore store = Must(RunStore::Open(FileSystem::Default(), folder_ / "store"));
  const Status status = RenderModel(*model_, {windows_, {}}, formats, {}, "k", store);
  ASSERT_TRUE(status.ok()) << status.message();
  const auto rendered = Must(RenderedLayer(store, "k", 0));
  const Json report = Must(RenderReport(store, "k", 1));

  const RecordingRunner source = Record();
  double input_amax = 0;
  for (int64_t e = 0; e < kExperts; ++e) {
    const at::Tensor x = at::cat(source.inputs(Expert(e) + "gate_proj"));
    if (x.numel() > 0) input_amax = std::max(input_amax, Amax(x));
  }
  int gptq = 0, few = 0;
  for (int64_t e = 0; e < kExperts; ++e) {
    const std::string gate = Expert(e) + "gate_proj", up = Expert(e) + "up_proj";
    const SharedScales shared{.weight_amax = std::max(Amax(WeightOf(gate)), Amax(WeightOf(up))),
                              .input_amax = kLargestHeadroom * input_amax};
    InputRows train, held_out;
    int64_t tokens = 0;
    for (size_t n = 0; n < kWindows; ++n) {
      const at::Tensor x = source.inputs(gate)[n];
      (n % 8 == 7 ? held_out : train).Add(format.QuantizeActivation(x, shared), {});
      tokens += x.size(0);
    }
    const bool enough = tokens >= kFewestInputs;
    InputMoments moments(kHidden);
    moments.Add(train.x(), {});
    const at::Tensor hessian = enough ? moments.hessian() : at::eye(kHidden);
    InputRows alike;
    alike.Add(at::eye(kHidden), {});
    for (const std::string& linear : {gate, up}) {
      const at::Tensor weight = WeightOf(linear);
      const GptqResult expected =
          Must(RenderGuarded(format, weight, weight, FactorHessian(format, hessian, {}),
                             enough ? held_out : alike, shared, DType::kBF16, {}));
      EXPECT_TRUE(expected.decoded.equal(format.Decode(rendered.at(linear)))) << linear;
      EXPECT_EQ(report[linear]["tokens"], tokens) << linear;
      EXPECT_EQ(report[linear]["rendered"], enough ? "gptq" : "rtn+scales") << linear;
    }
    ++(enough ? gptq : few);
  }
  EXPECT_EQ(gptq, 4);
  EXPECT_EQ(few, 1);
}

}  // namespace
}  // namespace prismaquant

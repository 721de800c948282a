#include "render/render.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "formats/tensor_bytes.h"
#include "formats/write_tensors.h"
#include "io/faulty_file_system.h"
#include "io/temporary_folder.h"
#include "model/plain_linears.h"
#include "model/tiny_qwen3.h"
#include "probe/passes.h"
#include "probe/probe.h"
#include "render/stage_inputs.h"

namespace prismaquant {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::UnorderedElementsAre;

constexpr int kLayers = 3;
constexpr int64_t kTokens = 12;
constexpr char kQuery[] = "model.layers.1.self_attn.q_proj";

using Rendered = std::map<std::string, StoredTensors>;

template <typename T>
T Must(Result<T> result) {
  EXPECT_TRUE(result.ok()) << result.status().message();
  return std::move(result).value();
}

bool SameStored(const Rendered& a, const Rendered& b) {
  if (a.size() != b.size()) return false;
  for (const auto& [linear, tensors] : a) {
    const auto other = b.find(linear);
    if (other == b.end() || tensors.size() != other->second.size()) return false;
    for (const auto& [suffix, tensor] : tensors) {
      const auto found = other->second.find(suffix);
      if (found == other->second.end() ||
          !tensor.view(at::kByte).equal(found->second.view(at::kByte)))
        return false;
    }
  }
  return true;
}

// Multiplies a layer as rendered tensors say; Linears that were not rendered are the source's.
class RenderedRunner : public LinearRunner {
 public:
  RenderedRunner(const Model& model, const FormatChoice& formats, Rendered rendered)
      : model_(model), formats_(formats), rendered_(std::move(rendered)) {}
  at::Tensor Apply(const LinearInfo& linear, const at::Tensor& x) override {
    const auto stored = rendered_.find(linear.name);
    if (stored == rendered_.end())
      return at::linear(x, Must(model_.LoadWeight(linear)).to(at::kFloat));
    const Format& format = *formats_.at(linear.name);
    return at::linear(format.QuantizeActivation(x, stored->second), format.Decode(stored->second));
  }

 private:
  const Model& model_;
  const FormatChoice& formats_;
  Rendered rendered_;
};

// A Qwen3 checkpoint of three layers, its calibration windows, and stores of its renderings.
class RenderTest : public ::testing::Test {
 protected:
  void SetUp() override {
    at::set_num_threads(1);
    torch::manual_seed(1);
    Add("model.embed_tokens.weight", {48, 64});
    Add("model.norm.weight", {64});
    const auto add = [this](const std::string& name, const std::vector<int64_t>& shape) {
      Add(name, shape);
    };
    for (int layer = 0; layer < kLayers; ++layer) {
      const std::string prefix = "model.layers." + std::to_string(layer) + ".";
      AddTinyAttention(prefix, add);
      Add(prefix + "mlp.gate_proj.weight", {160, 64});
      Add(prefix + "mlp.up_proj.weight", {160, 64});
      Add(prefix + "mlp.down_proj.weight", {64, 160});
    }
    OpenModel();
    windows_ = TinyWindows(16, kTokens);
  }

  void Add(const std::string& name, const std::vector<int64_t>& shape) {
    tensors_[name] = (torch::randn(shape) * 0.3).to(at::kBFloat16);
  }

  void OpenModel() {
    const Json config = TinyQwen3Config({{"architectures", {"Qwen3ForCausalLM"}},
                                         {"num_hidden_layers", kLayers},
                                         {"intermediate_size", 160}});
    const Status written = WriteTensors(folder_ / "source", tensors_, config);
    ASSERT_TRUE(written.ok()) << written.message();
    checkpoint_ = std::make_unique<Checkpoint>(Must(Checkpoint::Open(folder_ / "source")));
    model_ = Must(Model::Open(*checkpoint_));
  }

  // Layers 0 and 1: attention inputs NVFP4, its output FP8, gate and up MXFP8, down NVFP4; layer 2
  // the same with attention as in the source.
  FormatChoice Mixed() const {
    FormatChoice formats;
    for (const LinearInfo& linear : model_->linears()) {
      const char* name = "nvfp4";
      if (linear.name.ends_with("o_proj")) name = "fp8";
      if (linear.name.ends_with("gate_proj") || linear.name.ends_with("up_proj")) name = "mxfp8";
      if (linear.layer == 2 && linear.name.find("self_attn") != std::string::npos) name = "bf16";
      formats[linear.name] = FindFormat(name);
    }
    return formats;
  }
  FormatChoice Uniform(const char* name) const {
    FormatChoice formats;
    for (const LinearInfo& linear : model_->linears()) formats[linear.name] = FindFormat(name);
    return formats;
  }

  RunStore Store(const std::string& name, FileSystem& fs = FileSystem::Default()) const {
    return Must(RunStore::Open(fs, folder_ / name));
  }
  Status Render(RunStore& store, const FormatChoice& formats, const RenderOptions& options = {}) {
    return RenderModel(*model_, {windows_, {}}, formats, options, "k", store);
  }
  static Rendered All(const RunStore& store) {
    Rendered all;
    for (int layer = 0; layer < kLayers; ++layer) all.merge(Must(RenderedLayer(store, "k", layer)));
    return all;
  }
  Rendered RenderAll(const std::string& name, const FormatChoice& formats,
                     const RenderOptions& options = {}) {
    RunStore store = Store(name);
    const Status status = Render(store, formats, options);
    EXPECT_TRUE(status.ok()) << status.message();
    return All(store);
  }

  const LinearInfo& Info(const std::string& name) const {
    for (const LinearInfo& linear : model_->linears()) {
      if (linear.name == name) return linear;
    }
    ADD_FAILURE() << name;
    return model_->linears().front();
  }
  at::Tensor WeightOf(const std::string& name) const {
    return tensors_.at(name + ".weight").to(at::kFloat);
  }
  double UnitAmax(const std::string& unit) const {
    double amax = 0;
    for (const LinearInfo& linear : model_->linears()) {
      if (linear.unit == unit)
        amax = std::max(amax, WeightOf(linear.name).abs().max().to(at::kDouble).item<double>());
    }
    return amax;
  }

  // The inputs of the first stage of layer 1, one per window, behind layer 0 under `runner`.
  std::vector<at::Tensor> LayerOneInputs(LinearRunner& runner) const {
    const at::NoGradGuard no_grad;
    const SequenceContext context = model_->Context(kTokens, {});
    const auto first = Must(model_->LoadLayer(0, {})), second = Must(model_->LoadLayer(1, {}));
    std::vector<at::Tensor> inputs;
    for (const auto& window : windows_.windows) {
      const at::Tensor ids = at::tensor(std::vector<int64_t>(window.begin(), window.end()));
      LayerState state;
      state.hidden = RunLayer(*first, context, Must(model_->Embed(ids.unsqueeze(0), {})), runner);
      inputs.push_back(second->StageInputs(0, context, state)[0]);
    }
    return inputs;
  }

  // What kQuery must become, with one weight per token of all windows or none.
  GptqResult ExpectedQuery(const std::vector<at::Tensor>& inputs, const at::Tensor& token_weights,
                           const RowFeedback& feedback = {}) const {
    const auto source = Must(PlainLinears::Load(*model_, 0, {}));
    const std::vector<at::Tensor> wanted = LayerOneInputs(*source);
    const LinearInfo& linear = Info(kQuery);
    const Format& format = *FindFormat("nvfp4");
    const SharedScales shared{
        .weight_amax = UnitAmax(linear.unit),
        .input_amax = kLargestHeadroom * at::cat(inputs).abs().max().item<double>()};
    InputRows train, held_out;
    for (size_t n = 0; n < inputs.size(); ++n) {
      at::Tensor weights;
      if (token_weights.defined())
        weights = token_weights.narrow(0, static_cast<int64_t>(n) * kTokens, kTokens);
      const at::Tensor x = format.QuantizeActivation(inputs[n], shared);
      const at::Tensor lack = at::linear(wanted[n] - x, WeightOf(kQuery));
      const at::Tensor rows = x.reshape({-1, 64}), lacks = lack.reshape({-1, linear.out});
      (n == 7 || n == 15 ? held_out : train).Add(rows, weights, lacks);
    }
    InputMoments moments(64);
    moments.Add(train.x(), {});
    const at::Tensor weight = WeightOf(kQuery);
    const at::Tensor target = Correct(weight, moments.hessian(), train, held_out).weight;
    return Must(RenderGuarded(format, weight, target, FactorHessian(format, moments.hessian(), {}),
                              held_out, shared, DType::kBF16, {}, feedback));
  }

  // Leaves in the store what the probe would: one weight per token and Linear, and of kQuery a
  // factor of its outputs, if there is one.
  void PutGuidance(RunStore& store, const at::Tensor& weights,
                   const at::Tensor& factor = {}) const {
    for (int layer = 0; layer < kLayers; ++layer) {
      std::vector<BlobTensor> blob, factors;
      for (const LinearInfo& linear : model_->LayerLinears(layer))
        blob.push_back({{linear.name, DType::kF32, weights.sizes().vec()}, TensorBytes(weights)});
      ASSERT_TRUE(store.PutBlob(TokenWeightBlob(layer), blob).ok());
      if (factor.defined() && layer == Info(kQuery).layer) {
        factors.push_back({{kQuery, DType::kBF16, factor.sizes().vec()}, TensorBytes(factor)});
      }
      ASSERT_TRUE(store.PutBlob(OutputFactorBlob(layer), factors).ok());
    }
    ASSERT_TRUE(store.PutNote(kProbedNote, "1").ok());
  }

  TemporaryFolder folder_;
  std::map<std::string, at::Tensor> tensors_;
  std::unique_ptr<Checkpoint> checkpoint_;
  std::unique_ptr<Model> model_;
  TokenWindows windows_;
};

TEST_F(RenderTest, EveryQuantizedLinearIsStoredInItsFormat) {
  const FormatChoice formats = Mixed();
  const Rendered rendered = RenderAll("store", formats);
  size_t quantized = 0;
  for (const LinearInfo& linear : model_->linears()) {
    const Format& format = *formats.at(linear.name);
    if (&format == &SourceFormat()) {
      EXPECT_EQ(rendered.count(linear.name), 0U);
      continue;
    }
    ++quantized;
    const StoredTensors& stored = rendered.at(linear.name);
    const Status checked = CheckStored(format, stored, linear.out, linear.in, linear.dtype);
    EXPECT_TRUE(checked.ok()) << linear.name << ": " << checked.message();
    const at::Tensor weight = WeightOf(linear.name);
    EXPECT_LT((format.Decode(stored) - weight).norm().item<double>(),
              0.25 * weight.norm().item<double>())
        << linear.name;
  }
  EXPECT_EQ(rendered.size(), quantized);
}

TEST_F(RenderTest, FusedSiblingsShareGlobalScalesAndOthersDoNot) {
  const Rendered rendered = RenderAll("store", Mixed());
  const auto bits = [&](const std::string& linear, const char* scale) {
    return rendered.at(linear).at(scale).view(at::kInt).item<int32_t>();
  };
  std::set<int32_t> weight_scales, input_scales;
  for (const std::string layer : {"model.layers.0.", "model.layers.1."}) {
    for (const char* scale : {"weight_global_scale", "input_global_scale"}) {
      EXPECT_EQ(bits(layer + "self_attn.q_proj", scale), bits(layer + "self_attn.k_proj", scale));
      EXPECT_EQ(bits(layer + "self_attn.q_proj", scale), bits(layer + "self_attn.v_proj", scale));
    }
    EXPECT_EQ(rendered.at(layer + "self_attn.k_proj").at("weight_global_scale").item<float>(),
              static_cast<float>(2688 / UnitAmax(layer + "self_attn.qkv_proj")));
    for (const char* linear : {"self_attn.q_proj", "mlp.down_proj"}) {
      weight_scales.insert(bits(layer + linear, "weight_global_scale"));
      input_scales.insert(bits(layer + linear, "input_global_scale"));
    }
  }
  EXPECT_EQ(weight_scales.size(), 4U);
  EXPECT_EQ(input_scales.size(), 4U);
}

TEST_F(RenderTest, RoundToNearestGivesTheCodecsBytes) {
  const FormatChoice formats = Mixed();
  const Rendered rendered = RenderAll("store", formats, {.mode = RenderMode::kRtn});
  for (const auto& [name, stored] : rendered) {
    const StoredTensors expected = formats.at(name)->Encode(
        WeightOf(name), {.weight_amax = UnitAmax(Info(name).unit)}, DType::kBF16);
    for (const auto& [suffix, tensor] : expected) {
      if (suffix == "input_global_scale") continue;
      EXPECT_TRUE(stored.at(suffix).view(at::kByte).equal(tensor.view(at::kByte)))
          << name << "." << suffix;
    }
  }
  EXPECT_FALSE(SameStored(rendered, RenderAll("gptq", formats)));
}

TEST_F(RenderTest, LinearsAreRoundedForTheInputsBehindTheQuantizedPrefix) {
  const FormatChoice formats = Uniform("nvfp4");
  const Rendered rendered = RenderAll("store", formats);
  RenderedRunner prefix(*model_, formats, rendered);
  const GptqResult expected = ExpectedQuery(LayerOneInputs(prefix), {});
  EXPECT_FALSE(expected.fell_back);
  EXPECT_TRUE(SameStored({{kQuery, rendered.at(kQuery)}}, {{kQuery, expected.stored}}));

  const auto plain = Must(PlainLinears::Load(*model_, 0, {}));
  const GptqResult unquantized = ExpectedQuery(LayerOneInputs(*plain), {});
  for (const char* suffix : {"input_global_scale", "weight_packed"}) {
    EXPECT_FALSE(unquantized.stored.at(suffix).equal(expected.stored.at(suffix))) << suffix;
  }
  RunStore store = Store("store");
  const Json report = Must(RenderReport(store, "k", kLayers));
  EXPECT_EQ(report.at(kQuery).at("error_ratio").get<double>(), expected.error_ratio);
}

TEST_F(RenderTest, TokensAreWeightedByTheProbe) {
  const FormatChoice formats = Uniform("nvfp4");
  const Rendered plain = RenderAll("plain", formats);
  const int64_t tokens = windows_.count() * kTokens;
  at::Tensor one_large = torch::full({tokens}, 2.0);
  one_large[5] = 1e6;
  torch::manual_seed(2);
  const at::Tensor uneven = torch::rand({tokens}).square() * 1e-9;
  const auto guided = [&](const char* name, const at::Tensor& weights, bool use) {
    RunStore store = Store(name);
    PutGuidance(store, weights);
    EXPECT_TRUE(Render(store, formats, {.guided = use}).ok());
    return All(store);
  };
  EXPECT_TRUE(SameStored(guided("even", torch::full({tokens}, 2.0), true), plain));
  EXPECT_TRUE(SameStored(guided("unused", uneven, false), plain));
  for (const auto& [name, weights] : {std::pair{"large", one_large}, {"uneven", uneven}}) {
    const Rendered rendered = guided(name, weights, true);
    EXPECT_FALSE(SameStored(rendered, plain));
    RenderedRunner prefix(*model_, formats, rendered);
    const at::Tensor clipped = (weights / weights.mean()).clamp_max(10);
    const GptqResult expected = ExpectedQuery(LayerOneInputs(prefix), clipped);
    EXPECT_TRUE(SameStored({{kQuery, rendered.at(kQuery)}}, {{kQuery, expected.stored}})) << name;
  }
}

TEST_F(RenderTest, RowsAreMovedByTheProbesOutputFactor) {
  const FormatChoice formats = Uniform("nvfp4");
  const Rendered plain = RenderAll("plain", formats);
  const at::Tensor even = torch::ones({windows_.count() * kTokens});
  torch::manual_seed(3);
  const at::Tensor factor = torch::randn({Info(kQuery).out, 4}).to(at::kBFloat16);
  RunStore store = Store("store");
  PutGuidance(store, even, factor);
  ASSERT_TRUE(Render(store, formats).ok());
  const Rendered rendered = All(store);
  EXPECT_FALSE(SameStored({{kQuery, rendered.at(kQuery)}}, {{kQuery, plain.at(kQuery)}}));
  RenderedRunner prefix(*model_, formats, rendered);
  const GptqResult expected = ExpectedQuery(LayerOneInputs(prefix), even, RowFeedback(factor));
  EXPECT_TRUE(SameStored({{kQuery, rendered.at(kQuery)}}, {{kQuery, expected.stored}}));
}

TEST_F(RenderTest, AnUnfinishedProbeWeightsNothing) {
  const FormatChoice formats = Uniform("nvfp4");
  const Rendered plain = RenderAll("plain", formats);
  RunStore store = Store("store");
  torch::manual_seed(2);
  {
    RunStore finished = Store("finished");
    PutGuidance(finished, torch::rand({windows_.count() * kTokens}));
  }
  for (const char* blob : {"token_weight", "output_factor"}) {
    std::filesystem::copy(folder_ / "finished" / blob, folder_ / "store" / blob);
  }
  ASSERT_TRUE(Render(store, formats).ok());
  EXPECT_TRUE(SameStored(All(store), plain));
}

TEST_F(RenderTest, InterruptedAndResumedGivesTheSameTensors) {
  const FormatChoice formats = Mixed();
  const Rendered expected = RenderAll("whole", formats);
  FaultyFileSystem counting;
  {
    RunStore store = Store("counted", counting);
    ASSERT_TRUE(Render(store, formats).ok());
  }
  std::set<int> finished_layers;
  for (int64_t stop = 3; stop < counting.operations(); stop += 7) {
    const std::string name = "stop-" + std::to_string(stop);
    FaultyFileSystem faulty;
    faulty.FailFrom(stop);
    int done = 0;
    {
      RunStore store = Store(name, faulty);
      EXPECT_EQ(Render(store, formats).code(), StatusCode::kSystem);
      while (done < kLayers && *store.IsDone("render/k", done)) ++done;
    }
    finished_layers.insert(done);
    FaultyFileSystem resuming;
    RunStore store = Store(name, resuming);
    const Status resumed = Render(store, formats);
    ASSERT_TRUE(resumed.ok()) << resumed.message();
    EXPECT_EQ(resuming.operations() < counting.operations(), done > 0);
    EXPECT_TRUE(SameStored(All(store), expected)) << "stopped at operation " << stop;
    EXPECT_EQ(Must(RenderReport(store, "k", kLayers)).size(), expected.size());
  }
  EXPECT_THAT(finished_layers, ::testing::IsSupersetOf({0, 1, 2}));
}

TEST_F(RenderTest, AFinishedRenderingIsNotRepeated) {
  RunStore store = Store("store");
  ASSERT_TRUE(Render(store, Mixed()).ok());
  const Rendered first = All(store);
  windows_.windows.front().front() = 9999;
  EXPECT_TRUE(Render(store, Mixed()).ok());
  EXPECT_TRUE(SameStored(All(store), first));
}

TEST_F(RenderTest, ReportSaysWhatWasDone) {
  RunStore store = Store("store");
  ASSERT_TRUE(Render(store, Mixed()).ok());
  const Json report = Must(RenderReport(store, "k", kLayers));
  EXPECT_EQ(report.size(), All(store).size());
  EXPECT_EQ(report.at(kQuery).at("format"), "nvfp4");
  EXPECT_EQ(report.at("model.layers.2.mlp.up_proj").at("format"), "mxfp8");
  int gptq = 0;
  for (const auto& [name, entry] : report.items()) {
    gptq += entry.at("rendered") == "gptq" ? 1 : 0;
    EXPECT_EQ(entry.at("error_ratio").get<double>() < 1, entry.at("rendered") == "gptq") << name;
  }
  EXPECT_GT(gptq, 5);

  windows_.windows.resize(4);
  RunStore few = Store("few");
  ASSERT_TRUE(Render(few, Mixed()).ok());
  EXPECT_TRUE(Must(RenderReport(few, "k", kLayers)).at(kQuery).contains("error_ratio"));

  windows_.windows.resize(3);
  RunStore unjudged = Store("unjudged");
  ASSERT_TRUE(Render(unjudged, Mixed()).ok());
  const Json entry = Must(RenderReport(unjudged, "k", kLayers)).at(kQuery);
  EXPECT_EQ(entry, (Json{{"format", "nvfp4"}, {"rendered", "gptq"}}));

  RunStore nearest = Store("nearest");
  ASSERT_TRUE(Render(nearest, Mixed(), {.mode = RenderMode::kRtn}).ok());
  EXPECT_EQ(Must(RenderReport(nearest, "k", kLayers)).at(kQuery),
            (Json{{"format", "nvfp4"}, {"rendered", "rtn"}}));
}

TEST_F(RenderTest, DropRenderingFreesTheStore) {
  RunStore store = Store("store");
  ASSERT_TRUE(Render(store, Mixed()).ok());
  ASSERT_TRUE(RenderModel(*model_, {windows_, {}}, Uniform("fp8"), {}, "other", store).ok());
  const Rendered first = All(store);
  ASSERT_TRUE(DropRendering(store, "k").ok());
  for (const std::string& name : folder_.List()) {
    EXPECT_FALSE(name.starts_with("store/render/k")) << name;
  }
  for (int layer = 0; layer < kLayers; ++layer) {
    EXPECT_FALSE(*store.IsDone("render/k", layer));
    EXPECT_TRUE(*store.IsDone("render/other", layer));
    EXPECT_FALSE(RenderedLayer(store, "k", layer).ok());
    EXPECT_TRUE(RenderedLayer(store, "other", layer).ok());
  }
  EXPECT_TRUE(DropRendering(store, "k").ok());
  ASSERT_TRUE(Render(store, Mixed()).ok());
  EXPECT_TRUE(SameStored(All(store), first));
}

TEST_F(RenderTest, OnlyTheRenderedLayersRemainInTheStore) {
  RunStore store = Store("store");
  ASSERT_TRUE(Render(store, Mixed()).ok());
  std::vector<std::string> blobs;
  for (const std::string& name : folder_.List()) {
    if (name.starts_with("store/render/k/")) blobs.push_back(name.substr(15));
  }
  EXPECT_THAT(blobs, UnorderedElementsAre("layer-0.safetensors", "layer-1.safetensors",
                                          "layer-2.safetensors"));
}

TEST_F(RenderTest, NothingToQuantize) { EXPECT_TRUE(RenderAll("store", Uniform("bf16")).empty()); }

TEST_F(RenderTest, Bfloat16Arithmetic) {
  const FormatChoice formats = Mixed();
  const RenderOptions options{.compute = {.dtype = at::kBFloat16}};
  const Rendered rendered = RenderAll("store", formats, options);
  for (const auto& [name, stored] : rendered) {
    const LinearInfo& linear = Info(name);
    const Status checked =
        CheckStored(*formats.at(name), stored, linear.out, linear.in, linear.dtype);
    EXPECT_TRUE(checked.ok()) << name << ": " << checked.message();
  }
  EXPECT_FALSE(SameStored(rendered, RenderAll("float32", formats)));
  EXPECT_TRUE(SameStored(rendered, RenderAll("again", formats, options)));
}

TEST_F(RenderTest, AWeightThatIsNotFiniteIsNamed) {
  tensors_.at("model.layers.1.mlp.up_proj.weight")[3][4] = std::numeric_limits<float>::infinity();
  OpenModel();
  RunStore store = Store("store");
  const Status status = Render(store, Mixed());
  EXPECT_EQ(status.code(), StatusCode::kInvalidInput);
  EXPECT_THAT(status.message(),
              AllOf(HasSubstr("source"), HasSubstr("model.layers.1.mlp.up_proj.weight")));
  EXPECT_EQ(status.message().find('\n'), std::string::npos);
  EXPECT_TRUE(*store.IsDone("render/k", 0));
}

TEST_F(RenderTest, KeyDependsOnEveryOption) {
  const FormatChoice formats = Mixed();
  std::vector<std::pair<FormatChoice, RenderOptions>> variants(7, {formats, RenderOptions()});
  variants[1].first.at(kQuery) = FindFormat("fp8");
  variants[2].second.mode = RenderMode::kRtn;
  variants[3].second.gptq.damping = 0.29;
  variants[4].second.gptq.choose_scales = false;
  variants[5].second.guided = false;
  variants[6].second.compute.dtype = at::kBFloat16;
  std::set<std::string> keys;
  for (const auto& [choice, options] : variants) {
    const std::string key = RenderKey(choice, options);
    EXPECT_EQ(key, RenderKey(choice, options));
    EXPECT_EQ(key.size(), 16U);
    keys.insert(key);
  }
  EXPECT_EQ(keys.size(), variants.size());
}

}  // namespace
}  // namespace prismaquant

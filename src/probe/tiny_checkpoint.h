#ifndef PRISMAQUANT_PROBE_TINY_CHECKPOINT_H_
#define PRISMAQUANT_PROBE_TINY_CHECKPOINT_H_

// TinyCheckpoint: for tests, a Qwen3 checkpoint of two layers with random weights and calibration
// windows for it. Of its units, MXFP8's kernels take only the fused query, key and value (128
// outputs).

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "data/calibration.h"
#include "formats/format.h"
#include "formats/write_tensors.h"
#include "io/checkpoint.h"
#include "io/temporary_folder.h"
#include "model/model.h"
#include "model/tiny_qwen3.h"

namespace prismaquant {

class TinyCheckpoint {
 public:
  static constexpr int kLayers = 2;
  static constexpr int64_t kSequences = 3, kTokens = 10;

  // Weights are normal with standard deviation 0.3 times their entry in `scales`, 1 without one.
  explicit TinyCheckpoint(std::map<std::string, double> scales = {}) : scales_(std::move(scales)) {
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
      Add(prefix + "mlp.gate_proj.weight", {96, 64});
      Add(prefix + "mlp.up_proj.weight", {96, 64});
      Add(prefix + "mlp.down_proj.weight", {64, 96});
    }
    const Json config = TinyQwen3Config({{"architectures", {"Qwen3ForCausalLM"}},
                                         {"num_hidden_layers", kLayers},
                                         {"intermediate_size", 96}});
    const Status written = WriteTensors(folder_ / "source", tensors_, config);
    EXPECT_TRUE(written.ok()) << written.message();
    checkpoint_ = std::make_unique<Checkpoint>(Checkpoint::Open(folder_ / "source").value());
    model_ = Model::Open(*checkpoint_).value();
    calibration_.text = TinyWindows(kSequences, kTokens);
  }

  const Model& model() const { return *model_; }
  const Calibration& calibration() const { return calibration_; }

 private:
  void Add(const std::string& name, const std::vector<int64_t>& shape) {
    const auto scale = scales_.find(name);
    const double deviation = 0.3 * (scale == scales_.end() ? 1 : scale->second);
    tensors_[name] = (torch::randn(shape) * deviation).to(at::kBFloat16);
  }

  std::map<std::string, double> scales_;
  TemporaryFolder folder_;
  std::map<std::string, at::Tensor> tensors_;
  std::unique_ptr<Checkpoint> checkpoint_;
  std::unique_ptr<Model> model_;
  Calibration calibration_;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_PROBE_TINY_CHECKPOINT_H_

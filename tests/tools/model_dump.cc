// model_dump CHECKPOINT IDS.json DTYPE OUT.safetensors [DIRECTION.safetensors]
//
// Runs the text body on token ids ([[id, ..], ..]) in float32, bfloat16 or float64 and writes
// `logits` and, per Linear, its input `NAME.x`. With a file that holds `direction` (shaped as the
// logits), also the gradients of <logits, direction>: `NAME.g` at each Linear's output, `NAME.dx` =
// g W, and `embeddings.grad`.

#include <fmt/format.h>
#include <torch/torch.h>

#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "dump_file.h"
#include "model/plain_linears.h"

namespace prismaquant {
namespace {

// Keeps inputs and outputs of the Linears it runs. Of one that ends its layer the layer gets zeros
// with the output's gradient, and the caller adds the output itself.
class RecordingLinears : public LinearRunner {
 public:
  struct Record {
    std::string name;
    at::Tensor x, y, weight;
  };
  RecordingLinears(std::unique_ptr<PlainLinears> linears, std::vector<Record>& records)
      : linears_(std::move(linears)), records_(records) {}
  at::Tensor Apply(const LinearInfo& linear, const at::Tensor& x) override {
    const at::Tensor y = linears_->Apply(linear, x);
    if (y.numel() == 0) return y;  // an expert without tokens
    if (y.requires_grad()) y.retain_grad();
    records_.push_back({linear.name, x.detach(), y, linears_->weight(linear.name)});
    if (!linear.ends_layer) return y;
    end_ = y.detach();
    return y - end_;
  }
  at::Tensor WithEnd(const at::Tensor& hidden) const {
    return end_.defined() ? hidden + end_ : hidden;
  }

 private:
  std::unique_ptr<PlainLinears> linears_;
  std::vector<Record>& records_;
  at::Tensor end_;
};

Result<at::Tensor> ReadIds(const std::string& path) {
  PQ_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  PQ_ASSIGN_OR_RETURN(const Json json, ParseJson(text, path));
  std::vector<at::Tensor> rows;
  for (const Json& row : json) rows.push_back(at::tensor(row.get<std::vector<int64_t>>()));
  return at::stack(rows);
}

Status AddGradients(const std::string& path, const at::Tensor& logits, const at::Tensor& embedded,
                    const std::vector<RecordingLinears::Record>& records, NamedTensors& out) {
  PQ_ASSIGN_OR_RETURN(const at::Tensor direction, ReadDirection(path));
  (logits * direction.to(logits.scalar_type())).sum().backward();
  out["embeddings.grad"] = embedded.grad();
  for (const RecordingLinears::Record& record : records) {
    out[record.name + ".g"] = record.y.grad();
    out[record.name + ".dx"] = at::matmul(record.y.grad(), record.weight);
  }
  return {};
}

Status Dump(const std::vector<std::string>& arguments) {
  PQ_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(arguments[0]));
  PQ_ASSIGN_OR_RETURN(const std::unique_ptr<Model> model, Model::Open(checkpoint));
  PQ_ASSIGN_OR_RETURN(const at::Tensor ids, ReadIds(arguments[1]));
  ComputeOptions options;
  PQ_ASSIGN_OR_RETURN(options.dtype, ParseComputeType(arguments[2]));
  NamedTensors out;
  if (arguments.size() == 4) {
    PQ_ASSIGN_OR_RETURN(out["logits"], ForwardLogits(*model, ids, options));
    return WriteDump(arguments[3], std::move(out));
  }
  const SequenceContext context = model->Context(ids.size(1), options);
  PQ_ASSIGN_OR_RETURN(const at::Tensor embedded, model->Embed(ids, options));
  embedded.set_requires_grad(true);
  at::Tensor hidden = embedded;
  std::vector<RecordingLinears::Record> records;
  for (int layer = 0; layer < model->config().num_layers; ++layer) {
    PQ_ASSIGN_OR_RETURN(const auto block, model->LoadLayer(layer, options));
    PQ_ASSIGN_OR_RETURN(auto linears, PlainLinears::Load(*model, layer, options));
    RecordingLinears recording(std::move(linears), records);
    hidden = recording.WithEnd(RunLayer(*block, context, hidden, recording));
  }
  PQ_ASSIGN_OR_RETURN(const auto head, model->LoadHead(Part::kText, options));
  out["logits"] = head->Logits(hidden);
  PQ_RETURN_IF_ERROR(AddGradients(arguments[4], out["logits"], embedded, records, out));
  for (const RecordingLinears::Record& record : records) out[record.name + ".x"] = record.x;
  return WriteDump(arguments[3], std::move(out));
}

}  // namespace
}  // namespace prismaquant

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  if (arguments.size() != 4 && arguments.size() != 5) {
    std::fputs("usage: model_dump CHECKPOINT IDS.json DTYPE OUT [DIRECTION]\n", stderr);
    return 2;
  }
  return prismaquant::RunDump("model_dump", [&] { return prismaquant::Dump(arguments); });
}

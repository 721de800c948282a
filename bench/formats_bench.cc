// Bandwidth of the format operators on a [4096, 4096] weight, in bytes of its float32 form per
// second. The argument is the number of threads.

#include <benchmark/benchmark.h>
#include <torch/torch.h>

#include "formats/format.h"

namespace prismaquant {
namespace {

constexpr int64_t kSize = 4096;

const at::Tensor& Weight() {
  static const at::Tensor weight = at::randn({kSize, kSize});
  return weight;
}

SharedScales Scales() { return {.weight_amax = 6, .input_amax = 6}; }

void Finish(benchmark::State& state) {
  state.SetBytesProcessed(state.iterations() * kSize * kSize * static_cast<int64_t>(sizeof(float)));
}

void Encode(benchmark::State& state, const Format* format) {
  at::set_num_threads(static_cast<int>(state.range(0)));
  for (auto _ : state) {
    benchmark::DoNotOptimize(format->Encode(Weight(), Scales(), DType::kBF16));
  }
  Finish(state);
}

void Decode(benchmark::State& state, const Format* format) {
  at::set_num_threads(static_cast<int>(state.range(0)));
  const StoredTensors stored = format->Encode(Weight(), Scales(), DType::kBF16);
  for (auto _ : state) benchmark::DoNotOptimize(format->Decode(stored));
  Finish(state);
}

void QuantizeActivation(benchmark::State& state, const Format* format) {
  at::set_num_threads(static_cast<int>(state.range(0)));
  for (auto _ : state) benchmark::DoNotOptimize(format->QuantizeActivation(Weight(), Scales()));
  Finish(state);
}

void Register() {
  for (const Format* format : AllFormats()) {
    if (!format->quantizes_activations()) continue;
    const std::string name(format->name());
    for (const auto& [what, body] : {std::pair("encode", &Encode), std::pair("decode", &Decode),
                                     std::pair("quantize_activation", &QuantizeActivation)}) {
      benchmark::RegisterBenchmark((name + "/" + what).c_str(), body, format)
          ->Arg(1)
          ->Arg(2)
          ->MeasureProcessCPUTime()
          ->UseRealTime()
          ->Unit(benchmark::kMillisecond);
    }
  }
}

}  // namespace
}  // namespace prismaquant

int main(int argc, char** argv) {
  prismaquant::Register();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}

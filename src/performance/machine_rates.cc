#include "performance/machine_rates.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <torch/torch.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <functional>
#include <system_error>
#include <vector>

#include "formats/format.h"
#include "formats/torch_guard.h"
#include "io/file_system.h"
#include "kernels/gptq.h"
#include "kernels/ops.h"
#include "kernels/symmetric.h"

namespace prismaquant {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kEnoughSeconds = 0.15;  // of one measurement
constexpr int64_t kLargestOperand = 64'000'000, kFactorSize = 2048, kCodecRows = 512,
                  kCodecColumns = 4096, kBlockRows = 8192, kBlockColumns = 128;
constexpr size_t kStorageBytes = 256'000'000, kStorageChunk = 8'000'000;
constexpr double kStorageSeconds = 0.4;

double Since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Units per second of a body that does `units`; the first call is not counted.
double Rate(double units, const std::function<void()>& body) {
  body();
  const auto start = Clock::now();
  int calls = 0;
  do {
    body();
    ++calls;
  } while (Since(start) < kEnoughSeconds);
  return units * calls / Since(start);
}

double ProductRate(const ProductShape& shape, at::ScalarType type) {
  const int64_t out = std::clamp<int64_t>(kLargestOperand / shape.in, 1, shape.out);
  const at::Tensor x = at::full({shape.tokens, shape.in}, 0.01, type);
  const at::Tensor w = at::full({out, shape.in}, 0.01, type);
  return Rate(2 * static_cast<double>(shape.tokens * shape.in) * static_cast<double>(out),
              [&] { at::matmul(x, w.t()); });
}

double FactorRate() {
  constexpr auto kSize = static_cast<double>(kFactorSize);
  const at::Tensor matrix = at::eye(kFactorSize) * 2 + 1.0 / kSize;
  return Rate(kSize * kSize * kSize / 3, [&] { ops::CholeskyInPlace(matrix.clone()); });
}

void MeasureRounding(MachineRates& rates) {
  const Format& format = *FindFormat("nvfp4");
  const at::Tensor weight =
      at::linspace(-1, 1, kCodecRows * kCodecColumns).view({kCodecRows, kCodecColumns});
  const SharedScales scales{.weight_amax = 1, .input_amax = 1};
  rates.nearest = Rate(static_cast<double>(weight.numel()),
                       [&] { format.Decode(format.Encode(weight, scales, DType::kBF16)); });
  const at::Tensor source =
      at::linspace(-1, 1, kBlockRows * kBlockColumns).view({kBlockRows, kBlockColumns});
  const at::Tensor u = at::eye(kBlockColumns);
  at::Tensor block = at::empty_like(source), error = at::empty_like(source);
  at::Tensor codes = at::empty(source.sizes(), at::kByte);
  constexpr auto kGrid = ops::GptqGrid::kE2M1Group16;
  at::Tensor scale = at::empty({kBlockRows, kBlockColumns / ops::GptqGroupSize(kGrid)}, at::kByte);
  const double global_scale = ops::Nvfp4GlobalScale(1);
  rates.columns = Rate(static_cast<double>(source.numel()), [&] {
    block.copy_(source);
    ops::GptqBlock(kGrid, block, u, scale, codes, error, global_scale,
                   /*choose_scales=*/true);
  });
}

double MemoryRate() {
  const at::Tensor a = at::ones({kLargestOperand / 2}), b = at::ones_like(a);
  at::Tensor sum = at::empty_like(a);
  return Rate(3 * 4 * static_cast<double>(a.numel()), [&] { at::add_out(sum, a, b); });
}

Status Failed(const char* what, const std::filesystem::path& path) {
  return Status::System(fmt::format("{}: cannot {}: {}", path.string(), what,
                                    std::generic_category().message(errno)));
}

// A file descriptor that closes itself.
class OpenFile {
 public:
  OpenFile(const std::filesystem::path& path, int flags) : fd_(::open(path.c_str(), flags, 0600)) {}
  ~OpenFile() {
    if (fd_ >= 0) ::close(fd_);
  }
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

// Calls `step`, which moves up to a chunk and says how much, until time or bytes are enough.
Result<double> StorageRate(const std::function<ssize_t()>& step, const std::function<int()>& finish,
                           const std::filesystem::path& path) {
  const auto start = Clock::now();
  size_t bytes = 0;
  while (bytes < kStorageBytes && Since(start) < kStorageSeconds) {
    const ssize_t moved = step();
    if (moved < 0 && !(errno == ENOSPC && bytes > 0)) return Failed("measure its storage", path);
    if (moved <= 0) break;
    bytes += static_cast<size_t>(moved);
  }
  if (finish() != 0) return Failed("sync", path);
  return static_cast<double>(bytes) / std::max(Since(start), 1e-9);
}

// Of the largest file of weights, not from the page cache.
Result<double> ReadRate(const Checkpoint& source) {
  std::filesystem::path largest;
  uintmax_t size = 0;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(source.folder(), error)) {
    if (entry.path().extension() != ".safetensors" || entry.file_size(error) <= size) continue;
    largest = entry.path();
    size = entry.file_size(error);
  }
  const OpenFile file(largest, O_RDONLY);
  if (file.get() < 0) return Failed("open", largest);
  ::posix_fadvise(file.get(), 0, 0, POSIX_FADV_DONTNEED);
  std::vector<char> chunk(kStorageChunk);
  return StorageRate([&] { return ::read(file.get(), chunk.data(), chunk.size()); },
                     [] { return 0; }, largest);
}

Result<double> WriteRate(const std::filesystem::path& scratch) {
  const std::filesystem::path path = scratch / fmt::format(".prismaquant-rate-{}", ::getpid());
  const OpenFile file(path, O_WRONLY | O_CREAT | O_EXCL);
  if (file.get() < 0) return Failed("create", path);
  ::unlink(path.c_str());  // it lives as long as it is open
  const std::vector<char> chunk(kStorageChunk, 1);
  return StorageRate([&] { return ::write(file.get(), chunk.data(), chunk.size()); },
                     [&] { return ::fdatasync(file.get()); }, path);
}

}  // namespace

Json MachineRates::ToJson() const {
  return {{"product_flop", product},   {"float32_product_flop", float_product},
          {"factor_flop", factor},     {"nearest_weights", nearest},
          {"column_weights", columns}, {"memory_bytes", memory},
          {"read_bytes", read},        {"write_bytes", write}};
}

Result<MachineRates> MeasureMachine(const ProductShape& shape, at::ScalarType compute,
                                    const Checkpoint& source,
                                    const std::filesystem::path& scratch) {
  MachineRates rates;
  PQ_RETURN_IF_ERROR(GuardTorch("measuring the machine", [&]() -> Status {
    const at::NoGradGuard no_grad;
    rates.float_product = ProductRate(shape, at::kFloat);
    rates.product = compute == at::kFloat ? rates.float_product : ProductRate(shape, compute);
    rates.factor = FactorRate();
    MeasureRounding(rates);
    rates.memory = MemoryRate();
    return {};
  }));
  PQ_ASSIGN_OR_RETURN(rates.read, ReadRate(source));
  PQ_ASSIGN_OR_RETURN(rates.write, WriteRate(scratch));
  return rates;
}

}  // namespace prismaquant

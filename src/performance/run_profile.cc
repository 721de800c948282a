#include "performance/run_profile.h"

#include <ATen/record_function.h>
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <map>
#include <span>
#include <unordered_set>
#include <utility>

#include "base/progress.h"
#include "performance/operator_work.h"

namespace prismaquant {
namespace {

using Clock = std::chrono::steady_clock;

// "5" asks Linux to count the peak resident set anew.
void RestartPeak() { std::ofstream("/proc/self/clear_refs") << "5"; }

struct StorageBytes {
  int64_t read = 0, written = 0;
};

StorageBytes CountStorageBytes() {
  std::ifstream file("/proc/self/io");
  StorageBytes bytes;
  std::string key;
  int64_t value = 0;
  while (file >> key >> value) {
    if (key == "read_bytes:") bytes.read = value;
    if (key == "write_bytes:") bytes.written = value;
  }
  return bytes;
}

}  // namespace

// Reached from the callbacks, which are plain functions, through libtorch's thread-local slot for
// profilers.
class RunProfile::State : public c10::MemoryReportingInfoBase {
 public:
  // libtorch asks whoever is in that slot about allocations too.
  bool memoryProfilingEnabled() const override { return false; }
  void reportMemoryUsage(void*, int64_t, size_t, size_t, c10::Device) override {}

  // One record function that has begun.
  struct Event : at::ObserverContext {
    Event* parent = nullptr;
    bool is_stage = false;
    Clock::time_point start;
    double inner = 0;  // seconds of the events that began and ended within
    std::string name;  // of the stage, or of the kernel
    double flop = 0, bytes = 0;
    // Of a stage.
    Event* outer = nullptr;
    int64_t peak = 0;
    StorageBytes storage;
  };

  static State* Current() {
    return static_cast<State*>(c10::ThreadLocalDebugInfo::get(c10::DebugInfoKind::PROFILER_STATE));
  }

  std::unique_ptr<Event> Begin(const at::RecordFunction& function) {
    auto event = std::make_unique<Event>();
    event->parent = top_;
    event->is_stage = function.scope() == at::RecordScope::USER_SCOPE;
    if (event->is_stage) {
      event->outer = stage_;
      event->name = function.name();
      event->storage = CountStorageBytes();
      StageOf(event->name);
      TakePeak();
      stage_ = event.get();
    } else {  // the operands are there at the beginning alone
      const std::span<const c10::IValue> inputs = function.inputs();
      event->name = KernelName(function.name(), inputs);
      event->flop = OperatorFlop(function.name(), inputs);
      event->bytes = TensorBytesOf(inputs);
    }
    top_ = event.get();
    event->start = Clock::now();
    return event;
  }

  void End(const at::RecordFunction& function, Event& event) {
    const std::chrono::duration<double> taken = Clock::now() - event.start;
    top_ = event.parent;
    if (top_ != nullptr) top_->inner += taken.count();
    KernelMeasure& kernel = KernelOf(event.is_stage ? "" : event.name);
    ++kernel.calls;
    kernel.seconds += taken.count() - event.inner;
    if (event.is_stage) return EndStage(event, taken.count());
    kernel.flop += event.flop;
    kernel.bytes += event.bytes + TensorBytesOf(function.outputs());
  }

  int64_t PeakMemoryBytes() const { return std::max(peak_, prismaquant::PeakMemoryBytes()); }
  const std::vector<StageMeasure>& stages() const { return stages_; }

  std::vector<KernelMeasure> Kernels() const {
    std::vector<KernelMeasure> all;
    for (const StageMeasure& stage : stages_) {
      const auto first = static_cast<std::ptrdiff_t>(all.size());
      for (const auto& [key, kernel] : kernels_) {
        if (key.first == stage.stage) all.push_back(kernel);
      }
      std::stable_sort(all.begin() + first, all.end(),
                       [](const auto& a, const auto& b) { return a.seconds > b.seconds; });
    }
    return all;
  }

 private:
  StageMeasure& StageOf(const std::string& name) {
    const auto known = std::find_if(stages_.begin(), stages_.end(),
                                    [&](const StageMeasure& stage) { return stage.stage == name; });
    if (known != stages_.end()) return *known;
    stages_.push_back({.stage = name});
    return stages_.back();
  }

  // Within the innermost stage.
  KernelMeasure& KernelOf(const std::string& name) {
    const std::string stage = stage_ == nullptr ? "" : stage_->name;
    KernelMeasure& kernel = kernels_[{stage, name}];
    kernel.stage = stage;
    kernel.kernel = name;
    return kernel;
  }

  // Gives the peak so far to the stages it belongs to, and has it counted anew.
  void TakePeak() {
    const int64_t peak = prismaquant::PeakMemoryBytes();
    peak_ = std::max(peak_, peak);
    for (Event* stage = stage_; stage != nullptr; stage = stage->outer) {
      stage->peak = std::max(stage->peak, peak);
    }
    RestartPeak();
  }

  void EndStage(const Event& event, double seconds) {
    TakePeak();
    const StorageBytes now = CountStorageBytes();
    StageMeasure& stage = StageOf(event.name);
    stage.seconds += seconds;
    stage.peak_bytes = std::max(stage.peak_bytes, event.peak);
    stage.read_bytes += now.read - event.storage.read;
    stage.written_bytes += now.written - event.storage.written;
    stage_ = event.outer;
  }

  Event* top_ = nullptr;
  Event* stage_ = nullptr;  // the innermost that is open
  std::vector<StageMeasure> stages_;
  std::map<std::pair<std::string, std::string>, KernelMeasure> kernels_;  // by stage and name
  int64_t peak_ = 0;
};

// The callbacks, for as long as it lives.
class RunProfile::Attachment {
 public:
  Attachment(const std::shared_ptr<State>& state, Detail detail)
      : guard_(c10::DebugInfoKind::PROFILER_STATE, state) {
    const bool kernels = detail == Detail::kKernels;
    std::unordered_set<at::RecordScope, std::hash<at::RecordScope>> scopes = {
        at::RecordScope::USER_SCOPE};
    if (kernels) scopes.insert(at::RecordScope::FUNCTION);
    handle_ = at::addThreadLocalCallback(at::RecordFunctionCallback(&Begin, &End)
                                             .needsInputs(kernels)
                                             .needsOutputs(kernels)
                                             .scopes(scopes));
  }
  ~Attachment() { at::removeCallback(handle_); }
  Attachment(const Attachment&) = delete;
  Attachment& operator=(const Attachment&) = delete;

 private:
  static std::unique_ptr<at::ObserverContext> Begin(const at::RecordFunction& function) {
    State* state = State::Current();
    if (state == nullptr) return nullptr;
    return state->Begin(function);
  }

  static void End(const at::RecordFunction& function, at::ObserverContext* context) {
    State* state = State::Current();
    if (state == nullptr || context == nullptr) return;
    state->End(function, *static_cast<State::Event*>(context));
  }

  c10::DebugInfoGuard guard_;
  at::CallbackHandle handle_ = at::INVALID_CALLBACK_HANDLE;
};

RunProfile::RunProfile(Detail detail)
    : state_(std::make_shared<State>()),
      attachment_(std::make_unique<Attachment>(state_, detail)) {}

RunProfile::~RunProfile() = default;

std::vector<StageMeasure> RunProfile::Stages() const { return state_->stages(); }

std::vector<KernelMeasure> RunProfile::Kernels() const { return state_->Kernels(); }

int64_t RunProfile::PeakMemoryBytes() const { return state_->PeakMemoryBytes(); }

}  // namespace prismaquant

#ifndef PRISMAQUANT_PERFORMANCE_RUN_PROFILE_H_
#define PRISMAQUANT_PERFORMANCE_RUN_PROFILE_H_

// RunProfile: what each stage of a run took, and, on demand, each kernel of it. Observes libtorch's
// record functions on the thread that made it, until it is destroyed: a stage is a user scope
// (RECORD_USER_SCOPE, by the command or the module that does the work), a kernel an operator, of
// libtorch or one of torch.ops.prismaquant. One at a time, on the thread that runs the stages.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace prismaquant {

struct StageMeasure {
  std::string stage;
  double seconds = 0;
  int64_t peak_bytes = 0;                     // largest resident set while it ran
  int64_t read_bytes = 0, written_bytes = 0;  // that reached storage; 0 where the system tells not
};

// All calls of one operator on one dtype within one stage.
struct KernelMeasure {
  std::string stage, kernel;
  int64_t calls = 0;
  double seconds = 0;  // without the operators it called
  double flop = 0;     // multiplications and additions of matrix products and factorizations
  double bytes = 0;    // of its operands and results
};

class RunProfile {
 public:
  enum class Detail { kStages, kKernels };
  explicit RunProfile(Detail detail);
  ~RunProfile();
  RunProfile(const RunProfile&) = delete;
  RunProfile& operator=(const RunProfile&) = delete;

  // In the order in which they began. A stage that ran several times is one entry.
  std::vector<StageMeasure> Stages() const;
  // By stage, the longest first. What a stage spent outside operators is the kernel "".
  std::vector<KernelMeasure> Kernels() const;
  // Largest resident set of the process so far.
  int64_t PeakMemoryBytes() const;

 private:
  class State;
  class Attachment;
  std::shared_ptr<State> state_;
  std::unique_ptr<Attachment> attachment_;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_PERFORMANCE_RUN_PROFILE_H_

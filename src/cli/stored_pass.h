#ifndef PRISMAQUANT_CLI_STORED_PASS_H_
#define PRISMAQUANT_CLI_STORED_PASS_H_

// StoredPass: keeps in the run store where a forward pass of evaluation is, so that a run that is
// killed in it loses a minute of it. The blob holds the outputs of the last layer that was kept.
// One thread; the store must outlive it.

#include <chrono>
#include <optional>
#include <string>

#include "base/status.h"
#include "evaluate/forward.h"
#include "store/run_store.h"

namespace prismaquant {

class StoredPass : public PassKeeper {
 public:
  // `identity`: all that the pass depends on, the model and the text among them.
  StoredPass(RunStore& store, const std::string& identity);
  Result<std::optional<PassState>> Load() override;
  Status Keep(const PassState& state, bool now) override;
  // Forgets the pass, once its result is known.
  Status Drop() { return store_.RemoveBlob(blob_); }
  // Forgets all passes.
  static Status DropAll(RunStore& store);

 private:
  RunStore& store_;
  std::string blob_;
  std::chrono::steady_clock::time_point kept_;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_CLI_STORED_PASS_H_

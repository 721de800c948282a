#ifndef PRISMAQUANT_FORMATS_TORCH_GUARD_H_
#define PRISMAQUANT_FORMATS_TORCH_GUARD_H_

// GuardTorch: the seam where libtorch's exceptions become a Status. `doing` opens the message.

#include <c10/util/Exception.h>

#include <exception>
#include <new>
#include <string>

#include "base/status.h"

namespace prismaquant {

template <typename Body>
Status GuardTorch(const std::string& doing, Body body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return Status::System(doing + ": out of memory");
  } catch (const c10::Error& error) {
    const std::string text = error.what_without_backtrace();
    return Status::System(doing + ": " + text.substr(0, text.find('\n')));
  } catch (const std::exception& error) {
    return Status::System(doing + ": " + error.what());
  }
}

}  // namespace prismaquant

#endif  // PRISMAQUANT_FORMATS_TORCH_GUARD_H_

#ifndef PRISMAQUANT_BASE_INTERRUPT_H_
#define PRISMAQUANT_BASE_INTERRUPT_H_

// Interrupts: Ctrl-C (SIGINT) and SIGTERM ask a long run to stop at the end of its current unit of
// work, once that is committed; a second one ends the process at once. A signal has no other way
// into a program than global state: this is the only such state here.

#include <string>

#include "base/status.h"

namespace prismaquant {

// From now on signals ask, the first time.
void CatchInterrupts();

// kInterrupted once a signal has asked. Called between units of work. `kept_in`: the run store that
// keeps what is finished, for the message; empty if nothing does.
Status CheckInterrupted(const std::string& kept_in = "");

}  // namespace prismaquant

#endif  // PRISMAQUANT_BASE_INTERRUPT_H_

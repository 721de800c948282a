#include "base/interrupt.h"

#include <csignal>

namespace prismaquant {
namespace {

volatile std::sig_atomic_t asked = 0;

void Ask(int) { asked = 1; }

}  // namespace

void CatchInterrupts() {
  struct sigaction action = {};
  action.sa_handler = Ask;
  action.sa_flags = SA_RESTART | SA_RESETHAND;
  for (const int signal : {SIGINT, SIGTERM}) sigaction(signal, &action, nullptr);
}

Status CheckInterrupted(const std::string& kept_in) {
  if (asked == 0) return {};
  return Status::Interrupted(
      kept_in.empty() ? "interrupted"
                      : "interrupted; " + kept_in +
                            " keeps what is finished, and the same command goes on from there");
}

}  // namespace prismaquant

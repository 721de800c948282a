#include "base/interrupt.h"

#include <gtest/gtest.h>

#include <csignal>

namespace prismaquant {
namespace {

TEST(InterruptDeathTest, TheFirstSignalAsksAndTheSecondEndsTheProcess) {
  for (const int signal : {SIGINT, SIGTERM}) {
    EXPECT_EXIT(
        {
          CatchInterrupts();
          const bool before = CheckInterrupted("out.work").ok();
          std::raise(signal);
          const Status status = CheckInterrupted("out.work");
          const bool told = status.message().find("out.work") != std::string::npos;
          std::_Exit(before && told ? status.exit_code() : 1);
        },
        ::testing::ExitedWithCode(130), "");
    EXPECT_EXIT(
        {
          CatchInterrupts();
          std::raise(signal);
          std::raise(signal);
        },
        ::testing::KilledBySignal(signal), "");
  }
}

}  // namespace
}  // namespace prismaquant

#include "performance/memory.h"

#include <gtest/gtest.h>

#include <limits>

#include "io/temporary_folder.h"

namespace prismaquant {
namespace {

constexpr int64_t kUnknown = std::numeric_limits<int64_t>::max();

TEST(Memory, IsThereAndTaken) {
  EXPECT_GT(AvailableMemoryBytes(), 0);
  EXPECT_LT(AvailableMemoryBytes(), kUnknown);
  EXPECT_GT(ResidentBytes(), 1'000'000);
}

TEST(Memory, OfAControlGroupCountsItsPageCacheAsFree) {
  const TemporaryFolder group;
  EXPECT_EQ(LeftOfControlGroup(group.path()), kUnknown);
  group.Put("memory.max", "max\n");
  group.Put("memory.current", "700\n");
  EXPECT_EQ(LeftOfControlGroup(group.path()), kUnknown);
  group.Put("memory.max", "1000\n");
  EXPECT_EQ(LeftOfControlGroup(group.path()), 300);
  group.Put("memory.stat", "anon 90\nfile 610\ninactive_file 400\nactive_file 200\nslab 5\n");
  EXPECT_EQ(LeftOfControlGroup(group.path()), 900);
  group.Put("memory.current", "1200\n");
  EXPECT_EQ(LeftOfControlGroup(group.path()), 400);
}

}  // namespace
}  // namespace prismaquant

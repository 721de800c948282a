#include "performance/memory.h"

#include <malloc.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <string>

namespace prismaquant {
namespace {

constexpr int64_t kUnknown = std::numeric_limits<int64_t>::max();

// The number that a file of the system begins with; kUnknown without one ("max").
int64_t FirstNumber(const char* path) {
  std::ifstream file(path);
  int64_t value = 0;
  return file >> value ? value : kUnknown;
}

int64_t LeftOfControlGroup() {
  const int64_t limit = FirstNumber("/sys/fs/cgroup/memory.max");
  const int64_t used = FirstNumber("/sys/fs/cgroup/memory.current");
  return limit == kUnknown || used == kUnknown ? kUnknown : std::max<int64_t>(limit - used, 0);
}

}  // namespace

int64_t AvailableMemoryBytes() {
  std::ifstream file("/proc/meminfo");
  std::string key, unit;
  int64_t kilobytes = 0, available = kUnknown;
  while (file >> key >> kilobytes) {
    std::getline(file, unit);
    if (key == "MemAvailable:") available = kilobytes * 1024;
  }
  return std::min(available, LeftOfControlGroup());
}

int64_t ResidentBytes() {
  std::ifstream file("/proc/self/statm");
  int64_t all = 0, resident = 0;
  file >> all >> resident;
  return resident * ::sysconf(_SC_PAGESIZE);
}

void ReturnFreedMemory() { ::malloc_trim(0); }

}  // namespace prismaquant

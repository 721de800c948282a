#include "performance/memory.h"

#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>

namespace prismaquant {
namespace {

constexpr int64_t kUnknown = std::numeric_limits<int64_t>::max();

// The number that a file of the system begins with; kUnknown without one ("max").
int64_t FirstNumber(const std::filesystem::path& path) {
  std::ifstream file(path);
  int64_t value = 0;
  return file >> value ? value : kUnknown;
}

// What the group's page cache holds, which the system takes back when it is needed.
int64_t CachedBytes(const std::filesystem::path& group) {
  std::ifstream file(group / "memory.stat");
  std::string key;
  int64_t value = 0, cached = 0;
  while (file >> key >> value) {
    if (key == "inactive_file" || key == "active_file") cached += value;
  }
  return cached;
}

}  // namespace

int64_t LeftOfControlGroup(const std::filesystem::path& group) {
  const int64_t limit = FirstNumber(group / "memory.max");
  const int64_t used = FirstNumber(group / "memory.current");
  if (limit == kUnknown || used == kUnknown) return kUnknown;
  return std::clamp<int64_t>(limit - used + CachedBytes(group), 0, limit);
}

int64_t AvailableMemoryBytes() {
  std::ifstream file("/proc/meminfo");
  std::string key, unit;
  int64_t kilobytes = 0, available = kUnknown;
  while (file >> key >> kilobytes) {
    std::getline(file, unit);
    if (key == "MemAvailable:") available = kilobytes * 1024;
  }
  return std::min(available, LeftOfControlGroup("/sys/fs/cgroup"));
}

int64_t ResidentBytes() {
  std::ifstream file("/proc/self/statm");
  int64_t all = 0, resident = 0;
  file >> all >> resident;
  return resident * ::sysconf(_SC_PAGESIZE);
}

}  // namespace prismaquant

#ifndef PRISMAQUANT_PERFORMANCE_MEMORY_H_
#define PRISMAQUANT_PERFORMANCE_MEMORY_H_

// What the system says of memory, in bytes.

#include <cstdint>
#include <filesystem>

namespace prismaquant {

// What a process can still take without swapping: what is free or can be freed, at most what is
// left of the control group's limit. The largest number if the system does not say.
int64_t AvailableMemoryBytes();
// What the control group (version 2) of this folder leaves of its limit, its page cache counted as
// free. The largest number without a limit.
int64_t LeftOfControlGroup(const std::filesystem::path& group);
// Resident set of this process.
int64_t ResidentBytes();

}  // namespace prismaquant

#endif  // PRISMAQUANT_PERFORMANCE_MEMORY_H_

#ifndef PRISMAQUANT_PERFORMANCE_MEMORY_H_
#define PRISMAQUANT_PERFORMANCE_MEMORY_H_

// What the system says of memory, in bytes.

#include <cstdint>

namespace prismaquant {

// What a process can still take without swapping: what is free or can be freed, at most what is
// left of the control group's limit. The largest number if the system does not say.
int64_t AvailableMemoryBytes();
// Resident set of this process.
int64_t ResidentBytes();
// Gives the system back what the heap holds of freed memory.
void ReturnFreedMemory();

}  // namespace prismaquant

#endif  // PRISMAQUANT_PERFORMANCE_MEMORY_H_

#include "formats/block_pool.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <malloc.h>
#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <new>

namespace prismaquant {
namespace {

// Sizes are multiples of a huge page, so that those of similar tensors are the same.
constexpr size_t kUnit = size_t{2} << 20;
// Of a block that is used again, the largest part that may be left over: 1 / kWaste.
constexpr size_t kWaste = 8;

// From the system, not from the heap, in which blocks of all sizes would leave gaps.
void* Map(size_t bytes) {
  void* block = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (block == MAP_FAILED) throw std::bad_alloc();
  ::madvise(block, bytes, MADV_HUGEPAGE);  // where the system has them
  return block;
}

// Never destroyed: tensors of static lifetime are freed after everything else.
BlockPool& ProcessPool() {
  static BlockPool& pool = *std::make_unique<BlockPool>().release();
  return pool;
}

void Release(void* block) {
  if (!ProcessPool().GiveBack(block)) c10::free_cpu(block);
}

class PoolAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const bool large = bytes >= BlockPool::kSmallest;
    void* block = large ? ProcessPool().Take(bytes) : c10::alloc_cpu(bytes);
    return {block, block, large ? &Release : &c10::free_cpu, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &Release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

}  // namespace

void* BlockPool::Take(size_t bytes) {
  bytes = (bytes + kUnit - 1) / kUnit * kUnit;
  const std::lock_guard lock(mutex_);
  Block block = TakeFree(bytes);
  if (block.start == nullptr) {
    MakeRoom(bytes);
    block = {Map(bytes), bytes};
  }
  used_[block.start] = block.bytes;
  used_bytes_ += block.bytes;
  most_used_ = std::max(most_used_, used_bytes_);
  return block.start;
}

bool BlockPool::GiveBack(void* block) {
  const std::lock_guard lock(mutex_);
  const auto found = used_.find(block);
  if (found == used_.end()) return false;
  free_.push_back({block, found->second});
  free_bytes_ += found->second;
  used_bytes_ -= found->second;
  used_.erase(found);
  return true;
}

void BlockPool::Drop() {
  const std::lock_guard lock(mutex_);
  for (const Block& block : free_) ::munmap(block.start, block.bytes);
  free_.clear();
  free_bytes_ = 0;
  most_used_ = used_bytes_;
}

size_t BlockPool::used_bytes() const {
  const std::lock_guard lock(mutex_);
  return used_bytes_;
}

size_t BlockPool::free_bytes() const {
  const std::lock_guard lock(mutex_);
  return free_bytes_;
}

BlockPool::Block BlockPool::TakeFree(size_t bytes) {
  auto best = free_.end();
  for (auto free = free_.begin(); free != free_.end(); ++free) {
    const bool fits = free->bytes >= bytes && free->bytes - bytes <= free->bytes / kWaste;
    if (fits && (best == free_.end() || free->bytes < best->bytes)) best = free;
  }
  if (best == free_.end()) return {};
  const Block block = *best;
  free_bytes_ -= block.bytes;
  free_.erase(best);
  return block;
}

void BlockPool::MakeRoom(size_t bytes) {
  const size_t limit = std::max(most_used_, used_bytes_ + bytes);
  auto kept = free_.begin();
  for (; kept != free_.end() && used_bytes_ + free_bytes_ + bytes > limit; ++kept) {
    ::munmap(kept->start, kept->bytes);
    free_bytes_ -= kept->bytes;
  }
  free_.erase(free_.begin(), kept);
}

void UseBlockPool() {
  static PoolAllocator allocator;
  c10::SetCPUAllocator(&allocator, /*priority=*/1);
}

void ReturnFreedMemory() {
  ProcessPool().Drop();
  ::malloc_trim(0);
}

}  // namespace prismaquant

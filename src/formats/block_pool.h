#ifndef PRISMAQUANT_FORMATS_BLOCK_POOL_H_
#define PRISMAQUANT_FORMATS_BLOCK_POOL_H_

// BlockPool: the memory of large tensors, which is used again by the next ones. From the C library
// each large tensor comes as pages that the kernel has to clear first, which takes longer than most
// operators that fill it. A pool holds on to freed blocks as long as it has, together with those in
// use, no more than were once in use at the same time: so it takes no more memory than there was
// before, and less time. Thread-safe.

#include <cstddef>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace prismaquant {

class BlockPool {
 public:
  // Blocks of at least so many bytes are worth it; the C library keeps smaller ones itself.
  static constexpr size_t kSmallest = size_t{16} << 20;

  BlockPool() = default;
  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;
  ~BlockPool() { Drop(); }

  // A block of at least this many bytes, aligned to a page, with any contents. Throws
  // std::bad_alloc if there is no memory.
  void* Take(size_t bytes);
  // Back to the pool. False if the block is not of it.
  bool GiveBack(void* block);
  // Frees what is not in use, and forgets how much was in use at most.
  void Drop();

  size_t used_bytes() const;
  size_t free_bytes() const;

 private:
  struct Block {
    void* start = nullptr;
    size_t bytes = 0;
  };

  // Takes the smallest free block that holds so many bytes and wastes little; null without one.
  Block TakeFree(size_t bytes);
  // Frees those that were given back first until `bytes` more fit below what was once used.
  void MakeRoom(size_t bytes);

  mutable std::mutex mutex_;
  std::unordered_map<void*, size_t> used_;
  std::vector<Block> free_;  // in the order in which they were given back
  size_t used_bytes_ = 0, free_bytes_ = 0, most_used_ = 0;
};

// From here on libtorch's large CPU tensors come from one pool, which lives until the process ends.
// For main, before the first tensor.
void UseBlockPool();
// Gives the system back what that pool and the heap hold of freed memory: between two stages, whose
// tensors differ.
void ReturnFreedMemory();

}  // namespace prismaquant

#endif  // PRISMAQUANT_FORMATS_BLOCK_POOL_H_

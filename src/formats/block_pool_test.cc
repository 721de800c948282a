#include "formats/block_pool.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstring>
#include <thread>
#include <vector>

namespace prismaquant {
namespace {

constexpr size_t kMiB = size_t{1} << 20;

TEST(BlockPool, UsesAFreedBlockAgainIfItHardlyWastes) {
  BlockPool pool;
  void* const first = pool.Take(64 * kMiB);
  EXPECT_TRUE(pool.GiveBack(first));
  EXPECT_EQ(pool.used_bytes(), 0U);
  EXPECT_EQ(pool.free_bytes(), 64 * kMiB);
  void* const similar = pool.Take(57 * kMiB - 1);
  EXPECT_EQ(similar, first);
  EXPECT_EQ(pool.used_bytes(), 64 * kMiB);
  EXPECT_EQ(pool.free_bytes(), 0U);
  EXPECT_TRUE(pool.GiveBack(similar));
  void* const smaller = pool.Take(40 * kMiB);
  EXPECT_NE(smaller, first);
  EXPECT_TRUE(pool.GiveBack(smaller));
}

TEST(BlockPool, TakesTheBlockThatFitsBest) {
  BlockPool pool;
  void* const large = pool.Take(66 * kMiB);
  void* const exact = pool.Take(64 * kMiB);
  pool.GiveBack(exact);
  pool.GiveBack(large);
  EXPECT_EQ(pool.Take(63 * kMiB), exact);
  EXPECT_EQ(pool.Take(63 * kMiB), large);
  pool.GiveBack(exact);
  pool.GiveBack(large);
}

TEST(BlockPool, HoldsNoMoreThanWasOnceInUse) {
  BlockPool pool;
  std::vector<void*> blocks;
  for (const size_t size : {20, 30, 50}) blocks.push_back(pool.Take(size * kMiB));
  for (void* const block : blocks) pool.GiveBack(block);
  EXPECT_EQ(pool.free_bytes(), 100 * kMiB);
  // 60 do not fit besides 100: the first two, together 50, are not enough, and all three go.
  void* const next = pool.Take(60 * kMiB);
  EXPECT_EQ(pool.free_bytes(), 0U);
  // 40 do.
  void* const second = pool.Take(40 * kMiB);
  pool.GiveBack(second);
  void* const third = pool.Take(24 * kMiB);
  EXPECT_LE(pool.used_bytes() + pool.free_bytes(), 100 * kMiB);
  // More in use than ever: nothing that is free is held on to.
  void* const most = pool.Take(80 * kMiB);
  EXPECT_EQ(pool.used_bytes(), 164 * kMiB);
  EXPECT_EQ(pool.free_bytes(), 0U);
  for (void* const block : {next, third, most}) pool.GiveBack(block);
  pool.Drop();
  EXPECT_EQ(pool.free_bytes(), 0U);
}

TEST(BlockPool, KnowsItsOwnBlocks) {
  BlockPool pool;
  int other = 0;
  EXPECT_FALSE(pool.GiveBack(&other));
  void* const block = pool.Take(20 * kMiB);
  EXPECT_TRUE(pool.GiveBack(block));
  EXPECT_FALSE(pool.GiveBack(block));
}

TEST(BlockPool, ServesSeveralThreads) {
  BlockPool pool;
  std::vector<std::thread> threads;
  for (int id = 0; id < 4; ++id) {
    threads.emplace_back([&pool, id] {
      for (int round = 0; round < 50; ++round) {
        auto* const block = static_cast<char*>(pool.Take((16 + id) * kMiB));
        std::memset(block, id, 4096);
        EXPECT_EQ(block[4095], id);
        pool.GiveBack(block);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(pool.used_bytes(), 0U);
}

TEST(BlockPool, HasLibtorchsLargeTensors) {
  UseBlockPool();
  constexpr int64_t kElements = 8 << 20;
  const void* first = nullptr;
  {
    const at::Tensor ones = at::ones({kElements});
    first = ones.const_data_ptr();
  }
  const at::Tensor zeros = at::zeros({kElements});
  EXPECT_EQ(zeros.const_data_ptr(), first);
  EXPECT_EQ(zeros.abs().max().item<float>(), 0);
  at::Tensor small = at::ones({4});
  small.resize_({kElements});
  EXPECT_EQ(small[3].item<float>(), 1);
  small = at::Tensor();
  ReturnFreedMemory();
  EXPECT_EQ(zeros.sum().item<float>(), 0);
}

}  // namespace
}  // namespace prismaquant

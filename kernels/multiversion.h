#ifndef PRISMAQUANT_KERNELS_MULTIVERSION_H_
#define PRISMAQUANT_KERNELS_MULTIVERSION_H_

// How a kernel is compiled for several instruction sets.

// Compiles a function once per instruction set; the loader picks the widest that the processor has.
// GCC knows the levels of x86-64 in target_clones from release 12 on.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define PQ_MULTIVERSION \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PQ_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define PQ_MULTIVERSION
#endif
// Helpers of such a function must be inlined into it to be compiled for its instruction set.
#define PQ_INLINE inline __attribute__((always_inline))
// A loop of constant length that is to become one instruction or a few for each of its operations.
// GCC would unroll it first and make less of what it then finds.
#if defined(__GNUC__) && !defined(__clang__)
#define PQ_LANES _Pragma("GCC unroll 1") for
#else
#define PQ_LANES for
#endif

#endif  // PRISMAQUANT_KERNELS_MULTIVERSION_H_

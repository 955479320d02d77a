/* The engine for x86 processors with AVX2 and FMA. */
#if defined(__x86_64__)
#include "_engine.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define LANES 8
#define MANY_REGISTERS 0
#include "_engine_run.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
const Version sparseattn_avx2 = {"AVX2", scratch_of, run_images};
#else
typedef int sparseattn_nothing; /* a file must have something in it */
#endif

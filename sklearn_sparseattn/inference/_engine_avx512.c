/* The engine for x86 processors with AVX-512. */
#if defined(__x86_64__)
#include "_engine.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define LANES 16
#define MANY_REGISTERS 1
#include "_engine_run.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
const Version sparseattn_avx512 = {"AVX-512", scratch_of, run_images};
#else
typedef int sparseattn_nothing; /* a file must have something in it */
#endif

/* The C interface of the engine (sparseattn.h), and the engine for any processor: here the right one is chosen. */

#include <stdlib.h>

#include "_engine.h"

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "The engine reads pairs of bytes as whole numbers, the first one lowest."
#endif

#define LANES 4 /* SSE, NEON; elsewhere the compiler takes them apart */
#if defined(__aarch64__)
#define MANY_REGISTERS 1
#define NAME "NEON"
#elif defined(__x86_64__)
#define MANY_REGISTERS 0
#define NAME "SSE2"
#else
#define MANY_REGISTERS 0
#define NAME "none"
#endif
#include "_engine_run.h"

/* From setup.py. */
#ifndef SPARSEATTN_SOURCES
#define SPARSEATTN_SOURCES ""
#endif

static const Version anywhere = {NAME, scratch_of, run_images};

/* Found once, as memory is laid out for it. */
static const Version *best(void) {
    static const Version *found = NULL; /* threads that come at the same time find the same */
    if (found) return found;
    const Version *version = &anywhere;
#if defined(__x86_64__)
    const char *most = getenv("SPARSEATTN_MOST_LANES");
    int lanes = most ? atoi(most) : 16;
    __builtin_cpu_init();
    int has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (lanes >= 8 && has_avx2) version = &sparseattn_avx2;
    if (lanes >= 16 && has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        version = &sparseattn_avx512;
#endif
    return found = version;
}

/* How this thread rounds, and whether it takes numbers below 1e-38 for zero, which are slow. The engine sets both, so
   that results do not depend on it, and sets them back. */
#if defined(__x86_64__)
typedef unsigned Mode;
#define FLUSHING 0x9FC0u
static Mode get_mode(void) { return __builtin_ia32_stmxcsr(); }
static void set_mode(Mode mode) { __builtin_ia32_ldmxcsr(mode); }
#elif defined(__aarch64__)
typedef uint64_t Mode;
#define FLUSHING (1u << 24)
static Mode get_mode(void) {
    Mode mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}
static void set_mode(Mode mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
#else
typedef int Mode;
#define FLUSHING 0
static Mode get_mode(void) { return 0; }
static void set_mode(Mode mode) { (void)mode; }
#endif

int64_t sparseattn_scratch(const sparseattn_plan *plan, int32_t n_tiles, void *memory) {
    return best()->scratch(plan, n_tiles, memory);
}

void sparseattn_run(const sparseattn_plan *plan, int32_t n_tiles, const void *images, int32_t kind, int64_t n,
                    const sparseattn_results *results, void *memory) {
    void (*volatile run)(const sparseattn_plan *, int32_t, const void *, int32_t, int64_t, const sparseattn_results *,
                         void *) = best()->run; /* volatile: not inlined past set_mode */
    Mode before = get_mode();
    set_mode(FLUSHING);
    run(plan, n_tiles, images, kind, n, results, memory);
    set_mode(before);
}

void sparseattn_sizes(int64_t *plan, int64_t *results) {
    *plan = sizeof(sparseattn_plan);
    *results = sizeof(sparseattn_results);
}

const char *sparseattn_extension(void) { return best()->name; }

const char *sparseattn_sources(void) { return SPARSEATTN_SOURCES; }

/* What the parts of the engine share; not for other programs, which include sparseattn.h. */

#ifndef SPARSEATTN_ENGINE_H
#define SPARSEATTN_ENGINE_H

#include <stddef.h>
#include <time.h>

#include "sparseattn.h"

/* The engine for one vector extension. */
typedef struct {
    const char *name;
    int64_t (*scratch)(const sparseattn_plan *, int32_t, void *);
    void (*run)(const sparseattn_plan *, int32_t, const void *, int32_t, int64_t, const sparseattn_results *, void *);
} Version;

#if defined(__x86_64__)
extern __attribute__((visibility("hidden"))) const Version sparseattn_avx2, sparseattn_avx512;
#endif

static inline int32_t padded(int32_t n, int32_t step) { return (n + step - 1) / step * step; }

static inline size_t size_of(int32_t kind) {
    return kind == SPARSEATTN_UINT8 ? 1 : kind == SPARSEATTN_UINT16 ? 2 : kind == SPARSEATTN_FLOAT32 ? 4 : 8;
}

static inline double now(const sparseattn_results *results) {
    struct timespec time = {0};
    if (results->seconds) timespec_get(&time, TIME_UTC);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

#endif

/* What the parts of the engine share; not for other programs, which include sparseattn.h. */

#ifndef SPARSEATTN_ENGINE_H
#define SPARSEATTN_ENGINE_H

#include <time.h>

#include "sparseattn.h"

/* The engine for one vector extension. */
typedef struct {
    const char *name;
    int64_t (*scratch)(const sparseattn_plan *, int32_t, void *);
    void (*run)(const sparseattn_plan *, int32_t, const uint8_t *, const float *, int64_t, const sparseattn_results *,
                void *);
} Version;

#if defined(__x86_64__)
extern __attribute__((visibility("hidden"))) const Version sparseattn_avx2, sparseattn_avx512;
#endif

static inline int32_t padded(int32_t n, int32_t step) { return (n + step - 1) / step * step; }

static inline double now(const sparseattn_results *results) {
    struct timespec time = {0};
    if (results->seconds) timespec_get(&time, TIME_UTC);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

#endif

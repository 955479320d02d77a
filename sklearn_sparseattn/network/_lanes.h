/* Vectors of floats, and the one product that all compiled code here is made of. GCC's vector extension. */

#ifndef SPARSEATTN_LANES_H
#define SPARSEATTN_LANES_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 8      /* numbers in a vector */
#define MOST_SUMS 12 /* vectors that are summed at a time: they and their factors fit 16 registers */

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef double doubles __attribute__((vector_size(8 * LANES)));
typedef double near_doubles __attribute__((vector_size(8 * LANES), aligned(8), may_alias));
typedef double half_doubles __attribute__((vector_size(4 * LANES)));
typedef double near_half_doubles __attribute__((vector_size(4 * LANES), aligned(8), may_alias));
typedef int32_t whole_lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t whole_four __attribute__((vector_size(16), aligned(4), may_alias));

/* Files and digests, from setup.py: what a library was built from. Each includes this header once. */
#ifndef SPARSEATTN_SOURCES
#define SPARSEATTN_SOURCES ""
#endif
const char *sparseattn_sources(void);
const char *sparseattn_sources(void) { return SPARSEATTN_SOURCES; }

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 12")
/* A function with everything in it is compiled for several processors; the loader takes the best. */
#if !(defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__)) || defined(__clang__)
#define EACH_PROCESSOR
#define HAS_LONG_VECTORS 0
#elif __GNUC__ >= 12
#define EACH_PROCESSOR __attribute__((flatten, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define HAS_LONG_VECTORS __builtin_cpu_supports("x86-64-v4")
#else /* which does not know these names */
#define EACH_PROCESSOR __attribute__((flatten, target_clones("fma", "default")))
#define HAS_LONG_VECTORS 0
#endif

INLINE lanes load(const float *from) { return *(const lanes *)from; }
INLINE doubles load_doubles(const double *from) { return *(const near_doubles *)from; }
INLINE half_doubles load_half(const double *from) { return *(const near_half_doubles *)from; }
INLINE void store(float *to, lanes value) { *(lanes *)to = value; }
INLINE lanes rectified(lanes value) { return (lanes)((whole_lanes)value & (value > 0)); }

INLINE lanes pick(whole_lanes condition, lanes yes, lanes no) {
    return (lanes)((condition & (whole_lanes)yes) | (~condition & (whole_lanes)no));
}

INLINE float sum_of(lanes v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

/* Add to sums[c][l] inputs by weights, for n_columns cells and n_lanes vectors of outputs. Of the `size` inputs of
   cell c, side by side, the first is at `input + apart[c]`. */
INLINE void add_products(const float *input, const size_t *apart, int32_t channels, int32_t size, int32_t n_inputs,
                         const float *weight, int32_t n_outputs, int n_columns, int n_lanes, lanes *sums) {
    for (int32_t j = 0; j < size; j++) {
        const float *cell = input + j * channels;
        for (int32_t n = 0; n < n_inputs; n++, weight += n_outputs)
            UNROLL for (int c = 0; c < n_columns; c++)
                UNROLL for (int l = 0; l < n_lanes; l++)
                    sums[c * n_lanes + l] += cell[apart[c] + n] * load(weight + l * LANES);
    }
}

/* sums[c][l] = bias[l] + sum of inputs by weights, of `size` x `size` inputs of each cell. Their rows are summed by
   themselves: in one long sum, ever larger numbers would be rounded. */
INLINE void multiply(const float *input, const size_t *apart, size_t pitch, int32_t channels, int32_t size,
                     int32_t n_inputs, const float *weight, int32_t n_outputs, const float *bias, int n_columns,
                     int n_lanes, lanes *sums) {
    UNROLL for (int c = 0; c < n_columns; c++)
        UNROLL for (int l = 0; l < n_lanes; l++) sums[c * n_lanes + l] = load(bias + l * LANES);
    if (size == 1) {
        add_products(input, apart, channels, 1, n_inputs, weight, n_outputs, n_columns, n_lanes, sums);
        return;
    }
    for (int32_t i = 0; i < size; i++, weight += (size_t)size * n_inputs * n_outputs) {
        lanes row[MOST_SUMS];
        UNROLL for (int s = 0; s < n_columns * n_lanes; s++) row[s] = (lanes){0};
        add_products(input + i * pitch, apart, channels, size, n_inputs, weight, n_outputs, n_columns, n_lanes, row);
        UNROLL for (int s = 0; s < n_columns * n_lanes; s++) sums[s] += row[s];
    }
}

/* Memory is cut from one piece; with NULL for it, only the bytes are counted. */
INLINE void *take(size_t *used, char *memory, size_t bytes) {
    size_t start = *used;
    *used += (bytes + 63) / 64 * 64;
    return memory ? memory + start : NULL;
}

INLINE float *take_floats(size_t *used, char *memory, size_t n) { return take(used, memory, n * sizeof(float)); }

#endif

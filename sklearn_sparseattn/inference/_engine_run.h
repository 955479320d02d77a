/* The network, run on one image after another, for vectors of LANES floats: included once for each vector extension.

   Maps are (rows, columns, channels), framed by zeros: one cell, and on the right as many as a block of columns reads
   beyond. Of the image, framed by zeros too, only as many rows are there at a time as a convolution needs: they stay in
   the nearest cache. Each lies apart by channel and by phase (with a stride of 2: even and odd columns), so that the
   inputs of neighbouring cells are neighbours in memory. */

#include <math.h>
#include <stddef.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "_engine.h"

#define INLINE static inline __attribute__((always_inline))
#define STAGE static __attribute__((noinline)) /* its loops get the registers for themselves */
#define UNROLL _Pragma("GCC unroll 24")

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float half_lanes __attribute__((vector_size(2 * LANES), aligned(4), may_alias));
typedef int32_t whole_lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int64_t pair_lanes __attribute__((vector_size(4 * LANES)));
typedef uint8_t byte_lanes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint16_t word_lanes __attribute__((vector_size(2 * LANES), aligned(1), may_alias));
typedef double double_lanes __attribute__((vector_size(4 * LANES), aligned(1), may_alias)); /* half as many */
typedef float single_lanes __attribute__((vector_size(2 * LANES), aligned(1), may_alias));
typedef uint16_t short_lanes __attribute__((vector_size(LANES), aligned(1), may_alias));

#if MANY_REGISTERS /* 32 vectors, else 16 */
#define CELLS 8    /* tokens at a time, by two vectors of outputs */
#define COLUMNS 17 /* cells of a map at a time, by one vector of outputs */
#else
#define CELLS 6
#define COLUMNS 12
#endif
#define HALF_COLUMNS (COLUMNS * 1 / 2)
#define STEPS 4
#define ROWS 8 /* of the image that are there at a time, >= the largest kernel plus its stride less 1 */
#define RUN 64 /* tokens that are summed before their sum is added to that of all */

/* ---- vectors ---- */

INLINE lanes load(const float *from) { return *(const lanes *)from; }
INLINE void store(float *to, lanes value) { *(lanes *)to = value; }
INLINE lanes all(float value) { return (lanes){0} + value; }

INLINE lanes pick(whole_lanes condition, lanes yes, lanes no) {
    return (lanes)((condition & (whole_lanes)yes) | (~condition & (whole_lanes)no));
}

INLINE int any(whole_lanes condition) {
#if LANES == 16
    return _mm512_test_epi32_mask((__m512i)condition, (__m512i)condition) != 0;
#else
    union { whole_lanes lanes; int64_t pairs[LANES / 2]; } is = {condition};
    int64_t found = 0;
    UNROLL for (int i = 0; i < LANES / 2; i++) found |= is.pairs[i];
    return found != 0;
#endif
}

/* The greater one; b, if one of them is not a number. */
INLINE lanes greater(lanes a, lanes b) {
#if LANES == 16
    return (lanes)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (lanes)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
    return (lanes)_mm_max_ps((__m128)a, (__m128)b);
#else
    return pick(a > b, a, b);
#endif
}

/* What is not a number stays so: it must reach the answer. */
INLINE lanes rectified(lanes value) { return greater((lanes){0}, value); }

/* from[0], from[1], from[0], ... */
INLINE lanes load_pair(const float *from) {
    int64_t pair;
    memcpy(&pair, from, sizeof pair);
    return (lanes)((pair_lanes){0} + pair);
}

#if LANES == 16
#define EACH_LANE(f, n) f(0, n), f(1, n), f(2, n), f(3, n), f(4, n), f(5, n), f(6, n), f(7, n), \
                        f(8, n), f(9, n), f(10, n), f(11, n), f(12, n), f(13, n), f(14, n), f(15, n)
#elif LANES == 8
#define EACH_LANE(f, n) f(0, n), f(1, n), f(2, n), f(3, n), f(4, n), f(5, n), f(6, n), f(7, n)
#else
#define EACH_LANE(f, n) f(0, n), f(1, n), f(2, n), f(3, n)
#endif

/* Every other lane, first the even ones. */
#define EVEN_FIRST(l, n) (l) % (LANES / 2) * 2 + (l) / (LANES / 2)
INLINE lanes even_first(lanes v) { return __builtin_shufflevector(v, v, EACH_LANE(EVEN_FIRST, 0)); }

/* Lane l of the result is the sum of the lanes of v[l]. */
#define OWN(l, n) ((l) & (n) ? LANES + (l) : (l))
#define OTHER(l, n) ((l) & (n) ? LANES + ((l) ^ (n)) : ((l) ^ (n)))
#define FOLD(n) \
    UNROLL for (int i = 0; i < n; i++) \
        v[i] = __builtin_shufflevector(v[i], v[i + n], EACH_LANE(OWN, n)) + \
               __builtin_shufflevector(v[i], v[i + n], EACH_LANE(OTHER, n))
INLINE lanes sums_of(lanes *v) {
#if LANES >= 16
    FOLD(8);
#endif
#if LANES >= 8
    FOLD(4);
#endif
    FOLD(2);
    FOLD(1);
    return v[0];
}

INLINE lanes sigmoid(lanes x) {
    x = -pick(x < -80, all(-80), pick(x > 80, all(80), x)); /* NaN stays */
    /* exp(x) = 2^n exp(r), |r| <= ln 2 / 2, the latter by its series. */
    whole_lanes n = __builtin_convertvector(x * 1.44269504f + pick(x < 0, all(-0.5f), all(0.5f)), whole_lanes);
    lanes whole = __builtin_convertvector(n, lanes), r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    lanes series = r * (1.0f / 5040) + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = (series * r + 1.0f) * r + 1.0f;
    return 1.0f / (1.0f + series * (lanes)((n + 127) << 23));
}

/* Add to sums[c][l] the products of n_inputs of each cell by weights; returns where further weights follow. */
INLINE const float *add_products(const float *const *cells, int32_t n_inputs, const float *weight, size_t n_outputs,
                                 int n_cells, int n_lanes, lanes *sums) {
    int32_t n = 0;
    for (; n + STEPS <= n_inputs; n += STEPS, weight += STEPS * n_outputs)
        UNROLL for (int i = 0; i < STEPS; i++)
            UNROLL for (int c = 0; c < n_cells; c++)
                UNROLL for (int l = 0; l < n_lanes; l++)
                    sums[c * n_lanes + l] += cells[c][n + i] * load(weight + i * n_outputs + l * LANES);
    for (; n < n_inputs; n++, weight += n_outputs)
        UNROLL for (int c = 0; c < n_cells; c++)
            UNROLL for (int l = 0; l < n_lanes; l++)
                sums[c * n_lanes + l] += cells[c][n] * load(weight + l * LANES);
    return weight;
}

/* ---- memory ---- */

typedef struct {
    int32_t rows, columns, channels;
    size_t pitch;        /* floats from a row to the next */
    float *frame, *cell; /* the corner of the frame, and the first cell inside */
} Map;

typedef struct {
    size_t plane, pitch; /* floats of a phase of a row of a channel; of a row of all channels */
    float *image, *values; /* ROWS framed rows; a row as it is given */
    int32_t *offsets;      /* of the first convolution's inputs within a row */
    const float **taps;    /* these inputs for the first cell of a row */
    Map early, middle;
    float *scores;
    int32_t *keys, *chosen_keys;              /* scores in their order as whole numbers */
    int32_t *slots;                           /* of the framed tiles: 1 + place among the tokens; 0 */
    int32_t *tiles, *sources, *targets;       /* raster index of each token; pairs of neighbours */
    int32_t ends[8];                          /* where the pairs of each direction end */
    float *gates, *places, *tokens, *more, *weights, *head;
    size_t token, key; /* floats of a token, of its key */
} Scratch;

/* Memory is cut from one piece; with NULL for it, only the bytes are counted. */
INLINE void *take(size_t *used, char *memory, size_t n, size_t size) {
    size_t start = *used;
    *used += (n * size + 63) / 64 * 64;
    return memory ? memory + start : NULL;
}

INLINE void take_map(size_t *used, char *memory, Map *map, int32_t rows, int32_t columns, int32_t channels) {
    size_t pitch = (size_t)padded((columns + 2 + 2 * COLUMNS) * channels, 16), lead = padded(channels, 16);
    size_t spare = (size_t)LANES * channels; /* the frame is read as far as this beyond its last row */
    float *start = take(used, memory, lead + (rows + 2) * pitch + spare, sizeof(float));
    *map = (Map){rows, columns, channels, pitch, NULL, NULL};
    if (!memory) return;
    map->cell = start + pitch + lead; /* aligned like the memory */
    map->frame = map->cell - pitch - channels;
}

static size_t lay_out(const sparseattn_plan *plan, int32_t n_tiles, Scratch *s, char *memory) {
    size_t used = 0, n = n_tiles + 2 * CELLS;
    int32_t size = plan->kernel_size, stride = plan->stride_early, second = plan->stride_middle;
    int32_t rows = (plan->height - 1) / stride + 1, columns = (plan->width - 1) / stride + 1;
    /* First what is zero at first, and of the same size for any n_tiles. */
    s->plane = columns + size + 2 * COLUMNS + 2 * LANES;
    s->pitch = s->plane * stride * plan->n_channels;
    s->image = take(&used, memory, ROWS * s->pitch, sizeof(float));
    take_map(&used, memory, &s->early, rows, columns, padded(plan->n_early, 8));
    take_map(&used, memory, &s->middle, (rows - 1) / second + 1, (columns - 1) / second + 1, padded(plan->n_middle, 16));
    rows = s->middle.rows, columns = s->middle.columns;
    size_t n_all = (size_t)rows * columns;
    s->slots = take(&used, memory, (size_t)(rows + 2) * (columns + 2), sizeof(int32_t));
    s->head = take(&used, memory, 4 * padded(plan->embed_dim, 32) + 2 * padded(plan->n_middle, 16) +
                   3 * padded(plan->hidden_dim, 32) + padded(plan->n_classes, 32) + 4 * LANES, sizeof(float));
    s->taps = take(&used, memory, size * size * plan->n_channels, sizeof(float *));
    s->offsets = take(&used, memory, size * plan->n_channels, sizeof(int32_t));
    s->values = take(&used, memory, (size_t)plan->width * plan->n_channels + 4 * LANES, sizeof(float));
    s->scores = take(&used, memory, n_all + LANES, sizeof(float));
    s->keys = take(&used, memory, n_all + LANES, sizeof(int32_t));
    s->token = padded(plan->embed_dim, 32), s->key = padded(plan->n_keys, 32);
    s->tiles = take(&used, memory, n + LANES, sizeof(int32_t));
    s->chosen_keys = take(&used, memory, n + LANES, sizeof(int32_t));
    s->sources = take(&used, memory, 8 * n, sizeof(int32_t));
    s->targets = take(&used, memory, 8 * n, sizeof(int32_t));
    s->gates = take(&used, memory, n + LANES, sizeof(float));
    s->places = take(&used, memory, 2 * n, sizeof(float));
    s->weights = take(&used, memory, n + LANES, sizeof(float));
    s->tokens = take(&used, memory, n * s->token, sizeof(float));
    size_t longer = s->token > s->key ? s->token : s->key; /* sums of a layer, later keys */
    s->more = take(&used, memory, (n + LANES) * longer, sizeof(float));
    return used;
}

static int64_t scratch_of(const sparseattn_plan *plan, int32_t n_tiles, void *memory) {
    Scratch s;
    size_t size = lay_out(plan, n_tiles, &s, NULL);
    if (memory) {
        lay_out(plan, n_tiles, &s, memory);
        memset(memory, 0, size);
    }
    return size;
}

/* ---- the image ---- */

typedef struct { lanes low, span, inverse, background; } Scale;

INLINE Scale scale_of(const sparseattn_plan *plan) {
    return (Scale){all(plan->low), all(plan->span), all(1 / plan->span), all(plan->background)};
}

/* As PixelScale and the table: the quotient is the nearest float, found without the slow division. */
INLINE lanes scaled(const Scale *scale, lanes value) {
    lanes difference = value - scale->low, quotient = difference * scale->inverse;
    quotient += (difference - quotient * scale->span) * scale->inverse;
    return quotient - scale->background;
}

/* Whether that gives the bits of the table. */
static int is_exact(const sparseattn_plan *plan) {
    float values[256];
    Scale scale = scale_of(plan);
    for (int i = 0; i < 256; i++) values[i] = i;
    for (int i = 0; i < 256; i += LANES) store(values + i, scaled(&scale, load(values + i)));
    return memcmp(values, plan->bytes, sizeof values) == 0;
}

/* A row of one channel of bytes, with a stride of 2: even columns, then odd ones. */
INLINE void put_bytes(const sparseattn_plan *plan, const Scratch *s, const uint8_t *bytes, const uint8_t *end,
                      float *row) {
    Scale scale = scale_of(plan);
    int32_t border = plan->kernel_size / 2, width = plan->width;
    float *even = row + border % 2 * s->plane + border / 2, *odd = row + (border + 1) % 2 * s->plane + (border + 1) / 2;
    for (int32_t j = 0; j < width; j += 2 * LANES) {
        word_lanes words = {0};
        if (bytes + j + 2 * LANES <= end) words = *(const word_lanes *)(bytes + j); /* may go on into the next row */
        else memcpy(&words, bytes + j, width - j);
        whole_lanes whole = __builtin_convertvector(words, whole_lanes);
        store(even + j / 2, scaled(&scale, __builtin_convertvector(whole & 255, lanes)));
        store(odd + j / 2, scaled(&scale, __builtin_convertvector(whole >> 8, lanes)));
    }
    store(even + (width + 1) / 2, (lanes){0}); /* what was written beyond the row */
    store(odd + width / 2, (lanes){0});
}

/* Half a vector as PixelScale makes it: the quotient in double precision, clipped, rounded. NaN stays. */
INLINE single_lanes exactly_scaled(const sparseattn_plan *plan, double_lanes value) {
    double span = plan->exact_span, inverse = 1 / span;
    double_lanes none = {0}, least = none + plan->least * span, most = none + plan->most * span;
    double_lanes difference = value - plan->exact_low;
    pair_lanes below = difference < least, above = difference > most;
    difference = (double_lanes)((below & (pair_lanes)least) | (above & (pair_lanes)most) |
                                (~(below | above) & (pair_lanes)difference));
    double_lanes quotient = difference * inverse;
    quotient += (difference - quotient * span) * inverse;
    return __builtin_convertvector(quotient, single_lanes) - plan->background;
}

/* n values of a row of any kind but bytes that are exact -> s->values. */
INLINE void scale_row(const sparseattn_plan *plan, const Scratch *s, const void *row, int32_t kind, int32_t n) {
#define SCALE(type, vector) \
    for (int32_t j = 0; j < n; j += LANES / 2) { \
        vector some = {0}; \
        const type *from = (const type *)row + j; \
        if (j + LANES / 2 <= n) some = *(const vector *)from; \
        else memcpy(&some, from, (n - j) * sizeof(type)); \
        *(single_lanes *)(s->values + j) = exactly_scaled(plan, __builtin_convertvector(some, double_lanes)); \
    } \
    break
    switch (kind) {
        case SPARSEATTN_UINT16: SCALE(uint16_t, short_lanes);
        case SPARSEATTN_FLOAT32: SCALE(float, single_lanes);
        case SPARSEATTN_FLOAT64: SCALE(double, double_lanes);
        default: for (int32_t j = 0; j < n; j++) s->values[j] = plan->bytes[((const uint8_t *)row)[j]];
    }
#undef SCALE
}

/* s->values, a row of one channel with a stride of 2, as `put_bytes`. */
INLINE void put_values(const sparseattn_plan *plan, const Scratch *s, float *row) {
    int32_t border = plan->kernel_size / 2, width = plan->width;
    float *even = row + border % 2 * s->plane + border / 2, *odd = row + (border + 1) % 2 * s->plane + (border + 1) / 2;
    for (int32_t j = 0; j < width; j += LANES) {
        union { lanes whole; half_lanes halves[2]; } parts = {even_first(load(s->values + j))};
        *(half_lanes *)(even + j / 2) = parts.halves[0];
        *(half_lanes *)(odd + j / 2) = parts.halves[1];
    }
    store(even + (width + 1) / 2, (lanes){0}); /* what was written beyond the row */
    store(odd + width / 2, (lanes){0});
}

INLINE float *image_row(const Scratch *s, int32_t i) { return s->image + ((i + ROWS) & (ROWS - 1)) * s->pitch; }

/* Row i of an image, which may lie beyond. */
STAGE void read_row(const sparseattn_plan *plan, const Scratch *s, const char *image, int32_t kind, int32_t i,
                    int exact) {
    int32_t width = plan->width, channels = plan->n_channels, stride = plan->stride_early;
    int32_t border = plan->kernel_size / 2, n = width * channels;
    float *row = image_row(s, i);
    if (i < 0 || i >= plan->height) {
        memset(row, 0, s->pitch * sizeof(float));
        return;
    }
    size_t size = size_of(kind) * n;
    const char *end = image + size * plan->height;
    image += size * i;
    if (exact && channels == 1 && stride == 2) {
        put_bytes(plan, s, (const uint8_t *)image, (const uint8_t *)end, row);
        return;
    }
    if (exact) {
        const uint8_t *bytes = (const uint8_t *)image;
        int32_t j = 0;
        Scale scale = scale_of(plan);
        for (; j + LANES <= n; j += LANES)
            store(s->values + j, scaled(&scale, __builtin_convertvector(*(const byte_lanes *)(bytes + j), lanes)));
        for (; j < n; j++) s->values[j] = plan->bytes[bytes[j]];
    } else
        scale_row(plan, s, image, kind, n);
    if (channels == 1 && stride == 2) {
        put_values(plan, s, row);
        return;
    }
    for (int32_t c = 0; c < channels; c++) {
        const float *from = s->values + c;
        for (int32_t first = 0; first < stride; first++, from += channels) {
            float *to = row + (c * stride + (border + first) % stride) * s->plane + (border + first) / stride;
            for (int32_t j = 0; j < (width - first + stride - 1) / stride; j++)
                to[j] = from[(size_t)j * stride * channels];
        }
    }
}

/* ---- coarse network ---- */

/* The first convolution of n_pairs of neighbouring cells, of two vectors of outputs or one: each output is there
   twice in succession, for the two cells. */
INLINE void convolve_pairs(const sparseattn_plan *plan, const Scratch *s, int32_t column, float *to, int32_t first,
                           int n_pairs, int n_lanes) {
    lanes sums[24];
    int32_t n_taps = plan->kernel_size * plan->kernel_size * plan->n_channels, channels = s->early.channels;
    const float *weight = plan->early + 2 * first;
    UNROLL for (int l = 0; l < n_lanes; l++)
        UNROLL for (int p = 0; p < n_pairs; p++) sums[p * n_lanes + l] = load(plan->early_bias + 2 * first + l * LANES);
    for (int32_t t = 0; t < n_taps; t++, weight += 2 * channels) {
        const float *from = s->taps[t] + column;
        __asm__("" : "+r"(from)); /* else GCC keeps a sum for each pair in a register of its own, of which there are few */
        UNROLL for (int p = 0; p < n_pairs; p++) {
            lanes pair = load_pair(from + 2 * p);
            UNROLL for (int l = 0; l < n_lanes; l++) sums[p * n_lanes + l] += pair * load(weight + l * LANES);
        }
    }
    UNROLL for (int p = 0; p < n_pairs; p++)
        UNROLL for (int l = 0; l < n_lanes; l++) {
            union { lanes both; half_lanes each[2]; } cells = {even_first(rectified(sums[p * n_lanes + l]))};
            float *cell = to + 2 * p * channels + first + l * (LANES / 2);
            if (2 * channels == LANES) store(cell, cells.both);
            else {
                *(half_lanes *)cell = cells.each[0];
                *(half_lanes *)(cell + channels) = cells.each[1];
            }
        }
}

STAGE void make_early_row(const sparseattn_plan *plan, const Scratch *s, int32_t i) {
    const Map *map = &s->early;
    float *row = map->cell + i * map->pitch;
    int32_t j = 0, size = plan->kernel_size, n = size * plan->n_channels;
    for (int y = 0; y < size; y++) {
        const float *image = image_row(s, i * plan->stride_early - size / 2 + y);
        for (int32_t t = 0; t < n; t++) s->taps[y * n + t] = image + s->offsets[t];
    }
    for (int32_t first = 0; first < map->channels; first += LANES) { /* two vectors of pairs */
        int is_one = first + LANES / 2 >= map->channels;
        for (j = 0; j < map->columns;) {
            int32_t left = (map->columns - j + 1) / 2;
            float *to = row + (size_t)j * map->channels;
            if (is_one && left > HALF_COLUMNS)
                convolve_pairs(plan, s, j, to, first, COLUMNS, 1), j += 2 * COLUMNS;
            else if (is_one && left > 4)
                convolve_pairs(plan, s, j, to, first, HALF_COLUMNS, 1), j += 2 * HALF_COLUMNS;
            else if (is_one)
                convolve_pairs(plan, s, j, to, first, 4, 1), j += 8;
            else if (left > COLUMNS / 4)
                convolve_pairs(plan, s, j, to, first, HALF_COLUMNS, 2), j += 2 * HALF_COLUMNS;
            else
                convolve_pairs(plan, s, j, to, first, COLUMNS / 4, 2), j += 2 * (COLUMNS / 4);
        }
    }
    /* What was written beyond the row. */
    memset(row + (size_t)map->columns * map->channels, 0, (size_t)(j - map->columns) * map->channels * sizeof(float));
}

/* The second convolution of n_columns cells, with their sum and their maximum; `apart` is from the inputs of a
   cell to those of the next. */
INLINE void convolve_columns(const sparseattn_plan *plan, const Scratch *s, const float *from, size_t apart, float *to,
                             int32_t left, int32_t first, int n_columns, int n_lanes, lanes *sum, lanes *most) {
    lanes sums[24];
    const Map *map = &s->middle;
    const float *weight = plan->middle + first;
    UNROLL for (int c = 0; c < n_columns; c++)
        UNROLL for (int l = 0; l < n_lanes; l++) sums[c * n_lanes + l] = load(plan->middle_bias + first + l * LANES);
    for (int i = 0; i < 3; i++, from += s->early.pitch)
        for (const float *cell = from, *end = from + 3 * s->early.channels; cell < end; cell++) {
            UNROLL for (int c = 0; c < n_columns; c++)
                UNROLL for (int l = 0; l < n_lanes; l++)
                    sums[c * n_lanes + l] += cell[c * apart] * load(weight + l * LANES);
            weight += map->channels;
        }
    lanes total[2] = {{0}, {0}};
    UNROLL for (int c = 0; c < n_columns; c++)
        UNROLL for (int l = 0; l < n_lanes; l++)
            if (c < left) {
                lanes value = rectified(sums[c * n_lanes + l]);
                store(to + first + (size_t)c * map->channels + l * LANES, value);
                total[l] += value;
                most[l] = greater(value, most[l]);
            }
    UNROLL for (int l = 0; l < n_lanes; l++) sum[l] += total[l];
}

/* A row of the middle map. Its channels' sums are added to `sums`, (channels), and `most` is their maximum so far. */
INLINE void make_middle_row(const sparseattn_plan *plan, const Scratch *s, int32_t i, size_t apart, float *sums,
                            float *most) {
    const Map *map = &s->middle;
    float *to = map->cell + i * map->pitch;
    for (int32_t first = 0; first < map->channels; first += 2 * LANES) {
        int n_lanes = first + LANES < map->channels ? 2 : 1;
        lanes sum[2] = {{0}, {0}}, greatest[2] = {{0}, {0}};
        for (int l = 0; l < n_lanes; l++) greatest[l] = load(most + first + l * LANES);
        for (int32_t j = 0; j < map->columns;) {
            int32_t left = map->columns - j;
            const float *from = s->early.frame + (size_t)i * plan->stride_middle * s->early.pitch + j * apart;
            float *cell = to + (size_t)j * map->channels;
#define COLUMNS_AT_A_TIME(n, n_lanes) \
    convolve_columns(plan, s, from, apart, cell, left, first, n, n_lanes, sum, greatest), j += n
            if (n_lanes == 1 && left > HALF_COLUMNS) COLUMNS_AT_A_TIME(COLUMNS, 1);
            else if (n_lanes == 1 && left > 4) COLUMNS_AT_A_TIME(HALF_COLUMNS, 1);
            else if (n_lanes == 1) COLUMNS_AT_A_TIME(4, 1);
            else if (left > COLUMNS / 4) COLUMNS_AT_A_TIME(HALF_COLUMNS, 2);
            else COLUMNS_AT_A_TIME(COLUMNS / 4, 2);
        }
        for (int l = 0; l < n_lanes; l++) {
            store(sums + first + l * LANES, load(sums + first + l * LANES) + sum[l]);
            store(most + first + l * LANES, greatest[l]);
        }
    }
}

/* With what is known to the compiler. */
STAGE void make_middle_row_16(const sparseattn_plan *plan, const Scratch *s, int32_t i, float *sums, float *most) {
    make_middle_row(plan, s, i, 16, sums, most);
}

STAGE void make_middle_row_32(const sparseattn_plan *plan, const Scratch *s, int32_t i, float *sums, float *most) {
    make_middle_row(plan, s, i, 32, sums, most);
}

STAGE void make_other_middle_row(const sparseattn_plan *plan, const Scratch *s, int32_t i, size_t apart, float *sums,
                                 float *most) {
    make_middle_row(plan, s, i, apart, sums, most);
}

/* Scores of a row; returns 1 in the lanes that are too large. What is written beyond the row, the next writes over. */
STAGE whole_lanes score_row(const sparseattn_plan *plan, const Scratch *s, int32_t i) {
    const Map *map = &s->middle;
    whole_lanes failed = {0};
    for (int32_t j = 0; j < map->columns; j += LANES) {
        const float *cell = map->cell + i * map->pitch + (size_t)j * map->channels;
        lanes products[LANES];
        UNROLL for (int c = 0; c < LANES; c++, cell += map->channels) {
            products[c] = load(cell) * load(plan->score);
            for (int32_t l = LANES; l < map->channels; l += LANES) products[c] += load(cell + l) * load(plan->score + l);
        }
        lanes score = sums_of(products) + plan->score[map->channels] + 0.0f; /* never -0 */
        store(s->scores + (size_t)i * map->columns + j, score);
        failed |= ~((score < 1e37f) & (score > -1e37f));
    }
    return failed;
}

/* Both maps, the pooled features and the scores; 1 if these are not finite. */
INLINE int look(const sparseattn_plan *plan, const Scratch *s, const char *image, int32_t kind, int exact,
                float *pooled) {
    const Map *early = &s->early, *middle = &s->middle;
    int32_t border = plan->kernel_size / 2, n_read = -border, n_early = 0;
    float sums[middle->channels], most[middle->channels];
    memset(sums, 0, sizeof sums);
    memset(most, 0, sizeof most);
    whole_lanes failed = {0};
    for (int32_t i = 0; i < middle->rows; i++) {
        for (; n_early < early->rows && n_early <= i * plan->stride_middle + 1; n_early++) {
            for (; n_read <= n_early * plan->stride_early + border; n_read++)
                read_row(plan, s, image, kind, n_read, exact);
            make_early_row(plan, s, n_early);
        }
        size_t apart = (size_t)plan->stride_middle * early->channels;
        if (apart == 16) make_middle_row_16(plan, s, i, sums, most);
        else if (apart == 32) make_middle_row_32(plan, s, i, sums, most);
        else make_other_middle_row(plan, s, i, apart, sums, most);
        failed |= score_row(plan, s, i);
    }
    for (int32_t c = 0; c < plan->n_middle; c++) {
        pooled[c] = sums[c] / ((float)middle->rows * middle->columns);
        pooled[plan->n_middle + c] = most[c];
    }
    return any(failed);
}

/* ---- selection ---- */

INLINE int32_t n_from(const int32_t *keys, int32_t n, int32_t least) {
    whole_lanes count = {0};
    int32_t total = 0;
    for (int32_t i = 0; i < n; i += LANES) count -= *(const whole_lanes *)(keys + i) >= least;
    for (int l = 0; l < LANES; l++) total += count[l];
    return total;
}

/* The highest of n keys that are <= most. Keys are filled up to whole vectors by INT32_MIN, which none has. */
INLINE int32_t highest_to(const int32_t *keys, int32_t n, int32_t most) {
    whole_lanes best = (whole_lanes){0} + INT32_MIN;
    for (int32_t i = 0; i < n; i += LANES) {
        whole_lanes key = *(const whole_lanes *)(keys + i), better = (key > best) & (key <= most);
        best = (better & key) | (~better & best);
    }
    int32_t result = best[0];
    for (int l = 1; l < LANES; l++) result = best[l] > result ? best[l] : result;
    return result;
}

INLINE int32_t lowest(const int32_t *keys, int32_t n, int32_t least) {
    whole_lanes best = (whole_lanes){0} + INT32_MAX;
    for (int32_t i = 0; i < n; i += LANES) {
        whole_lanes key = *(const whole_lanes *)(keys + i), better = (key < best) & (key >= least);
        best = (better & key) | (~better & best);
    }
    int32_t result = best[0];
    for (int l = 1; l < LANES; l++) result = best[l] < result ? best[l] : result;
    return result;
}

/* The rank-th highest of n keys, by halving the range that it lies in. */
INLINE int32_t highest(const int32_t *keys, int32_t n, int32_t rank) {
    int64_t low = lowest(keys, n, INT32_MIN + 1), high = highest_to(keys, n, INT32_MAX);
    while (low < high) { /* at least `rank` are >= low, fewer are > high */
        int64_t middle = low + (high - low + 1) / 2;
        int32_t count = n_from(keys, n, middle);
        if (count == rank) return lowest(keys, n, middle);
        if (count > rank) low = middle;
        else high = middle - 1;
    }
    return low;
}

INLINE float score_of(int32_t key) {
    int32_t bits = key ^ (key >> 31 & INT32_MAX);
    float score;
    memcpy(&score, &bits, sizeof score);
    return score;
}

/* Scores to keys, filled up to whole vectors. */
INLINE void make_keys(const float *scores, int32_t n, int32_t *keys) {
    for (int32_t i = 0; i < n; i += LANES) {
        whole_lanes bits = (whole_lanes)load(scores + i);
        *(whole_lanes *)(keys + i) = bits ^ (bits >> 31 & INT32_MAX);
    }
    *(whole_lanes *)(keys + n) = (whole_lanes){0} + INT32_MIN;
}

/* The tiles of the n highest scores, ascending, of equal ones the first; and their gates. */
STAGE void choose(const Scratch *s, int32_t n) {
    int32_t n_all = s->middle.rows * s->middle.columns, *tiles = s->tiles, found = 0;
    float best_left = 0, width = 0;
    if (n == n_all)
        for (int32_t i = 0; i < n; i++) tiles[i] = i;
    else {
        make_keys(s->scores, n_all, s->keys);
        int32_t threshold = highest(s->keys, n_all, n);
        int32_t equal = n - n_from(s->keys, n_all, threshold + 1);
        int32_t left_equal = n_from(s->keys, n_all, threshold) - n; /* of those that equal it, left out */
        for (int32_t first = 0; first < n_all; first += LANES) {
            if (!any(*(const whole_lanes *)(s->keys + first) >= threshold)) continue;
            for (int32_t i = first; i < first + LANES; i++) {
                int32_t is_equal = (s->keys[i] == threshold) & (equal > 0);
                equal -= is_equal;
                tiles[found] = i; /* found <= n, and there is room for more */
                found += (s->keys[i] > threshold) | is_equal;
            }
        }
        best_left = score_of(left_equal ? threshold : highest_to(s->keys, n_all, threshold - 1));
    }
    for (int32_t i = 0; i < n; i++) s->weights[i] = s->scores[tiles[i]];
    if (n < n_all) {
        make_keys(s->weights, n, s->chosen_keys);
        int32_t closing = (n + 5) / 10, rank = n - (closing > 1 ? closing : 1);
        width = score_of(highest(s->chosen_keys, n, rank > 1 ? rank : 1)) - best_left;
        width = width > 0.05f ? width : 0.05f;
    }
    for (int32_t i = 0; i < n; i += LANES) {
        lanes score = load(s->weights + i), open = all(1);
        if (n < n_all) open = (score - best_left) / width;
        store(s->gates + i, sigmoid(score) * pick(open > 1, all(1), open)); /* not < 0 */
    }
    for (int32_t i = n; i < n + 2 * CELLS; i++) tiles[i] = tiles[n - 1]; /* to fill the last block */
}

/* ---- tokens ---- */

/* Where tokens begin: all that is known of their tiles, through one linear layer. */
STAGE void begin_tokens(const sparseattn_plan *plan, const Scratch *s, int32_t n) {
    const Map *early = &s->early, *middle = &s->middle;
    int32_t stride = plan->stride_middle;
    for (int32_t t = 0; t < n; t += CELLS) {
        const float *around[CELLS], *under[CELLS], *place[CELLS];
        for (int c = 0; c < CELLS; c++) {
            int32_t row = s->tiles[t + c] / middle->columns, column = s->tiles[t + c] - row * middle->columns;
            around[c] = middle->frame + row * middle->pitch + (size_t)column * middle->channels;
            under[c] = early->cell + row * stride * early->pitch + (size_t)column * stride * early->channels;
            float *at = s->places + 2 * (t + c);
            place[c] = at;
            at[0] = (2 * column + 1.0f) / middle->columns - 1;
            at[1] = (2 * row + 1.0f) / middle->rows - 1;
        }
        for (size_t first = 0; first < s->token; first += 2 * LANES) {
            const float *weight = plan->token + first, *cells[CELLS];
            lanes sums[2 * CELLS];
            UNROLL for (int c = 0; c < 2 * CELLS; c++) sums[c] = load(plan->token_bias + first + c % 2 * LANES);
            weight = add_products(place, 2, weight, s->token, CELLS, 2, sums);
            memcpy(cells, around, sizeof cells);
            for (int i = 0; i < 3; i++) {
                weight = add_products(cells, 3 * middle->channels, weight, s->token, CELLS, 2, sums);
                UNROLL for (int c = 0; c < CELLS; c++) cells[c] += middle->pitch;
            }
            memcpy(cells, under, sizeof cells);
            for (int i = 0; i < stride; i++) {
                weight = add_products(cells, stride * early->channels, weight, s->token, CELLS, 2, sums);
                UNROLL for (int c = 0; c < CELLS; c++) cells[c] += early->pitch;
            }
            UNROLL for (int c = 0; c < 2 * CELLS; c++)
                store(s->tokens + (t + c / 2) * s->token + first + c % 2 * LANES,
                      rectified(sums[c]) * s->gates[t + c / 2]);
        }
    }
}

/* Pairs of chosen neighbours, direction by direction. */
STAGE void pair_tiles(Scratch *s, int32_t n) {
    int32_t pitch = s->middle.columns + 2, columns = s->middle.columns, m = 0;
    int32_t *at = s->chosen_keys; /* free by now */
    for (int32_t t = 0; t < n; t++) {
        at[t] = s->tiles[t] + s->tiles[t] / columns * 2 + pitch + 1;
        s->slots[at[t]] = t + 1;
    }
    for (int d = 0; d < 8; d++) {
        int k = d < 4 ? d : d + 1, offset = (k / 3 - 1) * pitch + k % 3 - 1;
        for (int32_t t = 0; t < n; t++) {
            int32_t source = s->slots[at[t] + offset];
            s->sources[m] = source - 1;
            s->targets[m] = t;
            m += source > 0; /* there is room for more */
        }
        for (; m % (CELLS / 2); m++) s->sources[m] = s->targets[m] = n; /* a spare token, to fill the last block */
        s->ends[d] = m;
    }
    for (int32_t t = 0; t < n; t++) s->slots[at[t]] = 0;
}

/* sums[target] += tokens[source] @ weight, or, if there is a bias, = bias + ... */
INLINE void add_block(const sparseattn_plan *plan, const Scratch *s, const int32_t *sources, const int32_t *targets,
                      const float *weight, const float *bias, int n_cells) {
    const float *cells[CELLS];
    float *to[CELLS];
    UNROLL for (int c = 0; c < n_cells; c++) {
        cells[c] = s->tokens + sources[c] * s->token;
        to[c] = s->more + targets[c] * s->token;
    }
    for (size_t first = 0; first < s->token; first += 2 * LANES) {
        lanes sums[2 * CELLS];
        UNROLL for (int c = 0; c < 2 * n_cells; c++) sums[c] = load((bias ? bias : to[c / 2]) + first + c % 2 * LANES);
        add_products(cells, plan->embed_dim, weight + first, s->token, n_cells, 2, sums);
        UNROLL for (int c = 0; c < 2 * n_cells; c++) store(to[c / 2] + first + c % 2 * LANES, sums[c]);
    }
}

/* One sparse convolution. */
STAGE void convolve_tokens(const sparseattn_plan *plan, const Scratch *s, int32_t n, const float *weight,
                            const float *bias) {
    size_t size = plan->embed_dim * s->token;
    for (int32_t t = 0; t < n; t += CELLS) {
        int32_t own[CELLS];
        for (int c = 0; c < CELLS; c++) own[c] = t + c;
        add_block(plan, s, own, own, weight + 4 * size, bias, CELLS);
    }
    int32_t m = 0;
    for (int d = 0; d < 8; d++) {
        const float *factors = weight + (d < 4 ? d : d + 1) * size;
        for (; m + CELLS <= s->ends[d]; m += CELLS)
            add_block(plan, s, s->sources + m, s->targets + m, factors, NULL, CELLS);
        for (; m + CELLS / 2 <= s->ends[d]; m += CELLS / 2)
            add_block(plan, s, s->sources + m, s->targets + m, factors, NULL, CELLS / 2);
    }
    for (int32_t t = 0; t < n; t++)
        for (size_t first = 0; first < s->token; first += LANES) {
            float *token = s->tokens + t * s->token + first;
            store(token, load(token) + rectified(load(s->more + t * s->token + first)) * s->gates[t]);
        }
}

/* ---- attention and classifier ---- */

/* Keys of all tokens, without epsilon, and their sums, (key). */
STAGE void make_token_keys(const sparseattn_plan *plan, const Scratch *s, int32_t n, float *total) {
    for (size_t first = 0; first < s->key; first += LANES) store(total + first, (lanes){0});
    for (int32_t start = 0; start < n; start += RUN)
        for (size_t first = 0; first < s->key; first += 2 * LANES) {
            lanes run[2] = {{0}, {0}};
            for (int32_t t = start; t < n && t < start + RUN; t += CELLS) {
                const float *cells[CELLS];
                lanes sums[2 * CELLS];
                UNROLL for (int c = 0; c < CELLS; c++) cells[c] = s->tokens + (t + c) * s->token;
                                UNROLL for (int c = 0; c < 2 * CELLS; c++) sums[c] = load(plan->key_bias + first + c % 2 * LANES);
                add_products(cells, plan->embed_dim, plan->key + first, s->key, CELLS, 2, sums);
                UNROLL for (int c = 0; c < 2 * CELLS; c++) {
                    lanes key = rectified(sums[c]);
                    store(s->more + (t + c / 2) * s->key + first + c % 2 * LANES, key);
                    /* The last block goes on into other tokens. */
                    if (t + c / 2 < n && t + c / 2 < start + RUN) run[c % 2] += key;
                }
            }
            for (int l = 0; l < 2; l++)
                store(total + first + l * LANES, load(total + first + l * LANES) + run[l]);
        }
}

/* Each token's (key + epsilon) @ readout, and their sum. */
STAGE void read_out(const sparseattn_plan *plan, const Scratch *s, int32_t n, const float *readout, float *to) {
    double offset = 0;
    for (size_t i = 0; i < s->key; i++) offset += readout[i];
    for (int32_t t = 0; t < n; t += LANES) {
        lanes products[LANES];
        UNROLL for (int c = 0; c < LANES; c++) {
            const float *key = s->more + (t + c) * s->key;
            products[c] = load(key) * load(readout);
            for (size_t l = LANES; l < s->key; l += LANES) products[c] += load(key + l) * load(readout + l);
        }
        store(s->weights + t, sums_of(products) + (float)(plan->key_epsilon * offset));
    }
    if (to) memcpy(to, s->weights, n * sizeof(float));
}

/* Sum of the tokens by their weights, and their maximum by channel. */
STAGE void pool_tokens(const Scratch *s, int32_t n, float *pooled, float *most) {
    for (size_t first = 0; first < s->token; first += LANES) {
        lanes total = {0}, greatest = load(s->tokens + first);
        for (int32_t start = 0; start < n; start += RUN) {
            lanes run[2] = {{0}, {0}};
            for (int32_t t = start; t < n && t < start + RUN; t++) {
                lanes token = load(s->tokens + t * s->token + first);
                run[t % 2] += s->weights[t] * token;
                greatest = greater(token, greatest);
            }
            total += run[0] + run[1];
        }
        store(pooled + first, total);
        store(most + first, greatest);
    }
}

/* to = from @ weight + bias, n_outputs padded; the bias may be NULL. */
STAGE void affine(const float *from, int32_t n_inputs, const float *weight, const float *bias, size_t n_outputs,
                   float *to) {
    for (size_t first = 0; first < n_outputs;) {
#define AFFINE(n) { \
    lanes sums[n]; \
    UNROLL for (int l = 0; l < n; l++) sums[l] = bias ? load(bias + first + l * LANES) : (lanes){0}; \
    add_products(&from, n_inputs, weight + first, n_outputs, 1, n, sums); \
    UNROLL for (int l = 0; l < n; l++) store(to + first + l * LANES, sums[l]); \
    first += n * LANES; }
        if (first + 8 * LANES <= n_outputs) AFFINE(8)
        else AFFINE(2)
    }
}

INLINE void rectify(float *values, size_t n) {
    for (size_t i = 0; i < n; i += LANES) store(values + i, rectified(load(values + i)));
}

INLINE void layer_norm(const sparseattn_plan *plan, const float *from, float *to) {
    int32_t n = plan->embed_dim;
    double mean = 0, variance = 0;
    for (int32_t i = 0; i < n; i++) mean += from[i];
    mean /= n;
    for (int32_t i = 0; i < n; i++) variance += (from[i] - mean) * (from[i] - mean);
    double factor = 1 / sqrt(variance / n + plan->norm_epsilon);
    for (int32_t i = 0; i < n; i++) to[i] = (from[i] - mean) * factor * plan->norm_weight[i] + plan->norm_bias[i];
}

/* Tokens to z_fine and to their maximum, the first features. */
INLINE void attend(const sparseattn_plan *plan, const Scratch *s, int32_t n, float *features, float *attention,
                   float *contribution) {
    float total[s->key], readout[s->key], *pooled = s->head, *fine = pooled + s->token, *most = fine + s->token;
    make_token_keys(plan, s, n, total);
    float cls_weight = 0;
    for (size_t i = 0; i < s->key; i++) {
        total[i] += n * plan->key_epsilon + plan->cls_key[i];
        readout[i] = plan->query[i] / total[i];
        cls_weight += plan->cls_key[i] * readout[i];
    }
    read_out(plan, s, n, readout, contribution);
    pool_tokens(s, n, pooled, most);
    float all_weights = 0;
    for (int32_t t = 0; t < n; t++) all_weights += s->weights[t];
    affine(pooled, plan->embed_dim, plan->value, NULL, s->token, fine);
    for (int32_t i = 0; i < plan->embed_dim; i++)
        fine[i] += all_weights * plan->value_bias[i] + cls_weight * plan->cls_value[i];
    layer_norm(plan, fine, features);
    memcpy(features + plan->embed_dim, most, plan->embed_dim * sizeof(float));
    if (attention) {
        for (size_t i = 0; i < s->key; i++) readout[i] = i < (size_t)plan->n_keys ? 1 / (plan->n_keys * total[i]) : 0;
        read_out(plan, s, n, readout, attention);
    }
}

/* Residual MLP; 1 if a logit is not finite. */
INLINE int classify(const sparseattn_plan *plan, const Scratch *s, const float *features, float *logits) {
    size_t width = padded(plan->hidden_dim, 32);
    float *hidden = s->head, *more = hidden + width, *answer = more + width;
    affine(features, 2 * plan->embed_dim + 2 * plan->n_middle, plan->first, plan->first_bias, width, hidden);
    rectify(hidden, width);
    affine(hidden, plan->hidden_dim, plan->residual, plan->residual_bias, width, more);
    rectify(more, width);
    for (size_t i = 0; i < width; i++) hidden[i] += more[i];
    affine(hidden, plan->hidden_dim, plan->last, plan->last_bias, padded(plan->n_classes, 32), answer);
    int failed = 0;
    for (int32_t i = 0; i < plan->n_classes; i++) {
        logits[i] = answer[i];
        failed |= !isfinite(answer[i]);
    }
    return failed;
}

/* ---- images ---- */

static void run_images(const sparseattn_plan *plan, int32_t n_tiles, const void *images, int32_t kind, int64_t n,
                       const sparseattn_results *results, void *memory) {
    Scratch s;
    lay_out(plan, n_tiles, &s, memory);
    size_t size_of_image = size_of(kind) * plan->height * plan->width * plan->n_channels, k = n_tiles;
    size_t n_features = 2 * plan->embed_dim + 2 * plan->n_middle, n_all = (size_t)s.middle.rows * s.middle.columns;
    int32_t size = plan->kernel_size, stride = plan->stride_early, *offset = s.offsets;
    for (int32_t c = 0; c < plan->n_channels; c++)
        for (int32_t j = 0; j < size; j++) *offset++ = (c * stride + j % stride) * s.plane + j / stride;
    int exact = kind == SPARSEATTN_UINT8 && is_exact(plan);
    for (int64_t i = 0; i < n; i++) {
        float *features = results->features + i * n_features, *logits = results->logits + i * plan->n_classes;
        double times[5] = {now(results)};
        const char *image = (const char *)images + i * size_of_image;
        int failed = look(plan, &s, image, kind, exact, features + 2 * plan->embed_dim);
        results->failed[i] = failed;
        if (failed) continue;
        times[1] = now(results);
        choose(&s, n_tiles);
        times[2] = now(results);
        begin_tokens(plan, &s, n_tiles);
        if (plan->n_layers) pair_tiles(&s, n_tiles);
        for (int l = 0; l < plan->n_layers; l++)
            convolve_tokens(plan, &s, n_tiles, plan->layers[l], plan->layer_biases[l]);
        attend(plan, &s, n_tiles, features, results->attention ? results->attention + i * k : NULL,
               results->contribution ? results->contribution + i * k : NULL);
        times[3] = now(results);
        results->failed[i] = classify(plan, &s, features, logits);
        times[4] = now(results);
        for (int p = 0; p < 4 && results->seconds; p++) results->seconds[p] += times[p + 1] - times[p];
        if (results->scores) memcpy(results->scores + i * n_all, s.scores, n_all * sizeof(float));
        if (results->tiles) memcpy(results->tiles + i * k, s.tiles, k * sizeof(int32_t));
    }
}

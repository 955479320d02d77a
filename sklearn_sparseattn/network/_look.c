/* The coarse network in training: two stages of convolution, batch norm by the batch and ReLU, scores of all pixels,
   pooled features; and the gradients back.

   What is computed stands in coarse.py. An image is done whole before the next, but for the statistics of batch norm,
   to which all images come together: hence the phases, between which look.py joins what the images found. Images do
   not share anything that is written, so that the number of threads changes no bit.

   Maps are (rows, columns, channels); the channels of both stages are multiples of LANES. */

#include <Python.h>

#include "_lanes.h"

#define N_STAGES 2
#define GROUP 6 /* cells of a product */

/* Filled in by look.py, which has the same fields in the same order. Those that start with d_ are gradients. */
typedef struct {
    int32_t height, width, step;                    /* of the images; from a scored cell to the next */
    int32_t inputs[N_STAGES], channels[N_STAGES], strides[N_STAGES], rows[N_STAGES], columns[N_STAGES];
    int32_t sizes[N_STAGES];                        /* of the kernels, odd */
    const float *images;                            /* (B, inputs[0], height, width) */
    const float *weight[N_STAGES];                  /* (size^2, inputs, channels) */
    const float *back;                              /* (channels, size^2, inputs): of the second stage, transposed */
    const float *score;                             /* (channels + 1): weights and bias */
    float *raw[N_STAGES], *maps[N_STAGES];          /* (B, rows, columns, channels): before batch norm, at the end */
    double *moments[N_STAGES];                      /* (B, 2, channels): mean, sum of squares around it */
    const float *norm[N_STAGES];                    /* (2, channels): factor, summand */
    float *scores, *pooled;                         /* (B, height, width), (B, 2, channels): mean, maximum */
    const float *d_scores, *d_pooled, *d_maps[N_STAGES]; /* NULL for zeros */
    float *d_normed[N_STAGES];                      /* before the ReLU */
    double *d_moments[N_STAGES];                    /* (B, 2, channels): sum of d_normed, of d_normed (raw - mean) */
    const float *d_norm[N_STAGES];                  /* (4, channels): d_raw = n3 (d_normed - n1 - (raw - n0) n2) */
    float *d_score, *d_weight[N_STAGES];            /* (B, channels + 1), (B, size^2, inputs, channels) */
} Look;

typedef struct {
    float *frame, *d_frame; /* an image or a map with a border */
    float *d_raw, *wide, *zeros;
} Scratch;

INLINE size_t n_cells(const Look *l, int m) { return (size_t)l->rows[m] * l->columns[m]; }
INLINE size_t map_size(const Look *l, int m) { return n_cells(l, m) * l->channels[m]; }
INLINE int32_t rows_before(const Look *l, int m) { return m ? l->rows[m - 1] : l->height; }
INLINE int32_t columns_before(const Look *l, int m) { return m ? l->columns[m - 1] : l->width; }
INLINE int32_t border(const Look *l, int m) { return l->sizes[m] / 2; }
INLINE size_t frame_pitch(const Look *l, int m) {
    return (size_t)(columns_before(l, m) + 2 * border(l, m)) * l->inputs[m];
}
INLINE size_t frame_size(const Look *l, int m) { return (rows_before(l, m) + 2 * border(l, m)) * frame_pitch(l, m); }
INLINE size_t in_frame(const Look *l, int m, int32_t row) { /* where a row begins */
    return (row + border(l, m)) * frame_pitch(l, m) + (size_t)border(l, m) * l->inputs[m];
}

static size_t lay_out(const Look *l, Scratch *s, char *memory) {
    size_t used = 0, n = 0, n_raw = 0;
    for (int m = 0; m < N_STAGES; m++) {
        n = frame_size(l, m) > n ? frame_size(l, m) : n;
        n_raw = map_size(l, m) > n_raw ? map_size(l, m) : n_raw;
    }
    s->frame = take_floats(&used, memory, n);
    s->d_frame = take_floats(&used, memory, n);
    s->d_raw = take_floats(&used, memory, n_raw);
    s->wide = take_floats(&used, memory, (size_t)l->rows[1] * l->width);
    s->zeros = take_floats(&used, memory, 2 * LANES);
    return used;
}

/* ---- frames: all that knows what lies beyond the border, zeros ---- */

/* What the first stage convolves: an image (channels, rows, columns). */
INLINE void frame_image(const Look *l, Scratch *s, int64_t image) {
    int32_t C = l->inputs[0];
    const float *from = l->images + image * C * l->height * l->width;
    memset(s->frame, 0, frame_size(l, 0) * sizeof(float));
    for (int32_t i = 0; i < l->height; i++) {
        float *to = s->frame + in_frame(l, 0, i);
        for (int32_t c = 0; c < C; c++) {
            const float *row = from + ((size_t)c * l->height + i) * l->width;
            for (int32_t j = 0; j < l->width; j++) to[(size_t)j * C + c] = row[j];
        }
    }
}

/* What the second convolves. */
INLINE void frame_map(const Look *l, Scratch *s, int64_t image) {
    size_t row = (size_t)l->columns[0] * l->channels[0];
    const float *from = l->maps[0] + image * map_size(l, 0);
    memset(s->frame, 0, frame_size(l, 1) * sizeof(float));
    for (int32_t i = 0; i < l->rows[0]; i++)
        memcpy(s->frame + in_frame(l, 1, i), from + i * row, row * sizeof(float));
}

/* Row i of the gradient of that map. */
INLINE const float *unframed(const Look *l, const Scratch *s, int32_t i) {
    return s->d_frame + in_frame(l, 1, i);
}

/* ---- there ---- */

INLINE void convolve_some(const Look *l, const Scratch *s, int m, int32_t size, int32_t i, int32_t o, int n_lanes,
                          float *to) {
    int32_t C = l->inputs[m], D = l->channels[m], last = l->columns[m] - 1;
    const float *from = s->frame + i * l->strides[m] * frame_pitch(l, m);
    for (int32_t j = 0; j <= last; j += GROUP) {
        lanes sums[MOST_SUMS];
        size_t cells[GROUP], apart[GROUP];
        /* Of the last group, what lies beyond the row is the row's last cell again. */
        UNROLL for (int g = 0; g < GROUP; g++) cells[g] = j + g < last ? j + g : last;
        UNROLL for (int g = 0; g < GROUP; g++) apart[g] = cells[g] * l->strides[m] * C;
        multiply(from, apart, frame_pitch(l, m), C, size, C, l->weight[m] + o, D, s->zeros, GROUP, n_lanes, sums);
        UNROLL for (int g = 0; g < GROUP; g++)
            UNROLL for (int n = 0; n < n_lanes; n++)
                store(to + cells[g] * D + o + n * LANES, sums[g * n_lanes + n]);
    }
}

INLINE void convolve_rows(const Look *l, const Scratch *s, int m, int32_t size, float *raw) {
    int32_t D = l->channels[m];
    size_t row = (size_t)l->columns[m] * D;
    for (int32_t i = 0; i < l->rows[m]; i++)
        for (int32_t o = 0; o < D; o += 2 * LANES) {
            if (o + LANES < D)
                convolve_some(l, s, m, size, i, o, 2, raw + i * row);
            else
                convolve_some(l, s, m, size, i, o, 1, raw + i * row);
        }
}

/* The frame, convolved; mean and sum of squares around it of each channel. */
INLINE void convolve(const Look *l, const Scratch *s, int m, int64_t image) {
    int32_t D = l->channels[m];
    size_t n = n_cells(l, m), row = (size_t)l->columns[m] * D;
    float *raw = l->raw[m] + image * map_size(l, m);
    if (l->sizes[m] == 3) /* known to the compiler, it is quicker */
        convolve_rows(l, s, m, 3, raw);
    else
        convolve_rows(l, s, m, l->sizes[m], raw);
    double *mean = l->moments[m] + image * 2 * D, *squares = mean + D;
    for (int32_t o = 0; o < D; o += LANES) {
        double sums[LANES] = {0}, around[LANES] = {0};
        for (int32_t i = 0; i < l->rows[m]; i++) {
            lanes run = {0};
            for (size_t at = i * row; at < (i + 1) * row; at += D) run += load(raw + at + o);
            for (int c = 0; c < LANES; c++) sums[c] += run[c];
        }
        lanes centre;
        for (int c = 0; c < LANES; c++) centre[c] = sums[c] / n;
        for (int32_t i = 0; i < l->rows[m]; i++) {
            lanes run = {0};
            for (size_t at = i * row; at < (i + 1) * row; at += D) {
                lanes apart = load(raw + at + o) - centre;
                run += apart * apart;
            }
            for (int c = 0; c < LANES; c++) around[c] += run[c];
        }
        for (int c = 0; c < LANES; c++) {
            double error = sums[c] / n - centre[c]; /* the centre is rounded */
            mean[o + c] = sums[c] / n;
            squares[o + c] = around[c] - n * error * error;
        }
    }
}

/* Batch norm and ReLU, of which a NaN comes out as it does in PyTorch. */
INLINE void normalize(const Look *l, int m, int64_t image) {
    int32_t D = l->channels[m];
    const float *raw = l->raw[m] + image * map_size(l, m);
    float *map = l->maps[m] + image * map_size(l, m);
    for (size_t at = 0; at < map_size(l, m); at += D)
        for (int32_t o = 0; o < D; o += LANES) {
            lanes value = load(raw + at + o) * load(l->norm[m] + o) + load(l->norm[m] + D + o);
            store(map + at + o, (lanes)((whole_lanes)value & ~(value <= 0)));
        }
}

/* Between which two of n cells pixel p lies, and how near to the second. */
INLINE float between(int32_t p, int32_t step, int32_t n, int32_t *before, int32_t *after) {
    *before = p / step < n ? p / step : n - 1;
    *after = *before + 1 < n ? *before + 1 : n - 1;
    return p % step / (float)step;
}

/* Scores of the cells, between them in each of their rows, and then between the rows. */
INLINE void score_pixels(const Look *l, Scratch *s, int64_t image) {
    int32_t D = l->channels[1], n_rows = l->rows[1], n_columns = l->columns[1], W = l->width, a, b;
    const float *map = l->maps[1] + image * map_size(l, 1);
    float *cells = s->d_raw, *scores = l->scores + image * l->height * W;
    for (size_t t = 0; t < n_cells(l, 1); t++) {
        lanes sum = {0};
        for (int32_t o = 0; o < D; o += LANES) sum += load(map + t * D + o) * load(l->score + o);
        cells[t] = sum_of(sum) + l->score[D];
    }
    for (int32_t j = 0; j < W; j++) {
        float share = between(j, l->step, n_columns, &a, &b);
        for (int32_t i = 0; i < n_rows; i++) {
            const float *row = cells + (size_t)i * n_columns;
            s->wide[(size_t)i * W + j] = (1 - share) * row[a] + share * row[b];
        }
    }
    for (int32_t i = 0; i < l->height; i++) {
        float share = between(i, l->step, n_rows, &a, &b), *to = scores + (size_t)i * W;
        const float *above = s->wide + (size_t)a * W, *below = s->wide + (size_t)b * W;
        for (int32_t j = 0; j < W; j++) to[j] = (1 - share) * above[j] + share * below[j];
    }
}

/* Mean and maximum of each channel. */
INLINE void pool(const Look *l, int64_t image) {
    int32_t D = l->channels[1];
    size_t n = n_cells(l, 1), row = (size_t)l->columns[1] * D;
    const float *map = l->maps[1] + image * map_size(l, 1);
    float *pooled = l->pooled + image * 2 * D;
    for (int32_t o = 0; o < D; o += LANES) {
        double sums[LANES] = {0};
        lanes most = load(map + o);
        for (int32_t i = 0; i < l->rows[1]; i++) {
            lanes run = {0};
            for (size_t at = i * row; at < (i + 1) * row; at += D) {
                lanes value = load(map + at + o);
                run += value;
                most = pick(value > most, value, most);
            }
            for (int c = 0; c < LANES; c++) sums[c] += run[c];
        }
        for (int c = 0; c < LANES; c++) pooled[o + c] = sums[c] / n;
        store(pooled + D + o, most);
    }
}

/* ---- and back ---- */

/* Gradients of the scores of the pixels -> of those of the cells. */
INLINE void unscore(const Look *l, Scratch *s, int64_t image) {
    int32_t n_rows = l->rows[1], n_columns = l->columns[1], W = l->width, a, b;
    float *cells = s->d_raw;
    memset(cells, 0, n_cells(l, 1) * sizeof(float));
    if (!l->d_scores) return;
    memset(s->wide, 0, (size_t)n_rows * W * sizeof(float));
    for (int32_t i = 0; i < l->height; i++) {
        float share = between(i, l->step, n_rows, &a, &b);
        const float *from = l->d_scores + ((size_t)image * l->height + i) * W;
        float *above = s->wide + (size_t)a * W, *below = s->wide + (size_t)b * W;
        for (int32_t j = 0; j < W; j++) above[j] += (1 - share) * from[j];
        for (int32_t j = 0; j < W; j++) below[j] += share * from[j];
    }
    for (int32_t j = 0; j < W; j++) {
        float share = between(j, l->step, n_columns, &a, &b);
        for (int32_t i = 0; i < n_rows; i++) {
            float *row = cells + (size_t)i * n_columns, from = s->wide[(size_t)i * W + j];
            row[a] += (1 - share) * from;
            row[b] += share * from;
        }
    }
}

/* Sums of d_normed, and of it times raw - mean. */
INLINE void sum_back(const Look *l, int m, int64_t image) {
    int32_t D = l->channels[m];
    size_t row = (size_t)l->columns[m] * D;
    const float *raw = l->raw[m] + image * map_size(l, m), *d_normed = l->d_normed[m] + image * map_size(l, m);
    double *sums = l->d_moments[m] + image * 2 * D;
    for (int32_t o = 0; o < D; o += LANES) {
        lanes mean = load(l->d_norm[m] + o);
        double plain[LANES] = {0}, along[LANES] = {0};
        for (int32_t i = 0; i < l->rows[m]; i++) {
            lanes run = {0}, along_run = {0};
            for (size_t at = i * row; at < (i + 1) * row; at += D) {
                lanes d = load(d_normed + at + o);
                run += d;
                along_run += d * (load(raw + at + o) - mean);
            }
            for (int c = 0; c < LANES; c++) plain[c] += run[c], along[c] += along_run[c];
        }
        for (int c = 0; c < LANES; c++) sums[o + c] = plain[c], sums[D + o + c] = along[c];
    }
}

/* From scores, pooled features and what else was made of the second map, to before its ReLU. */
INLINE void back_to_middle(const Look *l, Scratch *s, int64_t image) {
    int32_t D = l->channels[1];
    size_t n = n_cells(l, 1);
    const float *map = l->maps[1] + image * map_size(l, 1), *cells = s->d_raw;
    const float *d_map = l->d_maps[1] ? l->d_maps[1] + image * map_size(l, 1) : NULL;
    float *d_normed = l->d_normed[1] + image * map_size(l, 1), *d_score = l->d_score + image * (D + 1);
    unscore(l, s, image);
    for (int32_t o = 0; o < D; o += LANES) {
        lanes d_mean = {0}, d_most = {0}, most = load(l->pooled + image * 2 * D + D + o), along = {0};
        if (l->d_pooled) {
            lanes ties = {0}; /* share what the maximum gets */
            for (size_t t = 0; t < n; t++) ties -= __builtin_convertvector(load(map + t * D + o) == most, lanes);
            d_mean = load(l->d_pooled + image * 2 * D + o) / (float)n;
            d_most = load(l->d_pooled + image * 2 * D + D + o) / ties;
        }
        for (size_t t = 0; t < n; t++) {
            lanes value = load(map + t * D + o), d = cells[t] * load(l->score + o) + d_mean;
            d += (lanes)((whole_lanes)d_most & (value == most));
            if (d_map) d += load(d_map + t * D + o);
            along += cells[t] * value;
            store(d_normed + t * D + o, (lanes)((whole_lanes)d & (value > 0)));
        }
        store(d_score + o, along);
    }
    double sum = 0;
    for (size_t t = 0; t < n; t++) sum += cells[t];
    d_score[D] = sum;
    sum_back(l, 1, image);
}

/* Through batch norm. */
INLINE void back_to_raw(const Look *l, Scratch *s, int m, int64_t image) {
    int32_t D = l->channels[m];
    const float *raw = l->raw[m] + image * map_size(l, m), *d_normed = l->d_normed[m] + image * map_size(l, m);
    const float *norm = l->d_norm[m];
    for (size_t at = 0; at < map_size(l, m); at += D)
        for (int32_t o = 0; o < D; o += LANES) {
            lanes apart = load(raw + at + o) - load(norm + o);
            lanes d = load(d_normed + at + o) - load(norm + D + o) - apart * load(norm + 2 * D + o);
            store(s->d_raw + at + o, d * load(norm + 3 * D + o));
        }
}

/* to[x] += sum over a row's cells of from[x] by[o], for n_x inputs of each. */
INLINE void add_outer(const float *from, size_t apart, const float *by, int32_t D, int32_t n, int n_x, float *to) {
    lanes sums[MOST_SUMS];
    UNROLL for (int x = 0; x < n_x; x++) sums[x] = load(to + x * D);
    for (int32_t j = 0; j < n; j++) {
        lanes factor = load(by + (size_t)j * D);
        UNROLL for (int x = 0; x < n_x; x++) sums[x] += from[j * apart + x] * factor;
    }
    UNROLL for (int x = 0; x < n_x; x++) store(to + x * D, sums[x]);
}

/* Gradient of the weights of a stage, from the frame and d_raw. */
INLINE void back_to_weight(const Look *l, const Scratch *s, int m, int64_t image) {
    int32_t D = l->channels[m], n = l->columns[m], K = l->sizes[m], size = K * l->inputs[m];
    size_t apart = (size_t)l->strides[m] * l->inputs[m];
    float *d_weight = l->d_weight[m] + image * (size_t)K * size * D;
    for (int32_t i = 0; i < l->rows[m]; i++)
        for (int down = 0; down < K; down++) {
            const float *from = s->frame + (i * l->strides[m] + down) * frame_pitch(l, m);
            for (int32_t o = 0; o < D; o += LANES) {
                const float *by = s->d_raw + (size_t)i * n * D + o;
                float *to = d_weight + (size_t)down * size * D + o;
                int32_t x = 0;
                for (; x + 12 <= size; x += 12) add_outer(from + x, apart, by, D, n, 12, to + (size_t)x * D);
                for (; x + 9 <= size; x += 9) add_outer(from + x, apart, by, D, n, 9, to + (size_t)x * D);
                for (; x + 3 <= size; x += 3) add_outer(from + x, apart, by, D, n, 3, to + (size_t)x * D);
                for (; x < size; x++) add_outer(from + x, apart, by, D, n, 1, to + (size_t)x * D);
            }
        }
}

/* From d_raw of the second stage to before the ReLU of the first. */
INLINE void back_to_early(const Look *l, Scratch *s, int64_t image) {
    int32_t C = l->channels[0], D = l->channels[1], n = l->columns[1], K = l->sizes[1];
    size_t row = (size_t)l->columns[0] * C, pitch = frame_pitch(l, 1);
    memset(s->d_frame, 0, frame_size(l, 1) * sizeof(float));
    for (int32_t i = 0; i < l->rows[1]; i++)
        for (int tap = 0; tap < K * K; tap++)
            for (int32_t j = 0; j < n; j += MOST_SUMS) {
                float *to = s->d_frame + (i * l->strides[1] + tap / K) * pitch + tap % K * C;
                lanes sums[MOST_SUMS];
                size_t apart[MOST_SUMS];
                UNROLL for (int g = 0; g < MOST_SUMS; g++) apart[g] = (j + g < n ? j + g : n - 1) * (size_t)D;
                for (int32_t o = 0; o < C; o += LANES) {
                    multiply(s->d_raw + (size_t)i * n * D, apart, 0, 0, 1, D, l->back + tap * C + o, K * K * C,
                             s->zeros, MOST_SUMS, 1, sums);
                    for (int g = 0; g < MOST_SUMS && j + g < n; g++) {
                        float *cell = to + (size_t)(j + g) * l->strides[1] * C + o;
                        store(cell, load(cell) + sums[g]);
                    }
                }
            }
    const float *map = l->maps[0] + image * map_size(l, 0);
    const float *d_map = l->d_maps[0] ? l->d_maps[0] + image * map_size(l, 0) : NULL;
    float *d_normed = l->d_normed[0] + image * map_size(l, 0);
    for (int32_t i = 0; i < l->rows[0]; i++) {
        const float *from = unframed(l, s, i);
        for (size_t at = 0; at < row; at += LANES) {
            lanes d = load(from + at);
            if (d_map) d += load(d_map + i * row + at);
            store(d_normed + i * row + at, (lanes)((whole_lanes)d & (load(map + i * row + at) > 0)));
        }
    }
    sum_back(l, 0, image);
}

/* Images `begin` to `end` in one of the phases: three there, three back. d_weight is added to. 0, or -1 if there is no
   memory. */
EACH_PROCESSOR
int sparseattn_look(const Look *look, int64_t begin, int64_t end, int32_t phase) {
    Scratch scratch;
    char *memory = calloc(lay_out(look, &scratch, NULL) + 64, 1);
    if (!memory) return -1;
    lay_out(look, &scratch, memory + (64 - (uintptr_t)memory % 64));
    for (int64_t image = begin; image < end; image++) {
        if (phase == 0) {
            frame_image(look, &scratch, image);
            convolve(look, &scratch, 0, image);
        } else if (phase == 1) {
            normalize(look, 0, image);
            frame_map(look, &scratch, image);
            convolve(look, &scratch, 1, image);
        } else if (phase == 2) {
            normalize(look, 1, image);
            score_pixels(look, &scratch, image);
            pool(look, image);
        } else if (phase == 3) {
            back_to_middle(look, &scratch, image);
        } else if (phase == 4) {
            frame_map(look, &scratch, image);
            back_to_raw(look, &scratch, 1, image);
            back_to_weight(look, &scratch, 1, image);
            back_to_early(look, &scratch, image);
        } else {
            frame_image(look, &scratch, image);
            back_to_raw(look, &scratch, 0, image);
            back_to_weight(look, &scratch, 0, image);
        }
    }
    free(memory);
    return 0;
}

/* So that look.py can see that it speaks of the same fields. */
int64_t sparseattn_look_size(void) { return sizeof(Look); }

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_look", "Functions for ctypes; see look.py.", -1, NULL,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__look(void) { return PyModule_Create(&module); }

/* The sparse branch of SparseAttnNet in training: chosen pixels -> pooled tokens, and the gradients back.

   What is computed stands in context.py, fine.py and sparse_attn_net.py. Here an image is done whole before the
   next, so that its tokens stay in the cache; the way back makes them again instead of keeping them. Images do
   not share anything that is written: weights have their gradients by image, to be summed outside in an order
   that no number of threads changes. The 3x3 convolutions are separable: of each channel by itself, then 1x1.

   Maps come as (rows, columns, channels). All widths are multiples of LANES, key_dim of two. */

#include <Python.h>

#include "_select.h"

#define N_MAPS 2
#define BLOCK 6  /* tokens of a product */
#define NEAR 40  /* rows of an outer product */
#define CHUNK 60 /* tokens that go through all steps together */

/* Filled in by branch.py, which has the same fields in the same order. Those that start with d_ are gradients,
   NULL on the way there. */
typedef struct {
    int32_t height, width, n_channels, k, embed_dim, key_dim;
    int32_t rows[N_MAPS], columns[N_MAPS], channels[N_MAPS], steps[N_MAPS];
    float epsilon;
    const float *images;                  /* (B, n_channels, height, width) */
    const int64_t *pixels;                /* (B, k) */
    const float *gates;                   /* (B, k) */
    const float *maps[N_MAPS];            /* (B, rows, columns, channels) */
    const float *first, *first_bias;      /* (2 + n_channels, embed_dim) */
    const float *depthwise[N_MAPS];       /* (9, channels) */
    const float *pointwise[N_MAPS];       /* (channels, embed_dim) */
    const float *pointwise_back[N_MAPS];  /* (embed_dim, channels) */
    const float *key, *key_bias;          /* (embed_dim, key_dim) */
    const float *key_back;                /* (key_dim, embed_dim) */
    const float *query, *cls_key;         /* (key_dim) */
    float *pooled, *weight, *cls_weight;  /* (B, embed_dim), (B), (B) */
    float *attention, *contribution;      /* (B, k) */
    const float *d_pooled, *d_weight, *d_cls_weight;
    float *d_gates, *d_maps[N_MAPS];
    int64_t apart;                        /* numbers from the gradients of the first image to the next, of these: */
    float *d_depthwise[N_MAPS], *d_pointwise[N_MAPS];
    float *d_first, *d_first_bias, *d_key, *d_key_bias, *d_query, *d_cls_key;
} Branch;

typedef struct {
    float *frame[N_MAPS], *d_frame[N_MAPS]; /* maps framed by a cell of zeros */
    int32_t *wanted[N_MAPS], n_wanted[N_MAPS]; /* cells to which chosen pixels belong */
    int32_t *places[N_MAPS], *cells[N_MAPS];   /* in that list: of every cell, or -1; of each pixel's cell */
    float *around[N_MAPS], *context[N_MAPS];   /* of the cells in that list, between the convolutions and after them */
    float *d_around;
    float *numbers;                         /* x, y and values of each pixel */
    float *tokens, *keys, *d_keys, *d_tokens, *along;
    float *readout, *d_readout, *zeros;
    double *total;
} Scratch;

INLINE size_t n_cells(const Branch *b, int m) { return (size_t)b->rows[m] * b->columns[m]; }
INLINE size_t frame_pitch(const Branch *b, int m) { return (size_t)(b->columns[m] + 2) * b->channels[m]; }
INLINE size_t frame_size(const Branch *b, int m) { return frame_pitch(b, m) * (b->rows[m] + 2); }

static size_t lay_out(const Branch *b, Scratch *s, char *memory) {
    size_t used = 0, k = b->k + CHUNK, most = 0, D = b->embed_dim, K = b->key_dim;
    for (int m = 0; m < N_MAPS; m++) {
        size_t n = n_cells(b, m) + BLOCK;
        s->frame[m] = take_floats(&used, memory, frame_size(b, m));
        s->d_frame[m] = take_floats(&used, memory, frame_size(b, m));
        s->wanted[m] = take(&used, memory, n * sizeof(int32_t));
        s->places[m] = take(&used, memory, n * sizeof(int32_t));
        s->cells[m] = take(&used, memory, k * sizeof(int32_t));
        s->around[m] = take_floats(&used, memory, n * b->channels[m]);
        s->context[m] = take_floats(&used, memory, n * D);
        most = n * b->channels[m] > most ? n * b->channels[m] : most;
    }
    s->d_around = take_floats(&used, memory, most);
    s->numbers = take_floats(&used, memory, k * (2 + b->n_channels));
    s->tokens = take_floats(&used, memory, k * D);
    s->keys = take_floats(&used, memory, k * K);
    s->d_keys = take_floats(&used, memory, CHUNK * K);
    s->d_tokens = take_floats(&used, memory, CHUNK * D);
    s->along = take_floats(&used, memory, k);
    s->readout = take_floats(&used, memory, K);
    s->d_readout = take_floats(&used, memory, K);
    s->zeros = take_floats(&used, memory, D > K ? D : K);
    s->total = take(&used, memory, (3 * K + D) * sizeof(double));
    return used;
}

/* to[x][y] += sum over rows of from[row][x] * by[row][y], (n_x, n_y); n_y a multiple of LANES. */
INLINE void add_outer_lanes(const float *from, size_t n_x, const float *by, size_t n_y, int32_t n_rows, float *to,
                            size_t x, size_t y, int n_columns, int n_lanes) {
    lanes sums[MOST_SUMS];
    UNROLL for (int c = 0; c < n_columns; c++)
        UNROLL for (int l = 0; l < n_lanes; l++) sums[c * n_lanes + l] = load(to + (x + c) * n_y + y + l * LANES);
    for (int32_t row = 0; row < n_rows; row++)
        UNROLL for (int c = 0; c < n_columns; c++)
            UNROLL for (int l = 0; l < n_lanes; l++)
                sums[c * n_lanes + l] += from[row * n_x + x + c] * load(by + row * n_y + y + l * LANES);
    UNROLL for (int c = 0; c < n_columns; c++)
        UNROLL for (int l = 0; l < n_lanes; l++) store(to + (x + c) * n_y + y + l * LANES, sums[c * n_lanes + l]);
}

INLINE void add_outer_some(const float *from, size_t n_x, const float *by, size_t n_y, int32_t n_rows, float *to) {
    size_t y = 0;
    for (; y + 4 * LANES <= n_y; y += 4 * LANES) {
        size_t x = 0;
        for (; x + 3 <= n_x; x += 3) add_outer_lanes(from, n_x, by, n_y, n_rows, to, x, y, 3, 4);
        for (; x < n_x; x++) add_outer_lanes(from, n_x, by, n_y, n_rows, to, x, y, 1, 4);
    }
    for (; y < n_y; y += LANES)
        for (size_t x = 0; x < n_x; x++) add_outer_lanes(from, n_x, by, n_y, n_rows, to, x, y, 1, 1);
}

INLINE void add_outer(const float *from, size_t n_x, const float *by, size_t n_y, int32_t n_rows, float *to) {
    for (int32_t row = 0; row < n_rows; row += NEAR) /* few enough rows to stay in the nearest cache */
        add_outer_some(from + row * n_x, n_x, by + row * n_y, n_y, n_rows - row < NEAR ? n_rows - row : NEAR, to);
}

/* to = from @ weight, (n_rows, n_outputs), BLOCK rows at a time; both have room for the last block. */
INLINE void product(const float *from, int32_t n_inputs, const float *weight, int32_t n_outputs, int32_t n_rows,
                    const float *zeros, float *to) {
    size_t apart[BLOCK];
    UNROLL for (int r = 0; r < BLOCK; r++) apart[r] = (size_t)r * n_inputs;
    for (int32_t row = 0; row < n_rows; row += BLOCK) {
        int32_t o = 0;
        for (; o + 2 * LANES <= n_outputs; o += 2 * LANES) {
            lanes sums[MOST_SUMS];
            multiply(from + (size_t)row * n_inputs, apart, 0, 0, 1, n_inputs, weight + o, n_outputs, zeros, BLOCK, 2,
                     sums);
            UNROLL for (int r = 0; r < BLOCK; r++)
                UNROLL for (int l = 0; l < 2; l++)
                    store(to + (size_t)(row + r) * n_outputs + o + l * LANES, sums[2 * r + l]);
        }
        if (o < n_outputs) {
            lanes sums[MOST_SUMS];
            multiply(from + (size_t)row * n_inputs, apart, 0, 0, 1, n_inputs, weight + o, n_outputs, zeros, BLOCK, 1,
                     sums);
            UNROLL for (int r = 0; r < BLOCK; r++) store(to + (size_t)(row + r) * n_outputs + o, sums[r]);
        }
    }
}

/* ---- there ---- */

/* The cell nearest to each pixel, and each such cell once. */
INLINE void find_cells(const Branch *b, Scratch *s, int m, const int64_t *pixels) {
    int32_t step = b->steps[m], half = step / 2, found = 0, row = 0, end = b->width;
    double factor = 1.0 / step; /* a division takes long; for int32, half a pixel is enough for the same result */
    memset(s->places[m], -1, n_cells(b, m) * sizeof(int32_t));
    for (int32_t t = 0; t < b->k; t++) {
        int32_t pixel = pixels[t];
        if (pixel >= end || pixel < end - b->width) row = pixel / b->width, end = (row + 1) * b->width;
        int32_t i = (row + half + 0.5) * factor, j = (pixel - (end - b->width) + half + 0.5) * factor;
        i = i < b->rows[m] ? i : b->rows[m] - 1;
        j = j < b->columns[m] ? j : b->columns[m] - 1;
        int32_t cell = i * b->columns[m] + j, place = s->places[m][cell];
        s->wanted[m][found] = cell;
        s->cells[m][t] = s->places[m][cell] = place < 0 ? found : place;
        found += place < 0;
    }
    s->n_wanted[m] = found;
}

/* Upper left of the 3x3 cells around a cell, in the frame. */
INLINE size_t around(const Branch *b, int m, int32_t cell) {
    int32_t i = cell / b->columns[m], j = cell - i * b->columns[m];
    return i * frame_pitch(b, m) + (size_t)j * b->channels[m];
}

INLINE void convolve_wanted(const Branch *b, Scratch *s, int m) {
    size_t channels = b->channels[m], pitch = frame_pitch(b, m);
    for (int32_t w = 0; w < s->n_wanted[m]; w++) {
        const float *from = s->frame[m] + around(b, m, s->wanted[m][w]);
        for (size_t c = 0; c < channels; c += LANES) {
            lanes sum = {0};
            UNROLL for (int n = 0; n < 9; n++)
                sum += load(from + n / 3 * pitch + n % 3 * channels + c) * load(b->depthwise[m] + n * channels + c);
            store(s->around[m] + w * channels + c, sum);
        }
    }
    product(s->around[m], channels, b->pointwise[m], b->embed_dim, s->n_wanted[m], s->zeros, s->context[m]);
}

/* Tokens before their gate: relu(W1 (x, y, v) + b1 + context). */
INLINE void make_tokens(const Branch *b, Scratch *s, const float *image, const int64_t *pixels) {
    size_t n_pixels = (size_t)b->height * b->width, D = b->embed_dim, n_numbers = 2 + b->n_channels;
    for (int32_t t = 0; t < b->k; t++) {
        int32_t row = pixels[t] / b->width, column = pixels[t] - (int64_t)row * b->width;
        float *numbers = s->numbers + t * n_numbers;
        numbers[0] = (2 * column + 1.0f) / b->width - 1;
        numbers[1] = (2 * row + 1.0f) / b->height - 1;
        for (int32_t c = 0; c < b->n_channels; c++) numbers[2 + c] = image[c * n_pixels + pixels[t]];
        const float *context[N_MAPS];
        UNROLL for (int m = 0; m < N_MAPS; m++) context[m] = s->context[m] + s->cells[m][t] * D;
        for (size_t d = 0; d < D; d += LANES) {
            lanes sum = load(b->first_bias + d);
            UNROLL for (int m = 0; m < N_MAPS; m++) sum += load(context[m] + d);
            for (size_t n = 0; n < n_numbers; n++) sum += numbers[n] * load(b->first + n * D + d);
            store(s->tokens + t * D + d, rectified(sum));
        }
    }
}

/* relu(gate * token @ key + bias), and their sums. */
INLINE void make_keys(const Branch *b, Scratch *s, const float *gates) {
    int32_t D = b->embed_dim, K = b->key_dim;
    for (int32_t i = 0; i < K; i++) s->total[i] = 0;
    for (int32_t start = 0; start < b->k; start += CHUNK) {
        int32_t n = b->k - start < CHUNK ? b->k - start : CHUNK;
        float *keys = s->keys + (size_t)start * K;
        product(s->tokens + (size_t)start * D, D, b->key, K, n, s->zeros, keys);
        for (int32_t i = 0; i < K; i += LANES) {
            lanes run = {0}, bias = load(b->key_bias + i);
            for (int32_t t = 0; t < n; t++) {
                lanes key = rectified(gates[start + t] * load(keys + (size_t)t * K + i) + bias);
                store(keys + (size_t)t * K + i, key);
                run += key;
            }
            for (int l = 0; l < LANES; l++) s->total[i + l] += run[l];
        }
    }
    for (int32_t i = 0; i < K; i++) {
        s->total[i] += b->k * (double)b->epsilon + b->cls_key[i];
        s->readout[i] = b->query[i] / s->total[i];
    }
}

INLINE float dot(const float *a, const float *b, int32_t n) {
    lanes sum = {0};
    for (int32_t i = 0; i < n; i += LANES) sum += load(a + i) * load(b + i);
    return sum_of(sum);
}

INLINE float sum_all(const float *values, int32_t n) {
    float sum = 0;
    for (int32_t i = 0; i < n; i++) sum += values[i];
    return sum;
}

/* Everything up to the keys of one image. */
INLINE void go_there(const Branch *b, Scratch *s, int64_t image) {
    const int64_t *pixels = b->pixels + image * b->k;
    for (int m = 0; m < N_MAPS; m++) {
        size_t row_size = (size_t)b->columns[m] * b->channels[m];
        const float *map = b->maps[m] + image * n_cells(b, m) * b->channels[m];
        for (int32_t i = 0; i < b->rows[m]; i++)
            memcpy(s->frame[m] + (i + 1) * frame_pitch(b, m) + b->channels[m], map + i * row_size,
                   row_size * sizeof(float));
        find_cells(b, s, m, pixels);
        convolve_wanted(b, s, m);
    }
    make_tokens(b, s, b->images + image * (size_t)b->n_channels * b->height * b->width, pixels);
    make_keys(b, s, b->gates + image * b->k);
}

INLINE void pool_tokens(const Branch *b, Scratch *s, int64_t image) {
    int32_t D = b->embed_dim, K = b->key_dim;
    const float *gates = b->gates + image * b->k;
    float *contribution = b->contribution + image * b->k, *attention = b->attention + image * b->k;
    float offset = b->epsilon * sum_all(s->readout, K), *attended = s->d_readout;
    for (int32_t i = 0; i < K; i++) attended[i] = 1 / s->total[i];
    float attended_offset = b->epsilon * sum_all(attended, K);
    double *pooled = s->total + K, all = 0, cls_weight = 0;
    for (int32_t d = 0; d < D; d++) pooled[d] = 0;
    for (int32_t start = 0; start < b->k; start += CHUNK) {
        int32_t n = b->k - start < CHUNK ? b->k - start : CHUNK;
        for (int32_t t = start; t < start + n; t++) {
            const float *key = s->keys + (size_t)t * K;
            contribution[t] = dot(key, s->readout, K) + offset;
            attention[t] = dot(key, attended, K) + attended_offset; /* times the number of keys */
            s->along[t] = contribution[t] * gates[t];
            all += contribution[t];
        }
        for (int32_t d = 0; d < D; d += LANES) {
            lanes run = {0};
            for (int32_t t = start; t < start + n; t++) run += s->along[t] * load(s->tokens + (size_t)t * D + d);
            for (int l = 0; l < LANES; l++) pooled[d + l] += run[l];
        }
    }
    for (int32_t d = 0; d < D; d++) b->pooled[image * D + d] = pooled[d];
    for (int32_t i = 0; i < K; i++) cls_weight += b->cls_key[i] * (double)s->readout[i];
    b->weight[image] = all;
    b->cls_weight[image] = cls_weight;
}

/* ---- and back: names as in branch.py ---- */

/* u_t = d_pooled . h_t + d_weight, into `along`; from them the gradients of readout, total and query. */
INLINE void back_to_readout(const Branch *b, Scratch *s, int64_t image, double *d_total) {
    int32_t D = b->embed_dim, K = b->key_dim;
    const float *gates = b->gates + image * b->k, *d_pooled = b->d_pooled + image * D;
    double *d_readout = s->total + K;
    for (int32_t i = 0; i < K; i++) d_readout[i] = b->d_cls_weight[image] * (double)b->cls_key[i];
    for (int32_t start = 0; start < b->k; start += CHUNK) {
        int32_t n = b->k - start < CHUNK ? b->k - start : CHUNK;
        for (int32_t t = start; t < start + n; t++)
            s->along[t] = gates[t] * dot(d_pooled, s->tokens + (size_t)t * D, D) + b->d_weight[image];
        for (int32_t i = 0; i < K; i += LANES) {
            lanes run = {0};
            for (int32_t t = start; t < start + n; t++)
                run += s->along[t] * (load(s->keys + (size_t)t * K + i) + b->epsilon);
            for (int l = 0; l < LANES; l++) d_readout[i + l] += run[l];
        }
    }
    for (int32_t i = 0; i < K; i++) {
        d_total[i] = -d_readout[i] * s->readout[i] / s->total[i];
        b->d_query[image * b->apart + i] = d_readout[i] / s->total[i];
        b->d_cls_key[image * b->apart + i] = b->d_cls_weight[image] * s->readout[i] + d_total[i];
    }
}

/* Through keys and gates, to the sums before the tokens' ReLU, which take the place of the tokens. */
INLINE void back_to_tokens(const Branch *b, Scratch *s, int64_t image, const double *d_total) {
    int32_t D = b->embed_dim, K = b->key_dim;
    const float *gates = b->gates + image * b->k, *d_pooled = b->d_pooled + image * D;
    float *d_gates = b->d_gates + image * b->k, *d_key_bias = b->d_key_bias + image * b->apart;
    float offset = b->epsilon * sum_all(s->readout, K), *d_sum = s->d_readout;
    for (int32_t i = 0; i < K; i++) d_sum[i] = d_total[i];
    for (int32_t start = 0; start < b->k; start += CHUNK) {
        int32_t n = b->k - start < CHUNK ? b->k - start : CHUNK;
        const float *keys = s->keys + (size_t)start * K;
        float *tokens = s->tokens + (size_t)start * D;
        for (int32_t i = 0; i < K; i += LANES) {
            lanes run = {0}, readout = load(s->readout + i), d_all = load(d_sum + i);
            for (int32_t t = 0; t < n; t++) {
                lanes d_key = s->along[start + t] * readout + d_all;
                d_key = (lanes)((whole_lanes)d_key & (load(keys + (size_t)t * K + i) > 0));
                run += d_key;
                store(s->d_keys + (size_t)t * K + i, d_key);
            }
            store(d_key_bias + i, load(d_key_bias + i) + run);
        }
        product(s->d_keys, K, b->key_back, D, n, s->zeros, s->d_tokens);
        for (int32_t t = 0; t < n; t++) {
            float gate = gates[start + t], weight = dot(keys + (size_t)t * K, s->readout, K) + offset;
            lanes d_gate = {0};
            for (int32_t d = 0; d < D; d += LANES) { /* d_tokens: of the gated tokens */
                lanes d_token = load(s->d_tokens + (size_t)t * D + d) + weight * load(d_pooled + d);
                d_gate += d_token * load(tokens + (size_t)t * D + d);
                store(s->d_tokens + (size_t)t * D + d, gate * d_token);
            }
            d_gates[start + t] = sum_of(d_gate);
            for (int32_t i = 0; i < K; i += LANES) /* for d_key: of the tokens before their gate */
                store(s->d_keys + (size_t)t * K + i, gate * load(s->d_keys + (size_t)t * K + i));
        }
        add_outer(tokens, D, s->d_keys, K, n, b->d_key + image * b->apart);
        for (int32_t i = 0; i < n * D; i += LANES)
            store(tokens + i, (lanes)((whole_lanes)load(s->d_tokens + i) & (load(tokens + i) > 0)));
    }
}

/* Through the convolutions of a map; `context` has the gradients of what came out of them. */
INLINE void back_through_convolutions(const Branch *b, Scratch *s, int m, int64_t image) {
    int32_t n = s->n_wanted[m];
    size_t channels = b->channels[m], D = b->embed_dim, pitch = frame_pitch(b, m);
    float *d_depthwise = b->d_depthwise[m] + image * b->apart;
    add_outer(s->around[m], channels, s->context[m], D, n, b->d_pointwise[m] + image * b->apart);
    product(s->context[m], D, b->pointwise_back[m], channels, n, s->zeros, s->d_around);
    memset(s->d_frame[m], 0, frame_size(b, m) * sizeof(float));
    for (size_t c = 0; c < channels; c += LANES) {
        lanes sums[9], weights[9];
        UNROLL for (int i = 0; i < 9; i++) sums[i] = (lanes){0}, weights[i] = load(b->depthwise[m] + i * channels + c);
        for (int32_t w = 0; w < n; w++) {
            size_t at = around(b, m, s->wanted[m][w]) + c;
            lanes d_around = load(s->d_around + w * channels + c);
            UNROLL for (int i = 0; i < 9; i++) {
                float *to = s->d_frame[m] + at + i / 3 * pitch + i % 3 * channels;
                sums[i] += d_around * load(s->frame[m] + at + i / 3 * pitch + i % 3 * channels);
                store(to, load(to) + d_around * weights[i]);
            }
        }
        UNROLL for (int i = 0; i < 9; i++) store(d_depthwise + i * channels + c, sums[i]);
    }
}

/* To the first layer, the contexts of the cells, their convolutions and the maps. */
INLINE void back_to_maps(const Branch *b, Scratch *s, int64_t image) {
    size_t D = b->embed_dim, n_numbers = 2 + b->n_channels;
    add_outer(s->numbers, n_numbers, s->tokens, D, b->k, b->d_first + image * b->apart);
    float *d_bias = b->d_first_bias + image * b->apart;
    for (int32_t t = 0; t < b->k; t++)
        for (size_t d = 0; d < D; d += LANES) store(d_bias + d, load(d_bias + d) + load(s->tokens + t * D + d));

    for (int m = 0; m < N_MAPS; m++) {
        memset(s->context[m], 0, s->n_wanted[m] * D * sizeof(float));
        for (int32_t t = 0; t < b->k; t++) {
            float *d_context = s->context[m] + s->cells[m][t] * D;
            for (size_t d = 0; d < D; d += LANES)
                store(d_context + d, load(d_context + d) + load(s->tokens + t * D + d));
        }
        back_through_convolutions(b, s, m, image);
        size_t row_size = (size_t)b->columns[m] * b->channels[m];
        float *d_map = b->d_maps[m] + image * n_cells(b, m) * b->channels[m];
        for (int32_t i = 0; i < b->rows[m]; i++)
            memcpy(d_map + i * row_size, s->d_frame[m] + (i + 1) * frame_pitch(b, m) + b->channels[m],
                   row_size * sizeof(float));
    }
}

/* Images `begin` to `end`; back if `is_back`, what is to be added to being 0. 0, or -1 if there is no memory. */
EACH_PROCESSOR
int sparseattn_branch(const Branch *branch, int64_t begin, int64_t end, int32_t is_back) {
    Scratch scratch;
    size_t size = lay_out(branch, &scratch, NULL);
    char *memory = calloc(size + 64, 1); /* zeros: the frames stay so */
    if (!memory) return -1;
    lay_out(branch, &scratch, memory + (64 - (uintptr_t)memory % 64));
    double *d_total = scratch.total + branch->key_dim + branch->embed_dim + branch->key_dim;
    for (int64_t image = begin; image < end; image++) {
        go_there(branch, &scratch, image);
        if (!is_back) {
            pool_tokens(branch, &scratch, image);
            continue;
        }
        back_to_readout(branch, &scratch, image, d_total);
        back_to_tokens(branch, &scratch, image, d_total);
        back_to_maps(branch, &scratch, image);
    }
    free(memory);
    return 0;
}

/* Of each of n_images rows of n scores, the k highest, ascending by index; of equal ones the first. 0; 1 if a score
   is not finite, -1 if there is no memory. */
EACH_PROCESSOR
int sparseattn_select(const float *scores, int64_t n_images, int32_t n, int32_t k, int64_t *pixels) {
    float *spare = malloc((n + LANES) * (sizeof(float) + sizeof(int32_t))), low, high;
    if (!spare) return -1;
    int failed = 0;
    for (; n_images > 0 && !failed; n_images--, scores += n, pixels += k) {
        int32_t room, found = 0;
        float sum = 0;
        for (int32_t i = 0; i < n; i++) sum += 0 * scores[i]; /* NaN unless all are finite */
        extremes(scores, n, &low, &high);
        if (sum != 0 || !(high - low < INFINITY)) failed = 1;
        if (failed) break;
        float threshold = threshold_of(scores, n, k, spare, (int32_t *)(spare + n + LANES), &room);
        for (int32_t first = 0; first < n; first += LANES) {
            if (first + LANES <= n && !any(load(scores + first) >= threshold)) continue;
            for (int32_t i = first; i < n && i < first + LANES && found < k; i++) {
                int equal = (scores[i] == threshold) & (room > 0);
                room -= equal;
                pixels[found] = i;
                found += (scores[i] > threshold) | equal;
            }
        }
    }
    free(spare);
    return failed;
}

/* So that branch.py can see that it speaks of the same fields. */
int64_t sparseattn_branch_size(void) { return sizeof(Branch); }

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_branch", "Functions for ctypes; see branch.py.", -1, NULL,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__branch(void) { return PyModule_Create(&module); }

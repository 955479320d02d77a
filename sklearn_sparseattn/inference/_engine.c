/* SparseAttnNet run on images, one image at a time, in memory that does not grow with their number. Numbers are float32;
   the coarse layers and all that is pooled are summed in float64.

   What is computed stands in network/; here is how, with batch norms folded into the layers before them.
   Plain C functions, called through ctypes with the interpreter lock released; the Python module in here is
   empty. Nothing is kept between calls but the memory that they are given, so any number of threads may call.

   Maps are (rows, columns, channels), framed by zeros: one cell (images: half a kernel), and on the right as many as a
   block of columns may reach beyond. Channels are padded with zeros to a multiple of LANES. Weights are (inputs,
   padded outputs), those of a convolution (size^2, inputs, padded outputs). */

#include <Python.h>

#include <time.h>

#include "../network/_select.h"

#define MOST_SIZE 7  /* of the kernel of the first layer */
#define N_LAYERS 5   /* convolutions of the coarse network, at most: early, one or two of middle, two of deep */
#define N_CONTEXT 2  /* stages that tokens look at: early, middle */
#define GROUP 3      /* cells convolved for tokens at a time */
#define BLOCK 6      /* tokens whose keys are made at a time */
#define RUN 60       /* tokens summed in float32 before they are added in float64 */
#define BAND 65536   /* numbers that tokens look up at a time, of each map: they stay in the cache */

/* ---- what engine.py fills in, with the same fields in the same order ---- */

typedef struct {
    int32_t n_inputs, n_outputs; /* padded, but for the channels of the image */
    int32_t stride, size;        /* of the kernel, odd: of the first layer up to MOST_SIZE, of others 3 */
    const double *weight, *bias;
} Layer;

typedef struct {
    int32_t height, width, n_channels, k;
    int32_t n_embed, n_pooled, n_classes;           /* as they are */
    int32_t embed_dim, key_dim, hidden_dim, n_logits; /* padded */
    int32_t n_layers, has_context, normalizes;
    int32_t shifts[N_CONTEXT]; /* a cell lies over every 2^shift-th pixel */
    int32_t ends[N_CONTEXT];   /* last layer of the stage */
    float key_epsilon, norm_epsilon, margin;
    double background;
    Layer layers[N_LAYERS];
    const double *bytes;                           /* what the values of a uint8 image are, over the background */
    const float *score;                            /* of the channels of the middle stage, then the bias */
    const float *position;                         /* (2 + n_channels, embed_dim), then the bias */
    const float *depthwise[N_CONTEXT];             /* 3x3 convolutions of each channel by itself; or NULL: then */
    const float *context[N_CONTEXT];               /* 3x3 convolutions to embed_dim, otherwise 1x1 */
    const float *turns;                            /* what each row of pixels over a cell loses in rank, LANES of
                                                      them for each, again and again; or NULL */
    const float *zeros;                            /* (embed_dim) */
    const float *key, *key_bias;                   /* the embedding's last layer is folded in */
    const float *cls_key, *query, *mean_key;       /* with epsilon; over heads; 1 / n_keys; 0 where padded */
    const float *embed, *embed_bias, *cls, *value; /* the embedding's last layer, for the pooled tokens */
    const float *norm_weight, *norm_bias;
    const float *first, *first_bias, *residual, *residual_bias, *last, *last_bias;
} Plan;

enum { COARSE, SELECTION, TOKENS, HEAD, N_PARTS };

/* Where the results of the first image go; those of the others follow. What is NULL is not wanted. */
typedef struct {
    float *logits, *features, *scores;
    int32_t *pixels;
    float *attention, *contribution;
    int8_t *failed;  /* 1 where numbers overflowed, and the results mean nothing */
    double *seconds; /* (N_PARTS), added to */
} Results;

/* ---- memory ---- */

typedef struct {
    int32_t rows, columns, channels;
    size_t pitch;        /* numbers from a row to the next */
    float *frame, *cell; /* the corner of the frame, and the first cell inside */
} Map;

/* The image less the background, framed like a map. */
typedef struct {
    size_t pitch;
    double *frame, *cell;
} Image;

typedef struct {
    Image image;
    Map maps[N_LAYERS];
    double *map_rows; /* three of them */
    float *cell_scores, *cell_row, *scores, *ranks, *candidates;
    float *context[N_CONTEXT];                   /* of the cells of a band, where they are wanted */
    char *is_wanted[N_CONTEXT];
    int32_t *wanted[N_CONTEXT], *cells[N_CONTEXT]; /* the cells wanted, and the cell of each token, in the band */
    int32_t band_rows[N_CONTEXT];
    int32_t *rows, *columns, *bins; /* rows and columns of the pixels chosen */
    float *gates, *tokens, *keys, *contribution, *head;
} Scratch;

/* Numbers in a row of a frame. Convolutions take some columns at a time, and the last ones reach beyond the frame: less
   than 2 * LANES cells, as there are at most 6 columns, at most 2 cells apart. */
static size_t pitch_of(int32_t columns, int32_t border, int32_t channels) {
    return (size_t)(columns + 2 * border + 2 * LANES) * channels;
}

static Map take_map(size_t *used, char *memory, int32_t rows, int32_t columns, int32_t channels) {
    Map map = {rows, columns, channels, 0, NULL, NULL};
    map.pitch = pitch_of(columns, 1, channels);
    map.frame = take_floats(used, memory, map.pitch * (rows + 2));
    map.cell = map.frame ? map.frame + map.pitch + channels : NULL;
    return map;
}

static Image take_image(size_t *used, char *memory, int32_t rows, int32_t columns, int32_t border, int32_t channels) {
    Image image = {pitch_of(columns, border, channels), NULL, NULL};
    image.frame = take(used, memory, image.pitch * (rows + 2 * border) * sizeof(double));
    image.cell = image.frame ? image.frame + border * (image.pitch + channels) : NULL;
    return image;
}

/* Lay everything out in `memory`; NULL only tells the bytes. */
static size_t lay_out(const Plan *plan, Scratch *scratch, char *memory) {
    size_t used = 0, n_pixels = (size_t)plan->height * plan->width, k = plan->k + BLOCK + LANES;
    size_t longest = 0; /* row of a map */
    int32_t rows = plan->height, columns = plan->width;
    scratch->image = take_image(&used, memory, rows, columns, plan->layers[0].size / 2, plan->n_channels);
    for (int l = 0; l < plan->n_layers; l++) {
        const Layer *layer = &plan->layers[l];
        rows = (rows - 1) / layer->stride + 1;
        columns = (columns - 1) / layer->stride + 1;
        scratch->maps[l] = take_map(&used, memory, rows, columns, layer->n_outputs);
        longest = scratch->maps[l].pitch > longest ? scratch->maps[l].pitch : longest;
    }
    scratch->map_rows = take(&used, memory, 3 * longest * sizeof(double));
    const Map *middle = &scratch->maps[plan->ends[1]];
    scratch->cell_scores = take_floats(&used, memory, (size_t)middle->rows * middle->columns);
    scratch->cell_row = take_floats(&used, memory, 2 * (middle->columns + 1));
    scratch->scores = take_floats(&used, memory, n_pixels + 2 * LANES);
    scratch->ranks = scratch->scores;
    if (plan->turns) scratch->ranks = take_floats(&used, memory, n_pixels + 2 * LANES);
    scratch->candidates = take_floats(&used, memory, n_pixels + LANES);
    for (int m = 0; m < N_CONTEXT; m++) {
        const Map *map = &scratch->maps[plan->ends[m]];
        int64_t fit = BAND / ((int64_t)map->columns * plan->embed_dim); /* whole maps if they are small */
        scratch->band_rows[m] = fit < 1 ? 1 : fit < map->rows ? fit : map->rows;
        size_t n = plan->has_context ? (size_t)scratch->band_rows[m] * map->columns : 0;
        scratch->context[m] = take_floats(&used, memory, n * plan->embed_dim);
        scratch->is_wanted[m] = take(&used, memory, n);
        scratch->wanted[m] = take(&used, memory, (n + GROUP) * sizeof(int32_t));
        scratch->cells[m] = take(&used, memory, k * sizeof(int32_t));
    }
    scratch->rows = take(&used, memory, k * sizeof(int32_t));
    scratch->columns = take(&used, memory, k * sizeof(int32_t));
    scratch->bins = take(&used, memory, (n_pixels + LANES) * sizeof(int32_t));
    scratch->gates = take_floats(&used, memory, k);
    scratch->contribution = take_floats(&used, memory, k);
    scratch->tokens = take_floats(&used, memory, k * plan->embed_dim);
    scratch->keys = take_floats(&used, memory, k * plan->key_dim);
    size_t widest = (size_t)plan->embed_dim + plan->key_dim + plan->hidden_dim + plan->n_pooled + plan->n_logits;
    scratch->head = take_floats(&used, memory, 8 * (widest + 2 * LANES));
    return used;
}

/* ---- vectors ---- */

/* exp by 2^n exp(r), |r| <= ln 2 / 2, the latter by its series; x within +-87. */
INLINE lanes exponential(lanes x) {
    lanes half = pick(x < 0, (lanes){} - 0.5f, (lanes){} + 0.5f);
    whole_lanes n = __builtin_convertvector(x * 1.44269504f + half, whole_lanes);
    lanes whole = __builtin_convertvector(n, lanes);
    lanes r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    lanes series = r * (1.0f / 5040) + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = (series * r + 1.0f) * r + 1.0f;
    return series * (lanes)((n + 127) << 23);
}

INLINE lanes sigmoid(lanes x) {
    lanes low = (lanes){} - 87.0f, high = (lanes){} + 87.0f;
    x = pick(x < low, low, pick(x > high, high, x));
    return 1.0f / (1.0f + exponential(-x));
}

/* ---- coarse network ---- */

/* LANES numbers. Where the processor has no vectors so long, GCC would take `whole` apart number by number, through
   memory: there it is two. The results are the same. */
typedef union { doubles whole; half_doubles halves[2]; } Sums;

INLINE Sums load_sums(const double *from, int whole) {
    Sums sums;
    if (whole) sums.whole = load_doubles(from);
    else UNROLL for (int h = 0; h < 2; h++) sums.halves[h] = load_half(from + h * (LANES / 2));
    return sums;
}

INLINE void add_product(Sums *sums, double factor, const double *weight, int whole) {
    if (whole) sums->whole += factor * load_doubles(weight);
    else UNROLL for (int h = 0; h < 2; h++) sums->halves[h] += factor * load_half(weight + h * (LANES / 2));
}

INLINE void store_rectified(float *to, const Sums *sums, int whole) {
    if (whole) store(to, rectified(__builtin_convertvector(sums->whole, lanes)));
    else UNROLL for (int h = 0; h < 2; h++) {
        four value = __builtin_convertvector(sums->halves[h], four);
        *(four *)(to + h * (LANES / 2)) = (four)((whole_four)value & (value > 0));
    }
}

/* One row of the outputs from `first` on, of a layer, from `size` rows of its input. The sums are in float64: scores
   can be a hundred times as large as the differences that choose pixels. */
INLINE void convolve_lanes(const double *const *input, size_t channels, float *output, const Map *out,
                           const Layer *layer, int size, int32_t first, int n_columns, int n_lanes, int whole) {
    size_t apart = layer->stride * channels;
    for (int32_t j = 0; j < out->columns; j += n_columns) {
        const double *weight = layer->weight + first;
        Sums sums[MOST_SUMS / 2]; /* twice as long as vectors of floats */
        UNROLL for (int c = 0; c < n_columns; c++)
            UNROLL for (int l = 0; l < n_lanes; l++)
                sums[c * n_lanes + l] = load_sums(layer->bias + first + l * LANES, whole);
        for (int row = 0; row < size; row++)
            for (const double *cell = input[row] + j * apart, *end = cell + size * channels; cell < end; cell++) {
                UNROLL for (int c = 0; c < n_columns; c++)
                    UNROLL for (int l = 0; l < n_lanes; l++)
                        add_product(&sums[c * n_lanes + l], cell[c * apart], weight + l * LANES, whole);
                weight += layer->n_outputs;
            }
        UNROLL for (int c = 0; c < n_columns; c++)
            UNROLL for (int l = 0; l < n_lanes; l++)
                if (j + c < out->columns)
                    store_rectified(output + first + (size_t)(j + c) * out->channels + l * LANES,
                                    &sums[c * n_lanes + l], whole);
    }
}

INLINE void convolve_row(const double *const *input, size_t channels, float *output, const Map *out,
                         const Layer *layer, int size, int whole) {
    int32_t first = 0, left = layer->n_outputs / LANES;
    for (; left >= 5 || left == 3; left -= 3, first += 3 * LANES)
        convolve_lanes(input, channels, output, out, layer, size, first, 2, 3, whole);
    for (; left >= 2; left -= 2, first += 2 * LANES)
        convolve_lanes(input, channels, output, out, layer, size, first, 3, 2, whole);
    if (left) convolve_lanes(input, channels, output, out, layer, size, first, 6, 1, whole);
}

/* Convolution, batch norm and ReLU, of the image or, if that is NULL, of the map of the layer before. */
INLINE void convolve(const Image *image, const Map *map, double *rows, const Map *out, const Layer *layer, int size) {
    size_t channels = layer->n_inputs, pitch = image ? image->pitch : map->pitch;
    for (int32_t i = 0; i < out->rows; i++) {
        size_t start = (size_t)i * layer->stride * pitch;
        const double *input[MOST_SIZE];
        for (int row = 0; row < size; row++, start += pitch) {
            input[row] = image ? image->frame + start : rows + row * pitch;
            for (size_t n = 0; n < pitch && !image; n++) rows[row * pitch + n] = map->frame[start + n];
        }
        float *output = out->cell + i * out->pitch;
        if (HAS_LONG_VECTORS) convolve_row(input, channels, output, out, layer, size, 1);
        else convolve_row(input, channels, output, out, layer, size, 0);
    }
}

/* Mean and maximum of each channel: (2 * n). */
INLINE void pool(const Map *map, int32_t n, float *pooled) {
    for (int32_t first = 0; first < n; first += LANES) {
        double total[LANES] = {0};
        lanes most = load(map->cell + first);
        for (int32_t i = 0; i < map->rows; i++) {
            const float *cell = map->cell + i * map->pitch + first;
            lanes sum = {0};
            for (int32_t j = 0; j < map->columns; j++, cell += map->channels) {
                lanes value = load(cell);
                sum += value;
                most = pick(value > most, value, most);
            }
            for (int l = 0; l < LANES; l++) total[l] += sum[l];
        }
        for (int l = 0; l < LANES && first + l < n; l++) {
            pooled[first + l] = total[l] / ((double)map->rows * map->columns);
            pooled[n + first + l] = most[l];
        }
    }
}

/* Scores of the cells, from them of the pixels between, linearly; 1 if they are not finite. */
INLINE int score(const Plan *plan, const Scratch *scratch) {
    const Map *middle = &scratch->maps[plan->ends[1]];
    int32_t rows = middle->rows, columns = middle->columns, step = 1 << plan->shifts[1];
    float *cell_score = scratch->cell_scores;
    int finite = 1;
    for (int32_t i = 0; i < rows; i++)
        for (int32_t j = 0; j < columns; j++, cell_score++) {
            const float *cell = middle->cell + i * middle->pitch + (size_t)j * middle->channels;
            half_doubles sum[2] = {0}; /* of large numbers of either sign */
            for (int32_t l = 0; l < middle->channels; l += LANES)
                UNROLL for (int h = 0; h < 2; h++)
                    sum[h] += __builtin_convertvector(*(const four *)(cell + l + h * (LANES / 2)), half_doubles) *
                              __builtin_convertvector(*(const four *)(plan->score + l + h * (LANES / 2)), half_doubles);
            double total = plan->score[middle->channels];
            for (int l = 0; l < LANES; l++) total += sum[l / (LANES / 2)][l % (LANES / 2)];
            *cell_score = total;
            finite &= fabsf(*cell_score) < 1e37f;
        }
    if (!finite) return 1;

    float *here = scratch->cell_row, *slope = here + columns, *to = scratch->scores;
    const four along = {0, 1.0f / 4, 2.0f / 4, 3.0f / 4};
    for (int32_t row = 0; row < plan->height; row++, to += plan->width) {
        const float *upper = scratch->cell_scores + (size_t)(row / step) * columns;
        const float *lower = row / step + 1 < rows ? upper + columns : upper;
        float part = (float)(row % step) / step;
        for (int32_t j = 0; j < columns; j++) here[j] = upper[j] + part * (lower[j] - upper[j]);
        for (int32_t j = 0; j + 1 < columns; j++) slope[j] = here[j + 1] - here[j];
        slope[columns - 1] = 0; /* beyond the last cell its score goes on */
        if (step == 4) /* what is written past the row's end, the next row writes over */
            for (int32_t j = 0; j < columns; j++) *(four *)(to + 4 * j) = here[j] + along * slope[j];
        else
            for (int32_t column = 0; column < plan->width; column++)
                to[column] = here[column / step] + (float)(column % step) / step * slope[column / step];
    }
    return 0;
}

/* ---- selection ---- */

/* Scores -> ranks. */
INLINE void rank_pixels(const Plan *plan, const Scratch *scratch) {
    int32_t step = 1 << plan->shifts[1];
    for (int32_t row = 0; row < plan->height; row++) {
        const float *from = scratch->scores + (size_t)row * plan->width;
        float *to = scratch->ranks + (size_t)row * plan->width;
        lanes turns = load(plan->turns + row % step * LANES);
        for (int32_t j = 0; j < plan->width; j += LANES) /* what is written past the row's end, the next writes over */
            store(to + j, load(from + j) - turns);
    }
}

/* The highest of n scores that are below the threshold, or at it beyond the first `room`. */
INLINE float highest_other(const float *scores, int32_t n, float threshold, int32_t room) {
    lanes below = (lanes){} - INFINITY;
    whole_lanes equal = {0};
    int32_t i = 0, n_equal = 0;
    for (; i + LANES <= n; i += LANES) {
        lanes score = load(scores + i);
        equal -= score == threshold;
        below = pick((score < threshold) & (score > below), score, below);
    }
    float highest = -INFINITY;
    for (int l = 0; l < LANES; l++) {
        n_equal += equal[l];
        highest = below[l] > highest ? below[l] : highest;
    }
    for (; i < n; i++) {
        n_equal += scores[i] == threshold;
        if (scores[i] < threshold && scores[i] > highest) highest = scores[i];
    }
    return n_equal > room ? threshold : highest;
}

/* The k pixels of the highest ranks, ascending; of equal ones the first. Returns the highest rank that was not
   chosen. */
INLINE float choose(const Plan *plan, const Scratch *scratch) {
    int32_t width = plan->width, n = plan->height * width, found = 0, room;
    const float *scores = scratch->ranks;
    int32_t *rows = scratch->rows, *columns = scratch->columns;
    float threshold = threshold_of(scores, n, plan->k, scratch->candidates, scratch->bins, &room);
    float highest = highest_other(scores, n, threshold, room);
    for (int32_t row = 0; row < plan->height; row++, scores += width)
        for (int32_t first = 0; first < width; first += LANES) {
            if (!any(load(scores + first) >= threshold)) continue;
            for (int32_t column = first; column < width && column < first + LANES; column++) {
                int equal = (scores[column] == threshold) & (room > 0);
                room -= equal;
                rows[found] = row; /* found <= k, and there is room for more */
                columns[found] = column;
                found += (scores[column] > threshold) | equal;
            }
        }
    return highest;
}

/* ---- tokens ---- */

/* The cell nearest to a pixel, of n along a side. */
INLINE int32_t nearest(int32_t pixel, int32_t shift, int32_t n) {
    int32_t cell = (pixel + (1 << shift) / 2) >> shift;
    return cell < n ? cell : n - 1;
}

/* The cells nearest to the tokens from `begin` on, as far as they lie in a band of rows from `top` on, and which
   are wanted at all; returns the first token below the band. */
INLINE int32_t find_cells(const Plan *plan, const Scratch *scratch, int m, int32_t begin, int32_t *top,
                          int32_t *n_wanted) {
    const Map *map = &scratch->maps[plan->ends[m]];
    int32_t shift = plan->shifts[m], last = -1, t = begin;
    *top = nearest(scratch->rows[begin], shift, map->rows);
    *n_wanted = 0;
    memset(scratch->is_wanted[m], 0, (size_t)scratch->band_rows[m] * map->columns);
    for (; t < plan->k; t++) {
        int32_t i = nearest(scratch->rows[t], shift, map->rows) - *top;
        if (i >= scratch->band_rows[m]) break;
        int32_t cell = scratch->cells[m][t] = i * map->columns + nearest(scratch->columns[t], shift, map->columns);
        if (cell == last) continue;
        last = cell;
        scratch->wanted[m][*n_wanted] = cell;
        *n_wanted += !scratch->is_wanted[m][cell];
        scratch->is_wanted[m][cell] = 1;
    }
    return t;
}

/* 3x3 of each channel by itself, then 1x1 of all, at GROUP cells. */
INLINE void convolve_apart(const Plan *plan, const Map *map, int m, const size_t *apart, int32_t first, int n_lanes,
                           lanes *sums) {
    float by_channel[GROUP * map->channels];
    size_t next[GROUP];
    for (int g = 0; g < GROUP; g++) {
        next[g] = (size_t)g * map->channels;
        for (int32_t c = 0; c < map->channels; c += LANES) {
            lanes sum = {0};
            const float *weight = plan->depthwise[m] + c;
            UNROLL for (int i = 0; i < 3; i++) {
                const float *from = map->frame + apart[g] + i * map->pitch + c;
                UNROLL for (int j = 0; j < 3; j++, from += map->channels, weight += map->channels)
                    sum += load(from) * load(weight);
            }
            store(by_channel + next[g] + c, sum);
        }
    }
    multiply(by_channel, next, 0, 0, 1, map->channels, plan->context[m] + first, plan->embed_dim, plan->zeros, GROUP,
             n_lanes, sums);
}

/* Convolve the wanted cells of a band, GROUP at a time, n_lanes vectors of outputs from `first` on. */
INLINE void convolve_wanted(const Plan *plan, const Scratch *scratch, int m, int32_t top, int32_t n_wanted,
                            int32_t first, int n_lanes) {
    const Map *map = &scratch->maps[plan->ends[m]];
    int32_t *wanted = scratch->wanted[m];
    for (int g = 0; g < GROUP; g++) wanted[n_wanted + g] = wanted[n_wanted - 1]; /* to fill the last group */
    for (int32_t w = 0; w < n_wanted; w += GROUP) {
        lanes sums[MOST_SUMS];
        size_t apart[GROUP];
        for (int g = 0; g < GROUP; g++) {
            int32_t i = wanted[w + g] / map->columns, j = wanted[w + g] - i * map->columns;
            apart[g] = (top + i) * map->pitch + (size_t)j * map->channels;
        }
        if (plan->depthwise[m])
            convolve_apart(plan, map, m, apart, first, n_lanes, sums);
        else
            multiply(map->frame, apart, map->pitch, map->channels, 3, map->channels,
                     plan->context[m] + first, plan->embed_dim, plan->zeros, GROUP, n_lanes, sums);
        UNROLL for (int g = 0; g < GROUP; g++)
            UNROLL for (int l = 0; l < n_lanes; l++)
                store(scratch->context[m] + (size_t)wanted[w + g] * plan->embed_dim + first + l * LANES,
                      sums[g * n_lanes + l]);
    }
}

/* Context for the tokens from `begin` on that lie in a band; returns the first token below it. */
INLINE int32_t make_context(const Plan *plan, const Scratch *scratch, int m, int32_t begin) {
    int32_t top, n_wanted, end = find_cells(plan, scratch, m, begin, &top, &n_wanted), first = 0;
    for (; first + 4 * LANES <= plan->embed_dim; first += 4 * LANES)
        convolve_wanted(plan, scratch, m, top, n_wanted, first, 4);
    for (; first < plan->embed_dim; first += LANES) convolve_wanted(plan, scratch, m, top, n_wanted, first, 1);
    return end;
}

/* All but the last linear layer of the embedding, of some tokens; n_lanes is embed_dim / LANES, known to the
   compiler or not. */
INLINE void make_some_tokens(const Plan *plan, const Scratch *scratch, int32_t begin, int32_t end, int n_lanes) {
    const float *weight = plan->position, *bias = weight + (size_t)(2 + plan->n_channels) * plan->embed_dim;
    for (int32_t t = begin; t < end; t++) {
        int32_t row = scratch->rows[t], column = scratch->columns[t];
        float x = (2 * column + 1.0f) / plan->width - 1, y = (2 * row + 1.0f) / plan->height - 1;
        const double *values = scratch->image.cell + row * scratch->image.pitch + (size_t)column * plan->n_channels;
        const float *context[N_CONTEXT];
        for (int m = 0; m < N_CONTEXT && plan->has_context; m++)
            context[m] = scratch->context[m] + (size_t)scratch->cells[m][t] * plan->embed_dim;
        float *token = scratch->tokens + (size_t)t * plan->embed_dim;
        for (int l = 0; l < n_lanes; l++) {
            const float *factors = weight + l * LANES;
            lanes sum = load(bias + l * LANES) + x * load(factors) + y * load(factors + plan->embed_dim);
            for (int32_t c = 0; c < plan->n_channels; c++)
                sum += (float)values[c] * load(factors + (size_t)(2 + c) * plan->embed_dim);
            if (plan->has_context) {
                for (int m = 0; m < N_CONTEXT; m++) sum += load(context[m] + l * LANES);
                store(token + l * LANES, rectified(sum) * scratch->gates[t]);
            } else
                store(token + l * LANES, rectified(sum));
        }
    }
}

/* Factors of the tokens; `others` is the highest rank that was not chosen. */
INLINE void open_gates(const Plan *plan, const Scratch *scratch, float others) {
    for (int32_t t = 0; t < plan->k; t += LANES) {
        lanes score = {0}, rank = {0};
        for (int l = 0; l < LANES && t + l < plan->k; l++) {
            size_t pixel = (size_t)scratch->rows[t + l] * plan->width + scratch->columns[t + l];
            score[l] = scratch->scores[pixel];
            rank[l] = scratch->ranks[pixel];
        }
        lanes gate = sigmoid(score), part = (rank - others) / plan->margin;
        /* From 0 on; endless, or not a number, if there is no margin or nothing else to choose. */
        store(scratch->gates + t, pick(part < 1, gate * part, gate));
    }
}

/* Keys of some tokens, without epsilon; their sums are added to `total`, (key_dim). */
INLINE void make_keys(const Plan *plan, const Scratch *scratch, int32_t begin, int32_t end, int32_t embed_dim,
                      int32_t key_dim, double *total) {
    size_t apart[BLOCK];
    UNROLL for (int b = 0; b < BLOCK; b++) apart[b] = (size_t)b * embed_dim;
    for (int32_t start = begin; start < end; start += RUN)
        for (int32_t first = 0; first < key_dim; first += 2 * LANES) {
            lanes run[2] = {{0}, {0}};
            for (int32_t t = start; t < plan->k && t < start + RUN; t += BLOCK) {
                lanes sums[MOST_SUMS];
                float *key = scratch->keys + (size_t)t * key_dim + first;
                multiply(scratch->tokens + (size_t)t * embed_dim, apart, 0, 0, 1, plan->n_embed, plan->key + first,
                         key_dim, plan->key_bias + first, BLOCK, 2, sums);
                UNROLL for (int b = 0; b < BLOCK; b++)
                    UNROLL for (int l = 0; l < 2; l++) {
                        lanes value = rectified(sums[2 * b + l]);
                        store(key + (size_t)b * key_dim + l * LANES, value);
                        if (t + b < plan->k) run[l] += value; /* the last block goes on into spare tokens */
                    }
            }
            for (int i = 0; i < 2 * LANES; i++) total[first + i] += run[i / LANES][i % LANES];
        }
}

/* Tokens, their keys, and the sums of these over all tokens, (key_dim) in float64. Tokens come in rows from the top:
   a band of each map at a time is enough, the bands move down, and keys are made of tokens that are still in the
   cache. */
INLINE void make_tokens(const Plan *plan, const Scratch *scratch, int embed_lanes, int key_lanes, double *total) {
    int32_t ready[N_CONTEXT] = {0}, with_keys = 0, end;
    for (int32_t i = 0; i < key_lanes * LANES; i++) total[i] = 0;
    for (int32_t t = 0; t < plan->k; t = end) {
        end = plan->k;
        for (int m = 0; m < N_CONTEXT && plan->has_context; m++) {
            if (ready[m] == t) ready[m] = make_context(plan, scratch, m, t);
            end = ready[m] < end ? ready[m] : end;
        }
        make_some_tokens(plan, scratch, t, end, embed_lanes);
        int32_t whole = end < plan->k ? end - end % RUN : end;
        make_keys(plan, scratch, with_keys, whole, embed_lanes * LANES, key_lanes * LANES, total);
        with_keys = whole;
    }
}

/* Each token's (key + epsilon) @ readout, and the sum of the tokens by it, (embed_dim) in float64. */
INLINE void sum_tokens(const Plan *plan, const Scratch *scratch, const float *readout, int embed_lanes, int key_lanes,
                       double *total) {
    float offset = 0;
    for (int32_t i = 0; i < key_lanes * LANES; i++) offset += readout[i];
    offset *= plan->key_epsilon;
    for (int32_t i = 0; i < embed_lanes * LANES; i++) total[i] = 0;
    for (int32_t start = 0; start < plan->k; start += RUN) {
        lanes run[embed_lanes];
        UNROLL for (int l = 0; l < embed_lanes; l++) run[l] = (lanes){0};
        for (int32_t t = start; t < plan->k && t < start + RUN; t++) {
            const float *key = scratch->keys + (size_t)t * key_lanes * LANES;
            const float *token = scratch->tokens + (size_t)t * embed_lanes * LANES;
            lanes sum = {0};
            UNROLL for (int l = 0; l < key_lanes; l++) sum += load(key + l * LANES) * load(readout + l * LANES);
            float weight = scratch->contribution[t] = sum_of(sum) + offset;
            UNROLL for (int l = 0; l < embed_lanes; l++) run[l] += weight * load(token + l * LANES);
        }
        for (int32_t i = 0; i < embed_lanes * LANES; i++) total[i] += run[i / LANES][i % LANES];
    }
}

/* Each token's (key + epsilon) @ readout. */
INLINE void read_out(const Plan *plan, const Scratch *scratch, const float *readout, float *to) {
    float offset = 0;
    for (int32_t i = 0; i < plan->key_dim; i++) offset += readout[i];
    offset *= plan->key_epsilon;
    for (int32_t t = 0; t < plan->k; t++) {
        lanes sum = {0};
        for (int32_t i = 0; i < plan->key_dim; i += LANES)
            sum += load(scratch->keys + (size_t)t * plan->key_dim + i) * load(readout + i);
        to[t] = sum_of(sum) + offset;
    }
}

/* ---- head ---- */

/* to = from @ weight + bias, n_outputs padded. */
INLINE void affine(const float *from, int32_t n_inputs, const float *weight, const float *bias, int32_t n_outputs,
                   float *to) {
    for (int32_t o = 0; o < n_outputs; o += LANES) {
        lanes even = load(bias + o), odd = {0};
        int32_t n = 0;
        for (; n + 1 < n_inputs; n += 2) {
            even += from[n] * load(weight + (size_t)n * n_outputs + o);
            odd += from[n + 1] * load(weight + (size_t)(n + 1) * n_outputs + o);
        }
        if (n < n_inputs) even += from[n] * load(weight + (size_t)n * n_outputs + o);
        store(to + o, even + odd);
    }
}

INLINE void rectify(float *values, int32_t n) {
    for (int32_t i = 0; i < n; i += LANES) store(values + i, rectified(load(values + i)));
}

INLINE void layer_norm(const Plan *plan, const float *from, float *to) {
    double mean = 0, variance = 0;
    for (int32_t i = 0; i < plan->n_embed; i++) mean += from[i];
    mean /= plan->n_embed;
    for (int32_t i = 0; i < plan->n_embed; i++) variance += (from[i] - mean) * (from[i] - mean);
    double factor = 1 / sqrt(variance / plan->n_embed + plan->norm_epsilon);
    for (int32_t i = 0; i < plan->n_embed; i++)
        to[i] = (from[i] - mean) * factor * plan->norm_weight[i] + plan->norm_bias[i];
}

/* Tokens -> z_fine, (n_embed) from `features` on, and contributions. */
INLINE void attend(const Plan *plan, const Scratch *scratch, int embed_lanes, int key_lanes, float *features,
                   float *attention) {
    int32_t embed_dim = embed_lanes * LANES, key_dim = key_lanes * LANES;
    double total[key_dim], sums[embed_dim], cls_weight = 0, all = 0;
    float readout[key_dim], attended[key_dim];
    make_tokens(plan, scratch, embed_lanes, key_lanes, total);
    for (int32_t i = 0; i < key_dim; i++) {
        total[i] += plan->k * (double)plan->key_epsilon + plan->cls_key[i];
        readout[i] = plan->query[i] / total[i];
        attended[i] = plan->mean_key[i] / total[i];
        cls_weight += plan->cls_key[i] * (double)readout[i];
    }
    sum_tokens(plan, scratch, readout, embed_lanes, key_lanes, sums);
    for (int32_t t = 0; t < plan->k; t++) all += scratch->contribution[t];
    if (attention) read_out(plan, scratch, attended, attention);

    float *pooled = scratch->head, *embedded = pooled + plan->embed_dim, *fine = embedded + plan->embed_dim;
    for (int32_t i = 0; i < plan->embed_dim; i++) pooled[i] = sums[i];
    affine(pooled, plan->n_embed, plan->embed, plan->zeros, plan->embed_dim, embedded);
    for (int32_t i = 0; i < plan->embed_dim; i++)
        embedded[i] += all * plan->embed_bias[i] + cls_weight * plan->cls[i];
    affine(embedded, plan->n_embed, plan->value, plan->zeros, plan->embed_dim, fine);
    if (plan->normalizes)
        layer_norm(plan, fine, features);
    else
        memcpy(features, fine, sizeof(float) * plan->n_embed);
}

/* Residual MLP; 1 if a logit is not finite. */
INLINE int classify(const Plan *plan, const Scratch *scratch, const float *features, float *logits) {
    float *hidden = scratch->head + 4 * plan->embed_dim, *more = hidden + plan->hidden_dim;
    float *answer = more + plan->hidden_dim;
    affine(features, plan->n_embed + plan->n_pooled, plan->first, plan->first_bias, plan->hidden_dim, hidden);
    rectify(hidden, plan->hidden_dim);
    affine(hidden, plan->hidden_dim, plan->residual, plan->residual_bias, plan->hidden_dim, more);
    rectify(more, plan->hidden_dim);
    for (int32_t i = 0; i < plan->hidden_dim; i++) hidden[i] += more[i];
    affine(hidden, plan->hidden_dim, plan->last, plan->last_bias, plan->n_logits, answer);
    int failed = 0;
    for (int32_t i = 0; i < plan->n_classes; i++) {
        logits[i] = answer[i];
        failed |= !isfinite(answer[i]);
    }
    return failed;
}

/* ---- images ---- */

/* (height, width, channels) of uint8, or (channels, height, width) already scaled, into the frame. */
INLINE void read_image(const Plan *plan, const Image *image, const uint8_t *bytes, const float *scaled) {
    size_t n = plan->n_channels, width = plan->width;
    for (int32_t i = 0; i < plan->height; i++) {
        double *to = image->cell + i * image->pitch;
        if (bytes)
            for (size_t j = 0; j < width * n; j++) to[j] = plan->bytes[bytes[i * width * n + j]];
        else
            for (size_t c = 0; c < n; c++)
                for (size_t j = 0; j < width; j++)
                    to[j * n + c] = scaled[(c * plan->height + i) * width + j] - plan->background;
    }
}

INLINE double now(const Results *results) {
    struct timespec time = {0};
    if (results->seconds) timespec_get(&time, TIME_UTC);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

INLINE int run_image(const Plan *plan, const Scratch *scratch, const Results *results, float *features,
                     float *logits, float *attention) {
    double times[N_PARTS + 1] = {now(results)};
    const Map *map = scratch->maps;
    if (plan->layers[0].size == 3) /* the default, known to the compiler */
        convolve(&scratch->image, NULL, NULL, map, plan->layers, 3);
    else
        convolve(&scratch->image, NULL, NULL, map, plan->layers, plan->layers[0].size);
    for (int l = 1; l < plan->n_layers; l++, map++)
        convolve(NULL, map, scratch->map_rows, map + 1, &plan->layers[l], 3);
    pool(map, plan->n_pooled / 2, features + plan->n_embed);
    if (score(plan, scratch)) return 1;
    times[1] = now(results);
    if (plan->turns) rank_pixels(plan, scratch);
    float others = choose(plan, scratch);
    times[2] = now(results);
    if (plan->has_context) open_gates(plan, scratch, others);
    if (plan->embed_dim == 32 && plan->key_dim == 32) /* the default, with the loops unrolled */
        attend(plan, scratch, 4, 4, features, attention);
    else
        attend(plan, scratch, plan->embed_dim / LANES, plan->key_dim / LANES, features, attention);
    times[3] = now(results);
    int failed = classify(plan, scratch, features, logits);
    times[4] = now(results);
    for (int p = 0; p < N_PARTS && results->seconds; p++) results->seconds[p] += times[p + 1] - times[p];
    return failed;
}

/* Bytes to work in; `memory`, if there is some, is made ready: the frames of the image and of the maps, which come
   first, are zeros and stay so. */
int64_t sparseattn_scratch(const Plan *plan, char *memory) {
    Scratch scratch;
    size_t size = lay_out(plan, &scratch, NULL);
    if (memory) {
        lay_out(plan, &scratch, memory);
        memset(memory, 0, (char *)scratch.map_rows - memory);
    }
    return size;
}

/* Run n images: uint8, or, if that is NULL, scaled. No other call may work in the same memory at the time. */
EACH_PROCESSOR
void sparseattn_run(const Plan *plan, const uint8_t *bytes, const float *scaled, int64_t n, const Results *results,
                    char *memory) {
    Scratch scratch;
    lay_out(plan, &scratch, memory);
    size_t n_pixels = (size_t)plan->height * plan->width, n_values = n_pixels * plan->n_channels;
    size_t n_features = plan->n_embed + plan->n_pooled, k = plan->k;
    for (int64_t i = 0; i < n; i++) {
        read_image(plan, &scratch.image, bytes ? bytes + i * n_values : NULL, bytes ? NULL : scaled + i * n_values);
        results->failed[i] = run_image(plan, &scratch, results, results->features + i * n_features,
                                       results->logits + (size_t)i * plan->n_classes,
                                       results->attention ? results->attention + i * k : NULL);
        if (results->scores) memcpy(results->scores + i * n_pixels, scratch.scores, n_pixels * sizeof(float));
        for (size_t t = 0; t < k && results->pixels; t++)
            results->pixels[i * k + t] = scratch.rows[t] * plan->width + scratch.columns[t];
        if (results->contribution)
            memcpy(results->contribution + i * k, scratch.contribution, k * sizeof(float));
    }
}

/* So that engine.py can see that it speaks of the same fields. */
int sparseattn_sizes(int64_t *plan, int64_t *results) {
    *plan = sizeof(Plan);
    *results = sizeof(Results);
    return 0;
}

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_engine", "Functions for ctypes; see engine.py.", -1, NULL,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__engine(void) { return PyModule_Create(&module); }

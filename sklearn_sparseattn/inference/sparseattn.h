/* The C interface of the prediction engine: a fitted network, run on images.

   engine.py fills in a plan from a fitted network and calls this library through ctypes; another program may do the
   same. Nothing is kept between calls but the memory that the caller gives, so any number of threads may call, each
   with its own memory. An image's results are the same bits whatever else is in the call, on one machine.

   Weights are float32, (inputs, outputs), aligned to 64 bytes, batch norms folded in. Outputs, with their biases, are
   padded with zeros to a multiple of 32; the channels of the early map, as outputs and as inputs, to a multiple of 8, those
   of the middle map to a multiple of 16. A convolution's inputs are in the order (row, column, channel) of its kernel. */

#ifndef SPARSEATTN_H
#define SPARSEATTN_H

#include <stdint.h>

#ifdef _WIN32
#define SPARSEATTN_API __declspec(dllexport)
#else
#define SPARSEATTN_API __attribute__((visibility("default")))
#endif

#define SPARSEATTN_MOST_LAYERS 8

/* A fitted network for images of one size. */
typedef struct {
    int32_t height, width, n_channels;                         /* of the images */
    int32_t kernel_size, stride_early, stride_middle;          /* 3, 5 or 7; 1 or 2 */
    int32_t n_early, n_middle;                                 /* channels of the maps, not padded */
    int32_t embed_dim, n_keys, n_layers, hidden_dim, n_classes; /* not padded */
    double exact_low, exact_span, least, most; /* a value v becomes (v - low) / span, clipped to [least, most]; */
    float low, span, background;               /* then the background is taken from it */
    float key_epsilon, norm_epsilon;
    const float *bytes;              /* (256) what each uint8 value becomes, less the background */
    const float *early, *early_bias; /* inputs in the order (row, channel, column), each output twice in succession */
    const float *middle, *middle_bias;
    const float *score;              /* (n_middle, padded), then the bias */
    const float *token, *token_bias; /* inputs x, y, 3x3 middle cells, the early cells under the tile */
    const float *layers[SPARSEATTN_MOST_LAYERS], *layer_biases[SPARSEATTN_MOST_LAYERS];
    const float *key, *key_bias;                 /* the tokens' last linear layer is folded into these */
    const float *cls_key, *query;                /* K+ of the CLS token; its query over the number of heads */
    const float *value, *value_bias, *cls_value; /* and into these, but for that of the CLS token */
    const float *norm_weight, *norm_bias;
    const float *first, *first_bias, *residual, *residual_bias, *last, *last_bias;
} sparseattn_plan;

/* Where the results of the first image go; those of the others follow. What is NULL is not wanted, but for the first
   three. n_tiles are chosen of N. */
typedef struct {
    int8_t *failed;                  /* 1 where float32 overflowed: the other results of this image mean nothing */
    float *logits, *features;        /* (n_classes); (2 * embed_dim + 2 * n_middle) */
    float *scores;                   /* (N) coarse attention before the sigmoid */
    int32_t *tiles;                  /* (n_tiles) raster indices, ascending */
    float *attention, *contribution; /* (n_tiles) in the order of `tiles` */
    double *seconds;                 /* (4), added to: coarse network, selection, tokens with attention, classifier */
} sparseattn_results;

/* Bytes of memory to work in when n_tiles are chosen. If `memory` (aligned to 64 bytes) is not NULL, it is made ready;
   it is then ready for fewer tiles, too. */
SPARSEATTN_API int64_t sparseattn_scratch(const sparseattn_plan *plan, int32_t n_tiles, void *memory);

/* What the values of images are. */
enum { SPARSEATTN_UINT8, SPARSEATTN_UINT16, SPARSEATTN_FLOAT32, SPARSEATTN_FLOAT64 };

/* Run n images of one kind, (n, height, width, n_channels), and choose n_tiles of each. An image with NaN fails. */
SPARSEATTN_API void sparseattn_run(const sparseattn_plan *plan, int32_t n_tiles, const void *images, int32_t kind,
                                   int64_t n, const sparseattn_results *results, void *memory);

/* Sizes of the two structures, so that a caller can check that it means the same. */
SPARSEATTN_API void sparseattn_sizes(int64_t *plan, int64_t *results);

/* The vector extension in use, "AVX-512" for example. The environment variable SPARSEATTN_MOST_LANES (16, 8 or 4 floats
   in a vector), read at the first call, allows no longer ones: with it, results of lesser processors can be had. */
SPARSEATTN_API const char *sparseattn_extension(void);

/* Files and their digests that the library was built from, "name:digest,...", if the build says so. */
SPARSEATTN_API const char *sparseattn_sources(void);

#endif

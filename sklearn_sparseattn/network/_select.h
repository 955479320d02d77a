/* The k highest of many scores, by their k-th: found by counting, so that nothing is sorted. */

#ifndef SPARSEATTN_SELECT_H
#define SPARSEATTN_SELECT_H

#include "_lanes.h"

#define BINS 1024 /* of scores */
#define FEW 24    /* scores that are rather sorted */

INLINE int any(whole_lanes condition) {
    union { whole_lanes lanes; int64_t halves[LANES / 2]; } is = {condition};
    return (is.halves[0] | is.halves[1] | is.halves[2] | is.halves[3]) != 0;
}

/* Least and greatest of n numbers. */
INLINE void extremes(const float *from, int32_t n, float *low, float *high) {
    lanes least = (lanes){} + from[0], most = least;
    int32_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        lanes value = load(from + i);
        least = pick(value < least, value, least);
        most = pick(value > most, value, most);
    }
    *low = least[0], *high = most[0];
    for (int l = 1; l < LANES; l++) {
        *low = least[l] < *low ? least[l] : *low;
        *high = most[l] > *high ? most[l] : *high;
    }
    for (; i < n; i++) {
        *low = from[i] < *low ? from[i] : *low;
        *high = from[i] > *high ? from[i] : *high;
    }
}

/* The k-th highest of n numbers, k <= n <= FEW, which are sorted. */
INLINE float kth_of_few(float *values, int32_t n, int32_t k) {
    for (int32_t i = 1; i < n; i++) {
        float value = values[i];
        int32_t j = i;
        for (; j > 0 && values[j - 1] < value; j--) values[j] = values[j - 1];
        values[j] = value;
    }
    return values[k - 1];
}

/* Floats in their order as whole numbers, and back. */
INLINE int32_t rank_of(float value) {
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits ^ (bits >> 31 & INT32_MAX);
}

INLINE float of_rank(int32_t rank) {
    int32_t bits = rank ^ (rank >> 31 & INT32_MAX);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Halve the range of ranks until one is left: for numbers so close that bins cannot tell them apart. As floats,
   the middle of two small ones would be 0 where PyTorch was told to flush them. */
INLINE float kth_by_halves(const float *values, int32_t n, int32_t k, float least, float most) {
    int64_t low = rank_of(least), high = rank_of(most);
    while (low < high) { /* at least k are >= low, fewer than k are > high */
        int32_t middle = (low + high + 1) >> 1, from_there = 0;
        for (int32_t i = 0; i < n; i++) from_there += rank_of(values[i]) >= middle;
        if (from_there >= k)
            low = middle;
        else
            high = (int64_t)middle - 1;
    }
    return of_rank(low);
}

/* The k-th highest of n numbers; `spare`, which has room for n + LANES, is overwritten. */
INLINE float kth_highest(const float *from, int32_t n, int32_t k, float *spare, int32_t *bins) {
    for (;;) {
        float low, high;
        extremes(from, n, &low, &high);
        if (low == high) return low;
        float scale = (BINS - 1) / (high - low);
        if (!(scale < INFINITY)) return kth_by_halves(from, n, k, low, high);

        /* Counted in four tables, as neighbouring pixels fall into the same bin. */
        int32_t counts[4][BINS];
        memset(counts, 0, sizeof counts);
        int32_t i = 0;
        for (; i + LANES <= n; i += LANES) {
            whole_lanes bin = __builtin_convertvector((load(from + i) - low) * scale, whole_lanes);
            *(whole_lanes *)(bins + i) = bin;
        }
        for (; i < n; i++) bins[i] = (from[i] - low) * scale;
        for (i = 0; i < n; i++) counts[i % 4][bins[i]]++;
        int32_t bin = BINS, above = 0, inside = 0, kept = 0;
        while (above + inside < k) {
            above += inside;
            bin--;
            inside = counts[0][bin] + counts[1][bin] + counts[2][bin] + counts[3][bin];
        }
        for (i = 0; i < n; i += LANES) {
            if (i + LANES <= n && !any(*(whole_lanes *)(bins + i) == bin)) continue;
            for (int32_t l = i; l < n && l < i + LANES; l++) {
                float value = from[l];
                spare[kept] = value; /* kept <= l: nothing is lost where `from` is `spare` */
                kept += bins[l] == bin;
            }
        }
        from = spare, n = kept, k -= above;
        if (n <= FEW) return kth_of_few(spare, n, k);
    }
}

/* The k-th highest of n finite scores, and how many of those that equal it are among the k. */
INLINE float threshold_of(const float *scores, int32_t n, int32_t k, float *spare, int32_t *bins, int32_t *room) {
    *room = 0;
    if (k == n) return -INFINITY;
    float threshold = kth_highest(scores, n, k, spare, bins);
    int32_t higher = 0;
    for (int32_t i = 0; i < n; i++) higher += scores[i] > threshold;
    *room = k - higher;
    return threshold;
}

#endif

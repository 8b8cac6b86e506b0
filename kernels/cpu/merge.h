/* Merging of full slots: the function of kernels/cpu/slot_merge.py, one call for all heads and rounds.

   x [heads, items, width] means and n [heads, items] counts, in place; the first `dim` columns of x are the key.
   sizes[r] items are left after round r, those of the last round in front. At most 2 * 65535 items.

   A round finds for each even item its cheapest odd one: a matrix product in blocks of 4 even items by 2 LANES odd ones
   that stay in registers, then costs as bfloat16 bits with the odd item's index below them, so that the least of these
   32-bit keys is the cheapest partner, and on ties the first. Items stay where they are until the last round. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define RESOLUTION 1e-6f
#define LANES 16
#define ROWS 4

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4)));

typedef struct {
    int64_t padded, *order, *partner; /* odd items in whole blocks; where the items stand; whom an even item would join */
    float *odd, *squares, *inverse;   /* [dim,padded], [padded], [padded] of the odd items, centred */
    uint32_t *lane;                   /* [padded]: the odd item's index, all ones where there is none */
    uint64_t *offer;                  /* the cheapest offers so far, in order: cost, then the even item */
} bench;

static inline words least(words a, words b) {
    words less = (words)(a < b);
    return (a & less) | (b & ~less);
}

/* The keys of LANES odd items from j on: bits of a cost >= 0 rounded to bfloat16, and the lane below them. */
static inline words keys_of(floats product, const bench *s, int64_t j, float square, float inverse) {
    floats distance = (square + *(floats *)(s->squares + j)) * (1.0f - RESOLUTION) - 2.0f * product;
    words bits = (words)distance & (words)(distance > 0.0f);
    bits = (words)((floats)bits / (inverse + *(floats *)(s->inverse + j)));
    return ((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u) | *(words *)(s->lane + j);
}

/* best[r] <- the least key of even item r of four, a [ROWS,dim] */
static void cheapest(const float *restrict a, const float *square, const float *inverse, const bench *s, int64_t dim,
                     uint32_t *best) {
    words found[ROWS];
    for (int64_t r = 0; r < ROWS; r++) found[r] = (words){0} - 1;
    int64_t j = 0;
    for (; j + 2 * LANES <= s->padded; j += 2 * LANES) {
        floats sum[ROWS][2] = {{{0}}};
        for (int64_t e = 0; e < dim; e++) {
            floats left = *(floats *)(s->odd + e * s->padded + j), right = *(floats *)(s->odd + e * s->padded + j + LANES);
            for (int64_t r = 0; r < ROWS; r++) {
                sum[r][0] += a[r * dim + e] * left;
                sum[r][1] += a[r * dim + e] * right;
            }
        }
        for (int64_t r = 0; r < ROWS; r++)
            for (int64_t half = 0; half < 2; half++)
                found[r] = least(found[r], keys_of(sum[r][half], s, j + half * LANES, square[r], inverse[r]));
    }
    if (j < s->padded) {
        floats sum[ROWS] = {{0}};
        for (int64_t e = 0; e < dim; e++) {
            floats last = *(floats *)(s->odd + e * s->padded + j);
            for (int64_t r = 0; r < ROWS; r++) sum[r] += a[r * dim + e] * last;
        }
        for (int64_t r = 0; r < ROWS; r++) found[r] = least(found[r], keys_of(sum[r], s, j, square[r], inverse[r]));
    }
    for (int64_t r = 0; r < ROWS; r++) {
        best[r] = UINT32_MAX;
        for (int64_t l = 0; l < LANES; l++) best[r] = found[r][l] < best[r] ? found[r][l] : best[r];
    }
}

/* The odd items side by side, less their mean, which distances do not see but rounding does. */
static void lay_out(const float *x, const float *n, int64_t odds, int64_t width, int64_t dim, int64_t sinks, bench *s,
                    float *centre) {
    for (int64_t e = 0; e < dim; e++) centre[e] = 0.0f;
    for (int64_t j = 0; j < odds; j++)
        for (int64_t e = 0; e < dim; e++) centre[e] += x[s->order[2 * j + 1] * width + e];
    for (int64_t e = 0; e < dim; e++) centre[e] /= (float)odds;
    s->padded = (odds + LANES - 1) / LANES * LANES;
    for (int64_t j = 0; j < s->padded; j++) {
        const float *row = x + s->order[j < odds ? 2 * j + 1 : 1] * width;
        float square = 0.0f;
        for (int64_t e = 0; e < dim; e++) {
            float value = s->odd[e * s->padded + j] = row[e] - centre[e];
            square += value * value;
        }
        s->squares[j] = square;
        s->inverse[j] = 1.0f / n[s->order[j < odds ? 2 * j + 1 : 1]];
        s->lane[j] = j < odds && j >= sinks / 2 ? (uint32_t)j : UINT32_MAX;
    }
}

static void merge_round(float *x, float *n, int64_t items, int64_t size, int64_t width, int64_t dim, int64_t sinks,
                        bench *s) {
    int64_t odds = items / 2, evens = items - odds, goes = items - size, held = 0;
    float centre[dim], a[ROWS * dim], square[ROWS], inverse[ROWS];
    uint32_t best[ROWS];
    lay_out(x, n, odds, width, dim, sinks, s, centre);
    for (int64_t i = (sinks + 1) / 2; i < evens; i += ROWS) {
        int64_t rows = evens - i < ROWS ? evens - i : ROWS;
        for (int64_t r = 0; r < ROWS; r++) {
            int64_t item = s->order[2 * (r < rows ? i + r : i)];
            square[r] = 0.0f;
            inverse[r] = 1.0f / n[item];
            for (int64_t e = 0; e < dim; e++) {
                a[r * dim + e] = x[item * width + e] - centre[e];
                square[r] += a[r * dim + e] * a[r * dim + e];
            }
        }
        cheapest(a, square, inverse, s, dim, best);
        for (int64_t r = 0; r < rows; r++) {
            s->partner[i + r] = best[r] & 0xffff;
            uint64_t key = ((uint64_t)(best[r] & 0xffff0000u) << 32) | (uint64_t)(i + r);
            if (held == goes && key >= s->offer[held - 1]) continue;
            int64_t at = held < goes ? held++ : held - 1;
            for (; at > 0 && s->offer[at - 1] > key; at--) s->offer[at] = s->offer[at - 1];
            s->offer[at] = key;
        }
    }
    for (int64_t g = 0; g < goes; g++) {
        int64_t i = (int64_t)(s->offer[g] & 0xffffffffu), from = s->order[2 * i], to = s->order[2 * s->partner[i] + 1];
        float sum = n[from] + n[to], share = n[from] / sum;
        for (int64_t e = 0; e < width; e++) x[to * width + e] += share * (x[from * width + e] - x[to * width + e]);
        n[to] = sum;
        n[from] = 0.0f;
    }
    for (int64_t j = 0, at = 0; j < items; j++)
        if (n[s->order[j]] != 0.0f) s->order[at++] = s->order[j];
}

static void merge_head(float *x, float *n, int64_t items, int64_t width, int64_t dim, const int64_t *sizes,
                       int64_t rounds, int64_t sinks, bench *s) {
    int64_t held = items;
    for (int64_t j = 0; j < items; j++) s->order[j] = j;
    for (int64_t r = 0; r < rounds; held = sizes[r++]) merge_round(x, n, held, sizes[r], width, dim, sinks, s);
    for (int64_t at = 0; at < held; at++) {
        if (s->order[at] == at) continue;
        memcpy(x + at * width, x + s->order[at] * width, (size_t)width * sizeof(float));
        n[at] = n[s->order[at]];
    }
}

/* Room for one head of `items`; free(what is returned) when done, NULL where memory is short. */
static void *make_bench(int64_t items, int64_t dim, bench *s) {
    int64_t padded = (items / 2 + LANES - 1) / LANES * LANES;
    char *room = malloc((size_t)(3 * items * 8 + (dim + 3) * padded * 4));
    s->order = (int64_t *)room;
    s->partner = s->order + items;
    s->offer = (uint64_t *)(s->partner + items);
    s->odd = (float *)(s->offer + items);
    s->squares = s->odd + dim * padded;
    s->inverse = s->squares + padded;
    s->lane = (uint32_t *)(s->inverse + padded);
    return room;
}

int merge_full(float *x, float *n, int64_t heads, int64_t items, int64_t width, int64_t dim, const int64_t *sizes,
               int64_t rounds, int64_t sinks) {
    bench s;
    void *room = make_bench(items, dim, &s);
    if (!room) return 1;
    for (int64_t h = 0; h < heads; h++)
        merge_head(x + h * items * width, n + h * items, items, width, dim, sizes, rounds, sinks, &s);
    free(room);
    return 0;
}

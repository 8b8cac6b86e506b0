/* Merging of full slots: the function of kernels/cpu/slot_merge.py, one call for all heads and rounds.

   x [heads, items, width] means and n [heads, items] counts, in place; the first `dim` columns of x are the key.
   sizes[r] items are left after round r, those of the last round in front. At most 2 * 65535 items.

   A round finds for each even item its cheapest odd one: a matrix product in blocks of 4 even items by 2 LANES odd ones
   that stay in registers, then costs as bfloat16 bits with the odd item's index below them, so that the least of these
   32-bit keys is the cheapest partner, and on ties the first. Items stay where they are until the last round.

   Where there are several rounds, the products of all pairs are made once and carried: the mean of two items is linear
   in them, so that a merge changes one row and one column, and a round only looks its pairs up. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define RESOLUTION 1e-6f
#define LANES 16
#define ROWS 4
#define MOST_CARRIED 1024 /* items whose products are carried: a square of so many floats */

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4)));

typedef struct {
    int64_t padded, *order, *partner; /* odd items in whole blocks; where the items stand; whom an even item would join */
    float *odd, *squares, *inverse;   /* [dim,padded], [padded], [padded] of the odd items, centred */
    uint32_t *lane;                   /* [padded]: the odd item's index, all ones where there is none */
    uint64_t *offer;                  /* the cheapest offers so far, in order: cost, then the even item */
    float *known;                     /* [items,stride] products of all pairs, NULL where each round makes its own */
    int32_t *column;                  /* [padded]: where an odd item stands in a row of `known` */
    int64_t stride, items;
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

/* sum[r][0..1] <- the products of ROWS items a [ROWS,dim] with 2 LANES columns of laid [dim,padded] from j on. */
__attribute__((always_inline)) static inline void multiply(const float *restrict a, const float *restrict laid,
                                                           int64_t padded, int64_t dim, floats sum[ROWS][2]) {
    for (int64_t e = 0; e < dim; e++) {
        floats left = *(floats *)(laid + e * padded), right = *(floats *)(laid + e * padded + LANES);
        for (int64_t r = 0; r < ROWS; r++) {
            sum[r][0] += a[r * dim + e] * left;
            sum[r][1] += a[r * dim + e] * right;
        }
    }
}

static inline uint32_t smallest(words found) {
    uint32_t best = UINT32_MAX;
    for (int64_t l = 0; l < LANES; l++) best = found[l] < best ? found[l] : best;
    return best;
}

/* best[r] <- the least key of even item r of four, a [ROWS,dim] */
static void cheapest(const float *restrict a, const float *square, const float *inverse, const bench *s, int64_t dim,
                     uint32_t *best) {
    words found[ROWS];
    for (int64_t r = 0; r < ROWS; r++) found[r] = (words){0} - 1;
    int64_t j = 0;
    for (; j + 2 * LANES <= s->padded; j += 2 * LANES) {
        floats sum[ROWS][2] = {{{0}}};
        multiply(a, s->odd + j, s->padded, dim, sum);
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
    for (int64_t r = 0; r < ROWS; r++) best[r] = smallest(found[r]);
}

/* The least key of one even item, whose products are in row. */
static uint32_t cheapest_known(const float *restrict row, float square, float inverse, const bench *s) {
    words found = (words){0} - 1;
    float product[s->padded];
    const int32_t *restrict column = s->column;
    for (int64_t j = 0, padded = s->padded; j < padded; j++) product[j] = row[column[j]];
    for (int64_t j = 0; j < s->padded; j += LANES)
        found = least(found, keys_of(*(floats *)(product + j), s, j, square, inverse));
    return smallest(found);
}

/* centre [dim] <- the mean of the odd items, which distances do not see but rounding does. */
static void find_centre(const float *x, int64_t odds, int64_t width, int64_t dim, const bench *s, float *centre) {
    for (int64_t e = 0; e < dim; e++) centre[e] = 0.0f;
    for (int64_t j = 0; j < odds; j++)
        for (int64_t e = 0; e < dim; e++) centre[e] += x[s->order[2 * j + 1] * width + e];
    for (int64_t e = 0; e < dim; e++) centre[e] /= (float)odds;
}

/* What a round needs to know of each odd item; its features side by side where products are not known. */
static void lay_out(const float *x, const float *n, int64_t odds, int64_t width, int64_t dim, int64_t sinks, bench *s,
                    const float *centre) {
    s->padded = (odds + LANES - 1) / LANES * LANES;
    for (int64_t j = 0; j < s->padded; j++) {
        int64_t item = s->order[j < odds ? 2 * j + 1 : 1];
        s->inverse[j] = 1.0f / n[item];
        s->lane[j] = j < odds && j >= sinks / 2 ? (uint32_t)j : UINT32_MAX;
        s->column[j] = (int32_t)item;
        if (s->known) {
            s->squares[j] = s->known[item * s->stride + item];
            continue;
        }
        float square = 0.0f;
        for (int64_t e = 0; e < dim; e++) {
            float value = s->odd[e * s->padded + j] = x[item * width + e] - centre[e];
            square += value * value;
        }
        s->squares[j] = square;
    }
}

/* known [items,stride] <- the products of all pairs, less the centre: those from the diagonal on, then their mirror. */
static void know_all(const float *x, int64_t items, int64_t width, int64_t dim, bench *s, const float *centre) {
    float a[ROWS * dim];
    for (int64_t first = 0; first < dim; first += LANES) /* a cache line of each item at a time */
        for (int64_t j = 0; j < s->stride; j++)
            for (int64_t e = first; e < dim && e < first + LANES; e++)
                s->odd[e * s->stride + j] = j < items ? x[j * width + e] - centre[e] : 0.0f;
    for (int64_t i = 0; i < items; i += ROWS) {
        int64_t rows = items - i < ROWS ? items - i : ROWS;
        for (int64_t r = 0; r < ROWS; r++)
            for (int64_t e = 0; e < dim; e++) a[r * dim + e] = x[(r < rows ? i + r : i) * width + e] - centre[e];
        for (int64_t j = i / LANES * LANES; j + LANES < s->stride; j += 2 * LANES) {
            floats sum[ROWS][2] = {{{0}}};
            multiply(a, s->odd + j, s->stride, dim, sum);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t half = 0; half < 2; half++)
                    *(floats *)(s->known + (i + r) * s->stride + j + half * LANES) = sum[r][half];
        }
    }
    for (int64_t first = 0; first < items; first += LANES)
        for (int64_t i = first + LANES; i < items; i++)
            for (int64_t j = first; j < items && j < first + LANES; j++)
                s->known[i * s->stride + j] = s->known[j * s->stride + i];
}

/* Item `to` becomes to + share (from - to): one row of the products and one column. */
static void know_merged(int64_t items, int64_t from, int64_t to, float share, bench *s) {
    float *restrict mine = s->known + to * s->stride, *restrict other = s->known + from * s->stride;
    float rest = 1.0f - share;
    float square = rest * rest * mine[to] + 2.0f * share * rest * other[to] + share * share * other[from];
    for (int64_t j = 0; j < items; j++) mine[j] += share * (other[j] - mine[j]);
    mine[to] = square;
    for (int64_t j = 0; j < items; j++) s->known[j * s->stride + to] = mine[j];
}

static void merge_round(float *x, float *n, int64_t items, int64_t size, int64_t width, int64_t dim, int64_t sinks,
                        bench *s) {
    int64_t odds = items / 2, evens = items - odds, goes = items - size, held = 0;
    float centre[dim], a[ROWS * dim], square[ROWS], inverse[ROWS];
    uint32_t best[ROWS];
    if (!s->known) find_centre(x, odds, width, dim, s, centre);
    lay_out(x, n, odds, width, dim, sinks, s, centre);
    for (int64_t i = (sinks + 1) / 2; i < evens; i += ROWS) {
        int64_t rows = evens - i < ROWS ? evens - i : ROWS;
        for (int64_t r = 0; r < ROWS; r++) {
            int64_t item = s->order[2 * (r < rows ? i + r : i)];
            square[r] = 0.0f;
            inverse[r] = 1.0f / n[item];
            if (s->known) {
                const float *row = s->known + item * s->stride;
                best[r] = r < rows ? cheapest_known(row, row[item], inverse[r], s) : UINT32_MAX;
                continue;
            }
            for (int64_t e = 0; e < dim; e++) {
                a[r * dim + e] = x[item * width + e] - centre[e];
                square[r] += a[r * dim + e] * a[r * dim + e];
            }
        }
        if (!s->known) cheapest(a, square, inverse, s, dim, best);
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
        if (s->known) know_merged(s->items, from, to, share, s);
    }
    for (int64_t j = 0, at = 0; j < items; j++)
        if (n[s->order[j]] != 0.0f) s->order[at++] = s->order[j];
}

static void merge_head(float *x, float *n, int64_t items, int64_t width, int64_t dim, const int64_t *sizes,
                       int64_t rounds, int64_t sinks, bench *s) {
    int64_t held = items;
    float centre[dim];
    for (int64_t j = 0; j < items; j++) s->order[j] = j;
    if (s->known) {
        find_centre(x, items / 2, width, dim, s, centre);
        know_all(x, items, width, dim, s, centre);
    }
    for (int64_t r = 0; r < rounds; held = sizes[r++]) merge_round(x, n, held, sizes[r], width, dim, sinks, s);
    for (int64_t at = 0; at < held; at++) {
        if (s->order[at] == at) continue;
        memcpy(x + at * width, x + s->order[at] * width, (size_t)width * sizeof(float));
        n[at] = n[s->order[at]];
    }
}

/* Room for one head of `items` and so many rounds at most; free(what is returned) when done, NULL where memory is short. */
static void *make_bench(int64_t items, int64_t dim, int64_t rounds, bench *s) {
    int64_t padded = (items / 2 + LANES - 1) / LANES * LANES, whole = rounds > 1 && items <= MOST_CARRIED;
    int64_t stride = (items + LANES - 1) / LANES * LANES + LANES; /* so that two blocks can begin at the last */
    int64_t laid = dim * (whole ? stride : padded);
    char *room = malloc((size_t)(3 * items * 8 + (laid + 4 * padded + (whole ? items * stride : 0)) * 4));
    s->items = items;
    s->stride = stride;
    s->order = (int64_t *)room;
    s->partner = s->order + items;
    s->offer = (uint64_t *)(s->partner + items);
    s->odd = (float *)(s->offer + items);
    s->squares = s->odd + laid;
    s->inverse = s->squares + padded;
    s->lane = (uint32_t *)(s->inverse + padded);
    s->column = (int32_t *)(s->lane + padded);
    s->known = whole ? (float *)(s->column + padded) : NULL;
    return room;
}

int merge_full(float *x, float *n, int64_t heads, int64_t items, int64_t width, int64_t dim, const int64_t *sizes,
               int64_t rounds, int64_t sinks) {
    bench s;
    void *room = make_bench(items, dim, rounds, &s);
    if (!room) return 1;
    for (int64_t h = 0; h < heads; h++)
        merge_head(x + h * items * width, n + h * items, items, width, dim, sizes, rounds, sinks, &s);
    free(room);
    return 0;
}

/* Merging of full slots: the function of kernels/cpu/slot_merge.py, one call for all heads and rounds.

   x [heads, items, width] means and n [heads, items] counts, in place; the first key_dim columns of x are the key.
   sizes[r] items are left in front after round r. scratch holds (key_dim + 3) * items floats and 2 * items int64. */

#include <stdint.h>
#include <string.h>

#define RESOLUTION 1e-6f

static inline uint32_t coarse(float cost) { /* the bits of a cost >= 0 rounded to bfloat16, which order as costs do */
    uint32_t bits;
    memcpy(&bits, &cost, 4);
    return (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
}

static void costs(const float *restrict a, const float *restrict odd, const float *restrict squares,
                  const float *restrict inverse, float *restrict cost, int64_t odds, int64_t dim, float square,
                  float inverse_a) {
    for (int64_t j = 0; j < odds; j++) cost[j] = 0.0f;
    int64_t e = 0;
    for (; e + 8 <= dim; e += 8) { /* eight rows at once, so that cost is loaded and stored an eighth as often */
        const float *restrict row = odd + e * odds;
        for (int64_t j = 0; j < odds; j++)
            cost[j] += a[e] * row[j] + a[e + 1] * row[odds + j] + a[e + 2] * row[2 * odds + j] +
                       a[e + 3] * row[3 * odds + j] + a[e + 4] * row[4 * odds + j] + a[e + 5] * row[5 * odds + j] +
                       a[e + 6] * row[6 * odds + j] + a[e + 7] * row[7 * odds + j];
    }
    for (; e < dim; e++)
        for (int64_t j = 0; j < odds; j++) cost[j] += a[e] * odd[e * odds + j];
    for (int64_t j = 0; j < odds; j++) {
        float distance = (square + squares[j]) * (1.0f - RESOLUTION) - 2.0f * cost[j];
        cost[j] = (distance > 0.0f ? distance : 0.0f) / (inverse_a + inverse[j]);
    }
}

static void merge_round(float *x, float *n, int64_t items, int64_t size, int64_t width, int64_t dim, int64_t sinks,
                        float *scratch, uint64_t *offer, int64_t *partner) {
    int64_t odds = items / 2, evens = items - odds, goes = items - size, first = (sinks + 1) / 2;
    float *odd = scratch, *squares = odd + dim * odds, *inverse = squares + odds, *cost = inverse + odds;
    float centre[dim], a[dim];
    for (int64_t e = 0; e < dim; e++) {
        centre[e] = 0.0f;
        for (int64_t j = 0; j < odds; j++) centre[e] += x[(2 * j + 1) * width + e];
        centre[e] /= (float)odds;
    }
    for (int64_t j = 0; j < odds; j++) {
        squares[j] = 0.0f;
        inverse[j] = 1.0f / n[2 * j + 1];
        for (int64_t e = 0; e < dim; e++) {
            float value = odd[e * odds + j] = x[(2 * j + 1) * width + e] - centre[e];
            squares[j] += value * value;
        }
    }
    for (int64_t i = first; i < evens; i++) {
        float square = 0.0f;
        for (int64_t e = 0; e < dim; e++) {
            a[e] = x[2 * i * width + e] - centre[e];
            square += a[e] * a[e];
        }
        costs(a, odd, squares, inverse, cost, odds, dim, square, 1.0f / n[2 * i]);
        uint32_t *bits = (uint32_t *)cost, best = UINT32_MAX; /* the least first, then where: both loops vectorise */
        for (int64_t j = sinks / 2; j < odds; j++) {
            bits[j] = coarse(cost[j]);
            best = bits[j] < best ? bits[j] : best;
        }
        partner[i] = sinks / 2;
        while (bits[partner[i]] != best) partner[i]++;
        uint64_t key = ((uint64_t)best << 32) | (uint64_t)i;
        int64_t at = i - first; /* insertion: ties stay in the order of the index */
        for (; at > 0 && offer[at - 1] > key; at--) offer[at] = offer[at - 1];
        offer[at] = key;
    }
    for (int64_t g = 0; g < goes; g++) {
        int64_t i = (int64_t)(offer[g] & 0xffffffffu), from = 2 * i, to = 2 * partner[i] + 1;
        float sum = n[from] + n[to], share = n[from] / sum;
        for (int64_t e = 0; e < width; e++) x[to * width + e] += share * (x[from * width + e] - x[to * width + e]);
        n[to] = sum;
        n[from] = 0.0f;
    }
    for (int64_t j = 0, at = 0; j < items; j++) {
        if (n[j] == 0.0f) continue;
        if (at != j) {
            memmove(x + at * width, x + j * width, (size_t)width * sizeof(float));
            n[at] = n[j];
        }
        at++;
    }
}

void merge_full(float *x, float *n, int64_t heads, int64_t items, int64_t width, int64_t dim, const int64_t *sizes,
                int64_t rounds, int64_t sinks, float *scratch, int64_t *numbers) {
    for (int64_t h = 0; h < heads; h++) {
        int64_t held = items;
        for (int64_t r = 0; r < rounds; held = sizes[r++])
            merge_round(x + h * items * width, n + h * items, held, sizes[r], width, dim, sinks, scratch,
                        (uint64_t *)numbers, numbers + items);
    }
}

/* One token a row: hybrid_step (linearize/ops/hybrid_step.py) and the T = 1 form of hybrid_ring
   (linearize/ops/hybrid_ring.py). Letters as there: R = H / G query heads read each kv head. */

#include "vector.h"

typedef struct { /* keys of a softmax, by pointer: rings, sinks and the new token need no copy side by side */
    int64_t count;
    const float **keys, **values;
} near_keys;

/* above [V] = c sum e^{s - m} v, returns c (sum e^{s - m} + sum e^{logit - m}); 0 where there is no key and no logit */
static float soften(const near_keys *near, const float *q, const float *logits, int64_t L, float c, float scale,
                    int64_t d, int64_t V, float *above) {
    float scores[near->count + 1], top = -3.0e38f, below;
    for (int64_t i = 0; i < near->count; i++) scores[i] = scale * dot(q, near->keys[i], d);
    top = largest(scores, near->count, top);
    if (logits) top = largest(logits, L, top);
    below = exps(scores, near->count, top);
    for (int64_t i = 0; logits && i < L; i++) below += fast_exp(logits[i] - top);
    for (int64_t j = 0; j < V; j++) above[j] = 0.0f;
    for (int64_t i = 0; i < near->count; i++) add_times(above, c * scores[i], near->values[i], V);
    return c * below;
}

static void divide(float *o, const float *above, float below, int64_t V) {
    float inverse = below == 0.0f ? 1.0f : 1.0f / below;
    for (int64_t j = 0; j < V; j++) o[j] = above[j] * inverse;
}

/* ---- hybrid_step -------------------------------------------------------------------------------------------------- */

/* t: q k v fq fk pos ring_k ring_v ring_f s z mix sink_k sink_v logits index o.  n: B H G d V F w m L.  r: scale */
void hybrid_step(void **t, const int64_t *n, const double *r) {
    int64_t B = n[0], H = n[1], G = n[2], d = n[3], V = n[4], E = n[5], w = n[6], m = n[7], L = n[8], R = H / G;
    int64_t size = 2 * w;
    const float *keys[w + m + 1], *values[w + m + 1];
    for (int64_t b = 0; b < B; b++) {
        int64_t row = t[15] ? I(15)[b] : b, p = I(5)[b], folded = p / w > 1 ? w * (p / w - 1) : 0;
        float *ring_k = F(6) + row * size * G * d, *ring_v = F(7) + row * size * G * V;
        float *ring_f = t[8] ? F(8) + row * size * G * E : NULL;
        float *sink_k = m ? F(12) + row * m * G * d : NULL, *sink_v = m ? F(13) + row * m * G * V : NULL;
        for (int64_t rank = p - size; ring_f && p % w == 0 && rank >= 0 && rank < p - w; rank++) {
            if (rank < m) continue;
            for (int64_t g = 0; g < G; g++) {
                const float *f = ring_f + (rank % size * G + g) * E, *value = ring_v + (rank % size * G + g) * V;
                float *s = F(9) + (row * G + g) * E * V, *z = F(10) + (row * G + g) * E;
                for (int64_t e = 0; e < E; e++) add_times(s + e * V, f[e], value, V);
                add_times(z, 1.0f, f, E);
            }
        }
        memcpy(ring_k + p % size * G * d, F(1) + b * G * d, (size_t)(G * d) * sizeof(float));
        memcpy(ring_v + p % size * G * V, F(2) + b * G * V, (size_t)(G * V) * sizeof(float));
        if (ring_f) memcpy(ring_f + p % size * G * E, F(4) + b * G * E, (size_t)(G * E) * sizeof(float));
        if (p < m) {
            memcpy(sink_k + p * G * d, F(1) + b * G * d, (size_t)(G * d) * sizeof(float));
            memcpy(sink_v + p * G * V, F(2) + b * G * V, (size_t)(G * V) * sizeof(float));
        }
        for (int64_t g = 0; g < G; g++) {
            near_keys near = {0, keys, values};
            for (int64_t rank = 0; rank < m && rank <= p; rank++, near.count++)
                keys[near.count] = sink_k + (rank * G + g) * d, values[near.count] = sink_v + (rank * G + g) * V;
            for (int64_t rank = p - w + 1 > m ? p - w + 1 : m; rank <= p; rank++, near.count++)
                keys[near.count] = ring_k + (rank % size * G + g) * d,
                values[near.count] = ring_v + (rank % size * G + g) * V;
            for (int64_t h = g * R; h < (g + 1) * R; h++) {
                float above[V], c = t[11] ? F(11)[h] : 1.0f;
                float below = soften(&near, F(0) + (b * H + h) * d, t[14] ? F(14) + h * L : NULL, L, c, (float)r[0], d,
                                     V, above);
                if (ring_f) {
                    const float *reader = F(3) + (b * H + h) * E, *s = F(9) + (row * G + g) * E * V;
                    below += dot(reader, F(10) + (row * G + g) * E, E);
                    for (int64_t e = 0; e < E; e++) add_times(above, reader[e], s + e * V, V);
                    for (int64_t rank = folded > m ? folded : m; rank <= p - w; rank++) {
                        float weight = dot(reader, ring_f + (rank % size * G + g) * E, E);
                        below += weight;
                        add_times(above, weight, ring_v + (rank % size * G + g) * V, V);
                    }
                }
                divide(F(16) + (b * H + h) * V, above, below, V);
            }
        }
    }
}

/* ---- hybrid_ring, T = 1 ------------------------------------------------------------------------------------------- */

/* phi [2f] = [softmax(x W) ; softmax(-x W)], x [d], W [d,f] */
static void hedgehog(float *phi, const float *x, const float *map, int64_t d, int64_t f) {
    row_times(phi, x, map, d, f);
    for (int64_t i = 0; i < f; i++) phi[f + i] = -phi[i];
    for (float *half = phi; half < phi + 2 * f; half += f) {
        float inverse = 1.0f / exps(half, f, largest(half, f, -3.0e38f));
        for (int64_t i = 0; i < f; i++) half[i] *= inverse;
    }
}

/* The ring after the token: one entry later, and the token's at its end. */
static void shift(float *to, const float *from, const float *token, int64_t w, int64_t size) {
    memcpy(to, from + size, (size_t)((w - 1) * size) * sizeof(float));
    memcpy(to + (w - 1) * size, token, (size_t)size * sizeof(float));
}

/* Sinks after the token: what they held, plus the token where its rank is theirs. */
static void place(float *to, const float *from, const float *token, int64_t m, int64_t size, int64_t rank) {
    memcpy(to, from, (size_t)(m * size) * sizeof(float));
    if (rank >= 0 && rank < m) add_times(to + rank * size, 1.0f, token, size);
}

/* t: q k v mask positions ring_k ring_v ring_mask sink_k sink_v query_map key_map omega logits s0 z0,
      out: o ring_k ring_v ring_mask sink_k sink_v s z.  n: B H G d V f w m L.  r: scale */
void hybrid_ring(void **t, const int64_t *n, const double *r) {
    int64_t B = n[0], H = n[1], G = n[2], d = n[3], V = n[4], f = n[5], w = n[6], m = n[7], L = n[8], R = H / G;
    int64_t E = 2 * f;
    const float *keys[w + m + 1], *values[w + m + 1];
    for (int64_t b = 0; b < B; b++) {
        const uint8_t real = ((uint8_t *)t[3])[b], *old_mask = (uint8_t *)t[7] + b * w;
        uint8_t *ring_mask = (uint8_t *)t[19] + b * w;
        const float *token_k = F(1) + b * G * d, *token_v = F(2) + b * G * V;
        float *ring_k = F(17) + b * w * G * d, *ring_v = F(18) + b * w * G * V;
        float *sink_k = F(20) + b * m * G * d, *sink_v = F(21) + b * m * G * V;
        int64_t rank = I(4)[b];
        shift(ring_k, F(5) + b * w * G * d, token_k, w, G * d);
        shift(ring_v, F(6) + b * w * G * V, token_v, w, G * V);
        memcpy(ring_mask, old_mask + 1, (size_t)(w - 1));
        ring_mask[w - 1] = real && rank >= m;
        if (m) {
            place(sink_k, F(8) + b * m * G * d, token_k, m, G * d, real ? rank : -1);
            place(sink_v, F(9) + b * m * G * V, token_v, m, G * V, real ? rank : -1);
        }
        for (int64_t g = 0; g < G; g++) {
            near_keys near = {0, keys, values};
            for (int64_t i = 0; i < m && i <= rank; i++, near.count++)
                keys[near.count] = sink_k + (i * G + g) * d, values[near.count] = sink_v + (i * G + g) * V;
            for (int64_t i = 0; i < w; i++)
                if (ring_mask[i])
                    keys[near.count] = ring_k + (i * G + g) * d, values[near.count++] = ring_v + (i * G + g) * V;
            float above[R * V], below[R], readers[R * E + 1], writer[E + 1];
            for (int64_t h = 0; h < R; h++) {
                const float *q = F(0) + (b * H + g * R + h) * d;
                float c = t[12] ? expf(F(12)[g * R + h]) : 1.0f;
                below[h] = soften(&near, q, t[13] ? F(13) + (g * R + h) * L : NULL, L, c, (float)r[0], d, V,
                                  above + h * V);
                if (f) hedgehog(readers + h * E, q, F(10) + (g * R + h) * d * f, d, f);
            }
            if (f) {
                const float *old_v = F(6) + (b * w * G + g) * V, *s0 = F(14) + (b * G + g) * E * V;
                float *s = F(22) + (b * G + g) * E * V, *z = F(23) + (b * G + g) * E;
                hedgehog(writer, F(5) + (b * w * G + g) * d, F(11) + g * d * f, d, f);
                for (int64_t e = 0; e < E; e++) {
                    float wrote = old_mask[0] ? writer[e] : 0.0f, *restrict row = s + e * V;
                    const float *restrict old = s0 + e * V;
                    z[e] = F(15)[(b * G + g) * E + e] + wrote;
#pragma omp simd
                    for (int64_t j = 0; j < V; j++) row[j] = old[j] + wrote * old_v[j];
                    for (int64_t h = 0; h < R; h++) add_times(above + h * V, readers[h * E + e], row, V);
                }
                for (int64_t h = 0; h < R; h++) below[h] += dot(readers + h * E, z, E);
            }
            for (int64_t h = 0; h < R; h++) divide(F(16) + (b * H + g * R + h) * V, above + h * V, below[h], V);
        }
    }
}

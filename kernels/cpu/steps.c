/* One token a row, states updated in place: gla_step, gla_vec_step, delta_step of linearize/ops/steps.py. */

#include "vector.h"

/* One state s [K,V] of `readers` query heads: decay e [K] (or one number), writer k [K] times u [V], outputs o. */
static void write_and_read(float *s, const float *decay, int64_t by_channel, const float *k, const float *u,
                           const float *q, float *o, int64_t readers, int64_t K, int64_t V, float scale) {
    for (int64_t i = 0; i < readers * V; i++) o[i] = 0.0f;
    for (int64_t c = 0; c < K; c++) {
        float *restrict row = s + c * V, kept = decay[by_channel ? c : 0], key = k[c];
#pragma omp simd
        for (int64_t j = 0; j < V; j++) row[j] = kept * row[j] + key * u[j];
        for (int64_t r = 0; r < readers; r++) add_times(o + r * V, scale * q[r * K + c], row, V);
    }
}

/* t: q k v g s index o.  n: B H G Hs K V by_channel.  r: scale */
void gla_step(void **t, const int64_t *n, const double *r) {
    int64_t B = n[0], H = n[1], G = n[2], Hs = n[3], K = n[4], V = n[5], by_channel = n[6], gates = by_channel ? K : 1;
    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < Hs; h++) {
            float decay[K], one = 1.0f;
            int64_t row = b * Hs + h, kv = b * G + h / (Hs / G), readers = H / Hs, pool = t[5] ? I(5)[b] : b;
            for (int64_t c = 0; c < gates && t[3]; c++) decay[c] = expf(F(3)[row * gates + c]);
            write_and_read(F(4) + (pool * Hs + h) * K * V, t[3] ? decay : &one, t[3] ? by_channel : 0, F(1) + kv * K,
                           F(2) + kv * V, F(0) + row * readers * K, F(6) + row * readers * V, readers, K, V,
                           (float)r[0]);
        }
}

static float inverse_norm(const float *x, int64_t size, float epsilon) {
    return 1.0f / sqrtf(dot(x, x, size) + epsilon);
}

/* t: q k v beta g s index o.  n: B H G Hs K V l2norm.  r: scale, epsilon */
void delta_step(void **t, const int64_t *n, const double *r) {
    int64_t B = n[0], H = n[1], G = n[2], Hs = n[3], K = n[4], V = n[5], readers = H / Hs;
    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < Hs; h++) {
            int64_t row = b * Hs + h, kv = b * G + h / (Hs / G), pool = t[6] ? I(6)[b] : b;
            const float *key = F(1) + kv * K, *value = F(2) + kv * V, *query = F(0) + row * readers * K;
            float k[K], q[readers * K], u[V], *s = F(5) + (pool * Hs + h) * K * V;
            float norm = n[6] ? inverse_norm(key, K, (float)r[1]) : 1.0f, kept = t[4] ? expf(F(4)[row]) : 1.0f;
            for (int64_t c = 0; c < K; c++) k[c] = key[c] * norm;
            for (int64_t reader = 0; reader < readers; reader++) {
                norm = n[6] ? inverse_norm(query + reader * K, K, (float)r[1]) : 1.0f;
                for (int64_t c = 0; c < K; c++) q[reader * K + c] = query[reader * K + c] * norm;
            }
            row_times(u, k, s, K, V);
            for (int64_t j = 0; j < V; j++) u[j] = F(3)[row] * (value[j] - kept * u[j]);
            write_and_read(s, &kept, 0, k, u, q, F(7) + row * readers * V, readers, K, V, (float)r[0]);
        }
}

/* One token a row of slots_chunk (linearize/ops/slots.py), and the merging of full slots. Letters as there. */

#include "merge.h"
#include "vector.h"

/* Copies the slots of a kv head, [C,d] and [C,V] apart, to items x [C,d+V] side by side, or back. */
static void pair(float *x, const float *k, const float *v, int64_t count, int64_t d, int64_t V) {
    for (int64_t c = 0; c < count; c++) {
        memcpy(x + c * (d + V), k + c * d, (size_t)d * sizeof(float));
        memcpy(x + c * (d + V) + d, v + c * V, (size_t)V * sizeof(float));
    }
}

/* t: q k v mask before ring_k ring_v slot_k slot_v slot_n, out: o ring_k ring_v slot_k slot_v slot_n, scratch
      [(C+w)(d+V+1)].  n: B H G d V w C sinks rounds sizes...  r: scale, decay */
int slots_step(void **t, const int64_t *n, const double *r) {
    int64_t B = n[0], H = n[1], G = n[2], d = n[3], V = n[4], w = n[5], C = n[6], R = H / G, columns = 2 * w;
    for (int64_t b = 0; b < B; b++) {
        int64_t p = I(4)[b], real = ((uint8_t *)t[3])[b], block = p / w, at = p % columns;
        int64_t first = block > 0 ? (block - 1) * w : 0, joined = first, end = p + real;
        int64_t joins = real && end % w == 0 && end > w, filled = joined < C ? joined : C;
        float *ring_k = F(11) + b * columns * G * d, *ring_v = F(12) + b * columns * G * V;
        memcpy(ring_k, F(5) + b * columns * G * d, (size_t)(columns * G * d) * sizeof(float));
        memcpy(ring_v, F(6) + b * columns * G * V, (size_t)(columns * G * V) * sizeof(float));
        if (real) {
            memcpy(ring_k + at * G * d, F(1) + b * G * d, (size_t)(G * d) * sizeof(float));
            memcpy(ring_v + at * G * V, F(2) + b * G * V, (size_t)(G * V) * sizeof(float));
        }
        for (int64_t g = 0; g < G; g++) {
            const float *slot_k = F(7) + (b * G + g) * C * d, *slot_v = F(8) + (b * G + g) * C * V;
            const float *slot_n = F(9) + (b * G + g) * C;
            float *new_k = F(13) + (b * G + g) * C * d, *new_v = F(14) + (b * G + g) * C * V;
            float *new_n = F(15) + (b * G + g) * C, mass[C];
            for (int64_t c = 0; c < filled; c++) mass[c] = logf(slot_n[c]);
            for (int64_t h = g * R; h < (g + 1) * R; h++) {
                const float *q = F(0) + (b * H + h) * d;
                float scores[C + columns], *near = scores + filled, *o = F(10) + (b * H + h) * V;
                int64_t total = filled + p + 1 - first;
                for (int64_t c = 0; c < filled; c++) scores[c] = (float)r[0] * dot(q, slot_k + c * d, d) + mass[c];
                for (int64_t rank = first; rank <= p; rank++)
                    near[rank - first] = (float)r[0] * dot(q, ring_k + (rank % columns * G + g) * d, d);
                float inverse = 1.0f / exps(scores, total, largest(scores, total, -3.0e38f));
                for (int64_t j = 0; j < V; j++) o[j] = 0.0f;
                for (int64_t c = 0; c < filled; c++) add_times(o, scores[c] * inverse, slot_v + c * V, V);
                for (int64_t rank = first; rank <= p; rank++)
                    add_times(o, near[rank - first] * inverse, ring_v + (rank % columns * G + g) * V, V);
            }
            memcpy(new_k, slot_k, (size_t)(C * d) * sizeof(float));
            memcpy(new_v, slot_v, (size_t)(C * V) * sizeof(float));
            memcpy(new_n, slot_n, (size_t)C * sizeof(float));
            if (!joins) continue;
            int64_t left = end - 2 * w; /* rank of the first token that leaves; the block before the one now complete */
            if (joined + w <= C) {
                for (int64_t i = 0; i < w; i++) {
                    int64_t from = (left + i) % columns * G + g;
                    memcpy(new_k + (joined + i) * d, ring_k + from * d, (size_t)d * sizeof(float));
                    memcpy(new_v + (joined + i) * V, ring_v + from * V, (size_t)V * sizeof(float));
                    new_n[joined + i] = 1.0f;
                }
                continue;
            }
            float *x = F(16), *counts = x + (C + w) * (d + V);
            pair(x, slot_k, slot_v, C, d, V);
            for (int64_t c = 0; c < C; c++) counts[c] = slot_n[c] * (c < n[7] ? 1.0f : (float)r[1]);
            for (int64_t i = 0; i < w; i++) {
                int64_t from = (left + i) % columns * G + g;
                pair(x + (C + i) * (d + V), ring_k + from * d, ring_v + from * V, 1, d, V);
                counts[C + i] = 1.0f;
            }
            if (merge_full(x, counts, 1, C + w, d + V, d, n + 9, n[8], n[7])) return 1;
            for (int64_t c = 0; c < C; c++) {
                memcpy(new_k + c * d, x + c * (d + V), (size_t)d * sizeof(float));
                memcpy(new_v + c * V, x + c * (d + V) + d, (size_t)V * sizeof(float));
                new_n[c] = counts[c];
            }
        }
    }
    return 0;
}

/* What S blocks read, items [S,N,C+2w,D] = [slots ; the block before ; their own] and counts [S,N,C], with the slots
   x [N,C,D], count [N,C] moved on after each block that is complete; N kv heads of rows that all stand at one place.
   t: line x count items counts.  n: N L D d w C sinks, the first block of the line, S, how many tokens have joined,
      the row's number of the line's first block, how many blocks of the line are complete, rounds sizes...  r: decay
   Returns how many blocks it did: it stops before a join that only just fills the slots, or S, or -1 without memory. */
int slots_advance(void **t, const int64_t *n, const double *r) {
    int64_t N = n[0], L = n[1], D = n[2], d = n[3], w = n[4], C = n[5], sinks = n[6], first = n[7], S = n[8];
    int64_t joined = n[9], wide = (C + 2 * w) * D, done = 0;
    float *room = malloc((size_t)((C + w) * (D + 1)) * sizeof(float)), *counts = room + (C + w) * D;
    bench s;
    void *tools = make_bench(C + w, d, n[12], &s);
    if (!room || !tools) return free(room), free(tools), -1;
    for (; done < S; done++) {
        int64_t block = first + done, joins = block < n[11] && n[10] + block >= 1;
        for (int64_t h = 0; h < N; h++) {
            float *items = F(3) + (done * N + h) * wide;
            memcpy(items, F(1) + h * C * D, (size_t)(C * D) * sizeof(float));
            memcpy(items + C * D, F(0) + (h * L + block * w) * D, (size_t)(2 * w * D) * sizeof(float));
            memcpy(F(4) + (done * N + h) * C, F(2) + h * C, (size_t)C * sizeof(float));
        }
        if (!joins) continue;
        if (joined < C && joined + w > C) break;
        for (int64_t h = 0; h < N; h++) {
            float *x = F(1) + h * C * D, *count = F(2) + h * C;
            const float *left = F(0) + (h * L + block * w) * D;
            if (joined < C) {
                memcpy(x + joined * D, left, (size_t)(w * D) * sizeof(float));
                for (int64_t i = 0; i < w; i++) count[joined + i] = 1.0f;
                continue;
            }
            memcpy(room, x, (size_t)(C * D) * sizeof(float));
            memcpy(room + C * D, left, (size_t)(w * D) * sizeof(float));
            for (int64_t c = 0; c < C + w; c++)
                counts[c] = c >= C ? 1.0f : count[c] * (c < sinks ? 1.0f : (float)r[0]);
            merge_head(room, counts, C + w, D, d, n + 13, n[12], sinks, &s);
            memcpy(x, room, (size_t)(C * D) * sizeof(float));
            memcpy(count, counts, (size_t)C * sizeof(float));
        }
        joined += w;
    }
    free(room);
    free(tools);
    return (int)done;
}

/* t: slot_k slot_v slot_n k v, out: slot_k slot_v slot_n.  n: B G d V w C sinks rounds sizes...  r: decay.
   A block k [B,w,G,d], v [B,w,G,V] joins full slots. */
int slots_merge(void **t, const int64_t *n, const double *r) {
    int64_t B = n[0], G = n[1], d = n[2], V = n[3], w = n[4], C = n[5], sinks = n[6], width = d + V;
    float *x = malloc((size_t)((C + w) * (width + 1)) * sizeof(float)), *counts = x + (C + w) * width;
    bench s;
    void *tools = make_bench(C + w, d, n[7], &s);
    if (!x || !tools) return free(x), free(tools), 1;
    for (int64_t head = 0; head < B * G; head++) {
        int64_t b = head / G, g = head % G;
        pair(x, F(0) + head * C * d, F(1) + head * C * V, C, d, V);
        for (int64_t c = 0; c < C; c++) counts[c] = F(2)[head * C + c] * (c < sinks ? 1.0f : (float)r[0]);
        for (int64_t i = 0; i < w; i++) {
            int64_t from = (b * w + i) * G + g;
            pair(x + (C + i) * width, F(3) + from * d, F(4) + from * V, 1, d, V);
            counts[C + i] = 1.0f;
        }
        merge_head(x, counts, C + w, width, d, n + 8, n[7], sinks, &s);
        for (int64_t c = 0; c < C; c++) {
            memcpy(F(5) + (head * C + c) * d, x + c * width, (size_t)d * sizeof(float));
            memcpy(F(6) + (head * C + c) * V, x + c * width + d, (size_t)V * sizeof(float));
        }
        memcpy(F(7) + head * C, counts, (size_t)C * sizeof(float));
    }
    free(x);
    free(tools);
    return 0;
}

/* What the C kernels share: loops that compilers turn into vector code, and an exp that is one of them.

   Every function that Python calls takes (void **t, const int64_t *n, const double *r): tensors (NULL for None),
   sizes, real numbers, in the order of the comment before it. All floats are float32 and all tensors contiguous. */

#ifndef LINEARIZE_VECTOR_H
#define LINEARIZE_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define F(i) ((float *)t[i])
#define I(i) ((int64_t *)t[i])

static inline float dot(const float *restrict a, const float *restrict b, int64_t size) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) sum += a[i] * b[i];
    return sum;
}

static inline void add_times(float *restrict y, float a, const float *restrict x, int64_t size) {
#pragma omp simd
    for (int64_t i = 0; i < size; i++) y[i] += a * x[i];
}

static inline float fast_exp(float x) { /* 2 ulp; 0 below -87, where float32 has no normal numbers; x <= 88 */
    float n = rintf(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)(n < -127.0f ? -127.0f : n) + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : p * power;
}

static inline float largest(const float *x, int64_t size, float least) {
    float top = least;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < size; i++) top = x[i] > top ? x[i] : top;
    return top;
}

static inline float exps(float *x, int64_t size, float shift) { /* x <- e^(x - shift); returns their sum */
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) {
        x[i] = fast_exp(x[i] - shift);
        sum += x[i];
    }
    return sum;
}

static inline void row_times(float *restrict y, const float *restrict x, const float *restrict w, int64_t rows,
                             int64_t columns) { /* y [columns] = x [rows] w [rows,columns] */
    memset(y, 0, (size_t)columns * sizeof(float));
    for (int64_t i = 0; i < rows; i++) add_times(y, x[i], w + i * columns, columns);
}

#endif

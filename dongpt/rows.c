// y = x W^T for a few rows of x: what a token costs on a CPU is reading W once, and this reads it as fast as memory gives.
//
// W (N, K) comes packed by rows.py: panels of PARTS * V output channels; in a panel, for each k, V words of 32 bits; a
// word holds PARTS weights, of channels V apart (1 float32, 2 bfloat16, 4 int8). So one load gives weights of PARTS * V
// channels for one k, a shift or a mask makes them float32, and each is multiplied by x[m][k] for several rows m while
// it is in a register. Sums are float32. Row m of y does not depend on which other rows there are.
#include <omp.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
enum { V = 16 };
#else
enum { V = 8 };  // one AVX2 register, two of NEON
#endif
enum { BLOCK = 384,  // how many k at a time: with so many, the panel stays in the first-level cache for all rows
       AHEAD = 2048,  // bytes by which memory is asked for weights before they are due
       ROWS = 64 };  // of x, for which sums are kept at a time

typedef float floats __attribute__((vector_size(4 * V), aligned(4), may_alias));
typedef int32_t words __attribute__((vector_size(4 * V), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 4")

int lanes(void) { return V; }

INLINE floats unpack(words word, int parts, int part) {
    if (parts == 1) return (floats)word;
    if (parts == 2 && part == 0) return (floats)(word << 16);
    if (parts == 2) return (floats)(word & (int32_t)0xffff0000);
    return __builtin_convertvector((word << (24 - 8 * part)) >> 24, floats);
}

// sums (M, PARTS, V) += the panel w (n, V words) times x (M, n), whose rows are stride apart.
INLINE void multiply(const char *w, const float *x, long stride, float *sums, long n, int parts, int M, int ahead) {
    floats sum[4][4];
    UNROLL for (int p = 0; p < parts; p++)
        UNROLL for (int m = 0; m < M; m++) sum[p][m] = *(floats *)(sums + (m * parts + p) * V);
    for (long k = 0; k < n; k++, w += 4 * V) {
        if (ahead) __builtin_prefetch(w + ahead);
        words word = *(const words *)w;
        floats weights[4];
        UNROLL for (int p = 0; p < parts; p++) weights[p] = unpack(word, parts, p);
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int p = 0; p < parts; p++) sum[p][m] += weights[p] * x[m * stride + k];
    }
    UNROLL for (int p = 0; p < parts; p++)
        UNROLL for (int m = 0; m < M; m++) *(floats *)(sums + (m * parts + p) * V) = sum[p][m];
}

// Panels first to last - 1 for M <= ROWS rows. scale and bias (N) may be NULL.
INLINE void panels(const char *w, const float *scale, const float *bias, const float *x, float *y, long M, long N,
                   long K, int parts, long first, long last) {
    const long width = parts * V;
    float sums[ROWS * 4 * V] __attribute__((aligned(64)));
    for (long panel = first; panel < last; panel++) {
        memset(sums, 0, sizeof(float) * M * width);
        for (long k = 0; k < K; k += BLOCK) {
            const char *block = w + (panel * K + k) * 4 * V;
            long n = K - k < BLOCK ? K - k : BLOCK, m = 0;
            if (M >= 4) multiply(block, x + k, K, sums, n, parts, 4, AHEAD), m = 4;  // the others find it in the cache
            for (; m + 4 <= M; m += 4) multiply(block, x + m * K + k, K, sums + m * width, n, parts, 4, 0);
            if (m + 2 <= M) multiply(block, x + m * K + k, K, sums + m * width, n, parts, 2, AHEAD), m += 2;
            if (m < M) multiply(block, x + m * K + k, K, sums + m * width, n, parts, 1, AHEAD);
        }
        long channels = N - panel * width < width ? N - panel * width : width;  // the last panel may be filled up
        for (long m = 0; m < M; m++)
            for (long i = 0; i < channels; i++) {
                long channel = panel * width + i;
                float sum = sums[m * width + i];
                if (scale) sum *= scale[channel];
                y[m * N + channel] = bias ? sum + bias[channel] : sum;
            }
    }
}

// y (M, N) = x (M, K) times the transpose of W, times scale (N) if there is one, plus bias (N) if there is one.
void rows(const char *w, const float *scale, const float *bias, const float *x, float *y, long M, long N, long K,
          int parts) {
    const long count = (N + parts * V - 1) / (parts * V);
    #pragma omp parallel if (M * N * K > 1 << 16)
    {
        long first = count * omp_get_thread_num() / omp_get_num_threads();
        long last = count * (omp_get_thread_num() + 1) / omp_get_num_threads();
        for (long m = 0; m < M; m += ROWS) {
            long n = M - m < ROWS ? M - m : ROWS;
            if (parts == 1) panels(w, scale, bias, x + m * K, y + m * N, n, N, K, 1, first, last);
            if (parts == 2) panels(w, scale, bias, x + m * K, y + m * N, n, N, K, 2, first, last);
            if (parts == 4) panels(w, scale, bias, x + m * K, y + m * N, n, N, K, 4, first, last);
        }
    }
}

// CPU decoding for a GPT: matmul() multiplies a few rows by a packed weight, and blocks() runs all layers of model.py
// for one new token per sequence. Every token reads every weight once, so speed is limited by memory bandwidth.
//
// cpu.py packs W (N, K) into panels of SUMS * V output channels. For each k, a panel holds words of 32 bits; a word
// contains PARTS weights (1 float32, 2 bfloat16 or 4 int8) of channels that are V apart. One load thus returns the
// weights of PARTS * V channels for one k. A shift or mask converts them to float32, and each is multiplied by x[m][k]
// for several rows m while it is in a register. Sums are float32. The result for a row does not depend on other rows.
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
enum { V = 16 };
#else
enum { V = 8 };  // one AVX2 register or two NEON registers
#endif
enum { BLOCK = 384,  // number of k per pass; a panel stays in the L1 cache for all rows
       PREFETCH_BYTES = 2048,  // prefetch distance for a few rows
       MAX_ROWS = 64 };  // maximum number of rows of x per pass

typedef float floats __attribute__((vector_size(4 * V), aligned(4), may_alias));
typedef int32_t words __attribute__((vector_size(4 * V), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 4")
#define SUMS(parts) (parts == 4 ? 4 : 2)  // vectors of channels in a panel

int lanes(void) { return V; }

INLINE floats unpack(words word, int parts, int part) {
    if (parts == 1) return (floats)word;
    if (parts == 2 && part == 0) return (floats)(word << 16);
    if (parts == 2) return (floats)(word & (int32_t)0xffff0000);
    return __builtin_convertvector((word << (24 - 8 * part)) >> 24, floats);
}

// Add the weights for one k times x (R) to sum (count, R). Uses count of the SUMS vectors at w, starting at first.
INLINE void step(floats sum[4][4], const char *w, const float *x, long stride, int parts, int R, int first, int count) {
    floats weights[4];
    UNROLL for (int p = 0; p < count; p++)
        weights[p] = unpack(*(const words *)(w + (first + p) / parts * 4 * V), parts, (first + p) % parts);
    UNROLL for (int m = 0; m < R; m++)
        UNROLL for (int p = 0; p < count; p++) sum[p][m] += weights[p] * x[m * stride];
}

// Run step() for n values of k, with sums (R, SUMS, V). The rows of x (R, n) are stride apart. Prefetches pace bytes
// per k, starting at next.
INLINE void multiply(const char *w, const float *x, long stride, float *sums, long n, int parts, int R, int first,
                     int count, const char *next, long pace) {
    const int S = SUMS(parts), bytes = 4 * V * S / parts;
    floats sum[4][4];
    UNROLL for (int p = 0; p < count; p++)
        UNROLL for (int m = 0; m < R; m++) sum[p][m] = *(floats *)(sums + (m * S + first + p) * V);
    for (; n >= 4; n -= 4, w += 4 * bytes, x += 4, next += 4 * pace)
        UNROLL for (int k = 0; k < 4; k++) {
            if (k * bytes % 64 == 0) __builtin_prefetch(next + k * pace);
            step(sum, w + k * bytes, x + k, stride, parts, R, first, count);
        }
    for (long k = 0; k < n; k++) step(sum, w + k * bytes, x + k, stride, parts, R, first, count);
    UNROLL for (int p = 0; p < count; p++)
        UNROLL for (int m = 0; m < R; m++) *(floats *)(sums + (m * S + first + p) * V) = sum[p][m];
}

// Compute panels first to last - 1 for M <= MAX_ROWS rows. scale and bias (N) may be NULL.
INLINE void panels(const char *w, const float *scale, const float *bias, const float *x, float *y, long M, long N,
                   long K, int parts, long first, long last) {
    const int S = SUMS(parts), width = S * V, bytes = 4 * width / parts;
    // Four rows times two sums fill the registers. All passes prefetch an equal share of the next block; otherwise, the
    // first pass would wait for memory. For a few rows of float32, not prefetching is fastest.
    const long passes = M < 4 ? 1 : M / 4 * (S / 2) + (M % 4 > 1) + M % 2;
    const long pace = M < 4 && parts == 1 ? 0 : bytes / passes;
    float sums[MAX_ROWS * 4 * V] __attribute__((aligned(64)));
    for (long panel = first; panel < last; panel++) {
        memset(sums, 0, sizeof(float) * M * width);
        for (long k = 0; k < K; k += BLOCK) {
            const char *block = w + (panel * K + k) * bytes;
            long n = K - k < BLOCK ? K - k : BLOCK, m = 0;
            const char *next = block + (M < 4 ? PREFETCH_BYTES : n * bytes);
            for (; m + 4 <= M; m += 4)
                UNROLL for (int p = 0; p < S; p += 2, next += n * pace)
                    multiply(block, x + m * K + k, K, sums + m * width, n, parts, 4, p, 2, next, pace);
            for (; m + 2 <= M; m += 2, next += n * pace)
                multiply(block, x + m * K + k, K, sums + m * width, n, parts, 2, 0, S, next, pace);
            if (m < M) multiply(block, x + m * K + k, K, sums + m * width, n, parts, 1, 0, S, next, pace);
        }
        const long channel = panel * width, channels = N - channel < width ? N - channel : width;  // the last panel is padded
        for (long m = 0; m < M; m++) {
            float *sum = sums + m * width;
            if (scale) for (long i = 0; i < channels; i++) sum[i] *= scale[channel + i];
            if (bias) for (long i = 0; i < channels; i++) sum[i] += bias[channel + i];
            memcpy(y + m * N + channel, sum, sizeof(float) * channels);
        }
    }
}

typedef struct {
    const char *weight;  // packed
    const float *scale, *bias;  // (N), or NULL
    long N, K, parts;
} linear;

// Compute y (M, N) = x (M, K) times the transposed weight, times scale and plus bias, both of which are optional.
void matmul(const linear *f, const float *x, float *y, long M) {
    const long width = SUMS(f->parts) * V, count = (f->N + width - 1) / width;
    #pragma omp parallel if (M * f->N * f->K > 1 << 15)
    {
        long first = count * omp_get_thread_num() / omp_get_num_threads();
        long last = count * (omp_get_thread_num() + 1) / omp_get_num_threads();
        for (long m = 0; m < M; m += MAX_ROWS) {
            const float *from = x + m * f->K;
            float *to = y + m * f->N;
            long n = M - m < MAX_ROWS ? M - m : MAX_ROWS;
            if (f->parts == 1) panels(f->weight, f->scale, f->bias, from, to, n, f->N, f->K, 1, first, last);
            if (f->parts == 2) panels(f->weight, f->scale, f->bias, from, to, n, f->N, f->K, 2, first, last);
            if (f->parts == 4) panels(f->weight, f->scale, f->bias, from, to, n, f->N, f->K, 4, first, last);
        }
    }
}

INLINE float total(floats a) {
    float sum = 0;
    for (int i = 0; i < V; i++) sum += a[i];
    return sum;
}

INLINE floats select(words condition, floats yes, floats no) {
    return (floats)((condition & (words)yes) | (~condition & (words)no));
}

// Return e^x = 2^n times a power series, with a relative error below 2e-7. x is clamped to [-87, 88]; NaN stays NaN.
INLINE floats exponential(floats x) {
    floats low = select(x < -87.0f, (floats){0} - 87.0f, x);
    floats y = select(low > 88.0f, (floats){0} + 88.0f, low);
    floats shifted = y * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;  // rounds; the low bits hold n
    floats r = y - n * 0.693359375f + n * 2.12194440e-4f;
    floats series = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f))))));
    return select(x == x, (floats)((words)series + ((words)shifted << 23)), x);
}

// Return GELU(x), exact (erf: Abramowitz and Stegun 7.1.26, error below 1.5e-7) or with GPT-2's tanh.
INLINE floats gelu(floats x, int gelu_tanh) {
    if (gelu_tanh) {
        floats u = 0.7978845608f * (x + 0.044715f * x * x * x);
        return x - x / (exponential(2 * u) + 1);  // (1 + tanh u) / 2 = 1 - 1 / (e^2u + 1)
    }
    floats z = 0.7071067812f * select(x < 0, -x, x), t = 1 / (1 + 0.3275911f * z);
    floats series = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f
                                                                                      + t * 1.061405429f))));
    floats rest = 0.5f * series * exponential(-z * z);  // (1 - erf z) / 2
    return x * select(x < 0, rest, 1 - rest);
}

static void gelu_all(float *x, long n, int gelu_tanh) {
    #pragma omp parallel for if (n > 1 << 13)
    for (long i = 0; i < n; i += V) {
        floats part = {0};
        long size = n - i < V ? n - i : V;
        memcpy(&part, x + i, sizeof(float) * size);
        part = gelu(part, gelu_tanh);
        memcpy(x + i, &part, sizeof(float) * size);
    }
}

static void normalise(const float *x, const float *weight, const float *bias, float *y, long M, long C) {
    for (long m = 0; m < M; m++, x += C, y += C) {
        float mean = 0, variance = 0;
        #pragma omp simd reduction(+ : mean)
        for (long i = 0; i < C; i++) mean += x[i];
        mean /= C;
        #pragma omp simd reduction(+ : variance)
        for (long i = 0; i < C; i++) variance += (x[i] - mean) * (x[i] - mean);
        float factor = 1 / sqrtf(variance / C + 1e-5f);
        for (long i = 0; i < C; i++) y[i] = (x[i] - mean) * factor * weight[i] + (bias ? bias[i] : 0);
    }
}

// Compute one head's attention of q (size) over n keys and values (n, size). bias (n) is added to the scores, or NULL.
static void look(const float *q, const float *keys, const float *values, const float *bias, float *scores, float *y,
                 long n, long size) {
    const float scale = 1 / sqrtf(size);
    float highest = -INFINITY;
    for (long s = 0; s < n; s++) {
        const float *key = keys + s * size;
        floats sum = {0};
        long i = 0;
        for (; i + V <= size; i += V) sum += *(const floats *)(q + i) * *(const floats *)(key + i);
        float score = total(sum);
        for (; i < size; i++) score += q[i] * key[i];
        scores[s] = score * scale + (bias ? bias[s] : 0);
        if (!(scores[s] <= highest)) highest = scores[s];
    }
    float sum = 0;
    for (long s = 0; s < n; s += V) {
        floats part = {0};
        long here = n - s < V ? n - s : V;
        memcpy(&part, scores + s, sizeof(float) * here);
        part = exponential(part - highest);
        memcpy(scores + s, &part, sizeof(float) * here);
        for (long i = 0; i < here; i++) sum += part[i];
    }
    memset(y, 0, sizeof(float) * size);
    for (long s = 0; s < n; s++) {
        const float *value = values + s * size, share = scores[s] / sum;
        #pragma omp simd
        for (long i = 0; i < size; i++) y[i] += share * value[i];
    }
}

typedef struct {
    const float *ln_1_weight, *ln_1_bias, *ln_2_weight, *ln_2_bias;  // a bias may be NULL
    linear c_attn, attn_c_proj, c_fc, mlp_c_proj;
} layer;

typedef struct {  // shared by all layers
    const int64_t *positions;  // positions of the newest tokens: one for all rows, or (B)
    const float *cos, *sin;  // (1 or B, head size) or NULL: model.rotate
    const float *bias;  // (1 or B, 1 or n_head, cache_len) or NULL
    long B, C, n_head, capacity;  // capacity: maximum number of tokens per row of a cache
    long positions_differ, rotations_differ, bias_rows, bias_heads, cache_len, gelu_tanh, n_threads;
} decode_step;

// model.rotate for one head. Channels i and i + size / 2 form a pair.
static void rotate(float *x, const float *cos, const float *sin, long size) {
    for (long i = 0, j = size / 2; j < size; i++, j++) {
        float a = x[i] * cos[i] - x[j] * sin[i], b = x[j] * cos[j] + x[i] * sin[j];
        x[i] = a, x[j] = b;
    }
}

static void attend(const decode_step *t, float *qkv, float *keys, float *values, float *scores, float *y) {
    const long size = t->C / t->n_head;
    #pragma omp parallel for collapse(2) num_threads(t->n_threads)
    for (long b = 0; b < t->B; b++)
        for (long h = 0; h < t->n_head; h++) {
            const long position = t->positions[t->positions_differ ? b : 0];
            const long offset = (b * t->n_head + h) * t->capacity * size;
            float *q = qkv + b * 3 * t->C + h * size, *k = q + t->C, *v = k + t->C;
            if (t->cos) {
                const long turn = t->rotations_differ ? b * size : 0;
                rotate(q, t->cos + turn, t->sin + turn, size);
                rotate(k, t->cos + turn, t->sin + turn, size);
            }
            memcpy(keys + offset + position * size, k, sizeof(float) * size);
            memcpy(values + offset + position * size, v, sizeof(float) * size);
            const float *bias = t->bias ? t->bias + ((t->bias_rows > 1 ? b : 0) * t->bias_heads
                                                     + (t->bias_heads > 1 ? h : 0)) * t->cache_len : NULL;
            look(q, keys + offset, values + offset, bias, scores + omp_get_thread_num() * t->capacity,
                 y + b * t->C + h * size, position + 1, size);
        }
}

static void add(float *x, const float *y, long n) {
    for (long i = 0; i < n; i++) x[i] += y[i];
}

// Run x (B, C) through all layers and write new keys and values to the caches (B, n_head, capacity, head size).
// scratch has space for 6 * B * C + n_threads * capacity floats.
void blocks(const decode_step *t, const layer *layers, long n_layer, float *const *keys, float *const *values, float *x,
            float *scratch) {
    const long n = t->B * t->C;
    float *normal = scratch, *wide = normal + n, *y = wide + 4 * n, *scores = y + n;
    for (long i = 0; i < n_layer; i++) {
        const layer *l = layers + i;
        normalise(x, l->ln_1_weight, l->ln_1_bias, normal, t->B, t->C);
        matmul(&l->c_attn, normal, wide, t->B);
        attend(t, wide, keys[i], values[i], scores, normal);
        matmul(&l->attn_c_proj, normal, y, t->B);
        add(x, y, n);
        normalise(x, l->ln_2_weight, l->ln_2_bias, normal, t->B, t->C);
        matmul(&l->c_fc, normal, wide, t->B);
        gelu_all(wide, 4 * n, t->gelu_tanh);
        matmul(&l->mlp_c_proj, wide, y, t->B);
        add(x, y, n);
    }
}

/* Systematic and stratified resampling of rows of log-weights, in O(N + n). Weights are rounded as in _schemes.py, so that every
   sum of them is exact, in any order. */
#include <stdint.h>
#include <string.h>

#define MAGIC 6755399441055744.0 /* 1.5 2^52: a sum with it has an integer in its last bits */
#define BLOCK 512

#ifdef __FMA__
#define MULTIPLY_ADD(a, b, c) __builtin_fma(a, b, c)
#else
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif

static inline int64_t bits_of(double x) {
    int64_t bits;
    memcpy(&bits, &x, 8);
    return bits;
}

static inline double of_bits(int64_t bits) {
    double x;
    memcpy(&x, &bits, 8);
    return x;
}

/* exp(d) for d <= 0: exp(i ln 2) times a polynomial; NaN stays. */
static inline double weight(double d) {
    double t = MULTIPLY_ADD(d, 1.4426950408889634, MAGIC), i = t - MAGIC;
    double f = MULTIPLY_ADD(i, -0.693147180369123816490, d);
    f = MULTIPLY_ADD(i, -1.90821492927058770002e-10, f);
    double p = 1.6059043836821613e-10;
    p = MULTIPLY_ADD(p, f, 2.08767569878681e-09);
    p = MULTIPLY_ADD(p, f, 2.505210838544172e-08);
    p = MULTIPLY_ADD(p, f, 2.755731922398589e-07);
    p = MULTIPLY_ADD(p, f, 2.7557319223985893e-06);
    p = MULTIPLY_ADD(p, f, 2.48015873015873e-05);
    p = MULTIPLY_ADD(p, f, 0.0001984126984126984);
    p = MULTIPLY_ADD(p, f, 0.001388888888888889);
    p = MULTIPLY_ADD(p, f, 0.008333333333333333);
    p = MULTIPLY_ADD(p, f, 0.041666666666666664);
    p = MULTIPLY_ADD(p, f, 0.16666666666666666);
    p = MULTIPLY_ADD(p, f, 0.5);
    p = MULTIPLY_ADD(p, f, 1.0);
    p = MULTIPLY_ADD(p, f, 1.0);
    p = of_bits((int64_t)((uint64_t)bits_of(p) + ((uint64_t)bits_of(t) << 52)));
    return d <= -45.0 ? 0.0 : p; /* below the last place of any sum */
}

/* #{k: k + u_k < at} */
static inline int32_t end_of(double at, double total, double c, const double *u, int strata, int32_t n) {
    double t = at + MAGIC, rest = at - (t - MAGIC);
    int32_t k = (int32_t)bits_of(t);
    k -= rest < 0.0;
    rest += rest < 0.0 ? 1.0 : 0.0;
    int32_t stratum = k < 0 ? 0 : k >= n ? n - 1 : k;
    k += u[strata ? stratum : 0] < rest;
    k = k < 0 ? 0 : k > n ? n : k;
    return c >= total ? n : k;
}

static void unnormalized(const double *logw, double *w, int64_t size, double *total, double *squares) {
    double top = logw[0], sum = 0.0, square = 0.0;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < size; i++) top = logw[i] > top ? logw[i] : top;
#pragma omp simd reduction(+ : sum, square)
    for (int64_t i = 0; i < size; i++) {
        double x = weight(logw[i] == top ? 0.0 : logw[i] - top);
        w[i] = x;
        sum += x;
        square += x * x;
    }
    if (sum != sum) { /* NaN: equal weights */
        for (int64_t i = 0; i < size; i++) w[i] = 1.0;
        sum = square = (double)size;
    }
    *total = sum;
    *squares = square;
}

static void drawn(double *w, double sum, const double *u, int strata, int64_t *out, int64_t size, int32_t n) {
    double above = of_bits(bits_of(sum) & 0x7FF0000000000000) * 2.0, total = 0.0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < size; i++) {
        double x = (w[i] + above) - above;
        w[i] = x;
        total += x;
    }
    double rate = (double)n / total, c = 0.0, cumulative[BLOCK];
    int32_t ends[BLOCK], begin = 0;
    memset(out, 0, (size_t)n * sizeof(int64_t));
    for (int64_t first = 0; first < size && begin < n; first += BLOCK) {
        int64_t many = size - first < BLOCK ? size - first : BLOCK;
        for (int64_t i = 0; i < many; i++) cumulative[i] = c += w[first + i];
        if (strata)
            for (int64_t i = 0; i < many; i++) ends[i] = end_of(cumulative[i] * rate, total, cumulative[i], u, 1, n);
        else
            for (int64_t i = 0; i < many; i++) ends[i] = end_of(cumulative[i] * rate, total, cumulative[i], u, 0, n);
        /* Where its offspring begin each particle leaves its number; those without any are overwritten. */
        for (int64_t i = 0; i < many && begin < n; i++) {
            out[begin] = first + i;
            begin = ends[i];
        }
    }
    int64_t last = 0;
    for (int32_t k = 0; k < n; k++) out[k] = last = out[k] > last ? out[k] : last;
}

/* Rows begin ... end - 1; limit < 0: all are resampled, and nothing is written to fresh and did. */
void resample(const double *logw, const double *u, double *w, int64_t *out, double *fresh, uint8_t *did, const double *limit,
              int64_t begin, int64_t end, int64_t size, int64_t n, int64_t strata) {
    for (int64_t row = begin; row < end; row++) {
        const double *l = logw + row * size;
        int64_t *a = out + row * n;
        double sum, squares;
        unnormalized(l, w, size, &sum, &squares);
        int resampled = *limit < 0 || sum * sum / squares < *limit;
        if (resampled)
            drawn(w, sum, u + row * (strata ? n : 1), (int)strata, a, size, (int32_t)n);
        else
            for (int64_t k = 0; k < n; k++) a[k] = k;
        if (*limit < 0) continue;
        did[row] = (uint8_t)resampled;
        if (resampled)
            memset(fresh + row * size, 0, (size_t)size * sizeof(double));
        else
            memcpy(fresh + row * size, l, (size_t)size * sizeof(double));
    }
}

/* #{i: c_i <= p_k} for sorted points p in [0, 1). */
void merged(const double *logw, const double *points, double *w, int64_t *out, int64_t begin, int64_t end, int64_t size, int64_t n) {
    for (int64_t row = begin; row < end; row++) {
        const double *p = points + row * n;
        int64_t *a = out + row * n, k = 0, last = 0;
        double sum, squares, c = 0.0, total = 0.0;
        unnormalized(logw + row * size, w, size, &sum, &squares);
        double above = of_bits(bits_of(sum) & 0x7FF0000000000000) * 2.0;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < size; i++) {
            double x = (w[i] + above) - above;
            w[i] = x;
            total += x;
        }
        for (int64_t i = 0; i < size && k < n; i++) {
            if (w[i] == 0.0) continue;
            c += w[i];
            last = i;
            while (k < n && p[k] * total < c) a[k++] = i;
        }
        while (k < n) a[k++] = last;
    }
}

/* Rows of words, of which those of one system are moved by its ancestors. */
#define MOVE(name, word)                                                                                                      \
    void name(const word *x, const int64_t *ancestors, word *out, int64_t begin, int64_t end, int64_t size, int64_t n, int64_t words) { \
        for (int64_t row = begin; row < end; row++) {                                                                         \
            const word *from = x + row * size * words;                                                                        \
            const int64_t *a = ancestors + row * n;                                                                           \
            word *to = out + row * n * words;                                                                                 \
            if (words == 1)                                                                                                   \
                for (int64_t k = 0; k < n; k++) to[k] = from[a[k]];                                                           \
            else                                                                                                              \
                for (int64_t k = 0; k < n; k++) memcpy(to + k * words, from + a[k] * words, (size_t)words * sizeof(word));    \
        }                                                                                                                     \
    }
MOVE(move1, uint8_t)
MOVE(move2, uint16_t)
MOVE(move4, uint32_t)
MOVE(move8, uint64_t)

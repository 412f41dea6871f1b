/* Systematic and stratified resampling of rows of log-weights, in O(N + n). Weights are rounded as in _schemes.py, so that every
   sum of them is exact, in any order. */
#include <math.h>
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

/* Weights rounded such that every sum is exact; returns their sum. */
static double rounded(double *w, double sum, int64_t size) {
    double above = of_bits(bits_of(sum) & 0x7FF0000000000000) * 2.0, total = 0.0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < size; i++) {
        double x = (w[i] + above) - above;
        w[i] = x;
        total += x;
    }
    return total;
}

/* i in the slots begin ... end - 1. Four are written whatever there is to write, without a branch that is hard to foresee: those that
   follow write theirs over it. */
static inline int64_t put(int64_t *out, int64_t begin, int64_t end, int64_t n, int64_t i) {
    int64_t k = begin;
    if (k + 4 <= n) {
        out[k] = out[k + 1] = out[k + 2] = out[k + 3] = i;
        k += 4;
    }
    for (; k < end; k++) out[k] = i;
    return end;
}

static void drawn(double *w, double sum, const double *u, int strata, int64_t *out, int64_t size, int32_t n) {
    double total = rounded(w, sum, size), rate = (double)n / total, c = 0.0, cumulative[BLOCK];
    int32_t ends[BLOCK];
    int64_t begin = 0;
    for (int64_t first = 0; first < size && begin < n; first += BLOCK) {
        int64_t many = size - first < BLOCK ? size - first : BLOCK;
        for (int64_t i = 0; i < many; i++) cumulative[i] = c += w[first + i];
        if (strata)
            for (int64_t i = 0; i < many; i++) ends[i] = end_of(cumulative[i] * rate, total, cumulative[i], u, 1, n);
        else
            for (int64_t i = 0; i < many; i++) ends[i] = end_of(cumulative[i] * rate, total, cumulative[i], u, 0, n);
        for (int64_t i = 0; i < many; i++) begin = put(out, begin, ends[i], n, first + i);
    }
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

/* Rows of words, of which those of one system are moved by its ancestors; 1, and nothing is done, if one is not in [0, size). */
#define MOVE(name, word)                                                                                                     \
    int64_t name(const word *x, const int64_t *ancestors, word *out, int64_t begin, int64_t end, int64_t size, int64_t n, int64_t words) {\
        const int64_t *all = ancestors + begin * n;                                                                          \
        int64_t outside = 0, many = (end - begin) * n;                                                                       \
        for (int64_t k = 0; k < many; k++) outside |= all[k] | (int64_t)((uint64_t)(size - 1) - (uint64_t)all[k]);           \
        if (outside < 0) return 1;                                                                                           \
        for (int64_t row = begin; row < end; row++) {                                                                        \
            const word *from = x + row * size * words;                                                                       \
            const int64_t *a = ancestors + row * n;                                                                          \
            word *to = out + row * n * words;                                                                                \
            if (words == 1)                                                                                                  \
                for (int64_t k = 0; k < n; k++) to[k] = from[a[k]];                                                          \
            else                                                                                                             \
                for (int64_t k = 0; k < n; k++) memcpy(to + k * words, from + a[k] * words, (size_t)words * sizeof(word));   \
        }                                                                                                                    \
        return 0;                                                                                                            \
    }
MOVE(move1, uint8_t)
MOVE(move2, uint16_t)
MOVE(move4, uint32_t)
MOVE(move8, uint64_t)

/* copies = floor(n W), and what is left of n W in w; returns the number of copies. */
static int64_t parts(double *w, double sum, int64_t *copies, int64_t size, int64_t n) {
    double rate = (double)n / rounded(w, sum, size);
    int64_t many = 0;
    for (int64_t i = 0; i < size; i++) {
        double at = w[i] * rate;
        int64_t whole = (int64_t)at;
        w[i] = at - (double)whole;
        copies[i] = whole;
        many += whole;
    }
    return many;
}

static int64_t copied(int64_t *out, const int64_t *copies, int64_t size, int64_t n) {
    int64_t begin = 0;
    for (int64_t i = 0; i < size; i++) begin = put(out, begin, begin + copies[i], n, i);
    return begin;
}

/* #{i: c_i <= p_k total} for the sorted points p of ends, of weights that become their sums: a step for each particle and each point. */
static void merge(double *w, double total, const double *p, double last, int64_t *out, int64_t size, int64_t n) {
    double c = 0.0;
    int64_t i = 0, k = 0;
    for (int64_t j = 0; j < size; j++) w[j] = c += w[j];
    while (size > 1 && w[size - 2] >= total) size--; /* none without weight at the end */
    double scale = total / last;
    while (k < n && i < size - 1) {
        int64_t below = p[k] * scale < w[i];
        out[k] = i;
        k += below;
        i += 1 - below;
    }
    for (; k < n; k++) out[k] = size - 1;
}

/* SSP: neighbours meet in rounds, of two open fractions one is closed; in the order of _schemes.py. */
void ssp(const double *logw, const double *uniforms, double *w, int64_t *copies, int64_t *owner, int64_t *out, int64_t begin,
         int64_t end, int64_t size, int64_t n) {
    for (int64_t row = begin; row < end; row++) {
        const double *u = uniforms + row * (size - 1);
        double sum, squares;
        unnormalized(logw + row * size, w, size, &sum, &squares);
        int64_t left = n - parts(w, sum, copies, size, n);
        for (int64_t i = 0; i < size; i++) owner[i] = i;
        for (int64_t many = size; many > 1; many = many / 2 + many % 2) {
            int64_t pairs = many / 2;
            for (int64_t j = 0; j < pairs; j++) {
                double a = w[2 * j], b = w[2 * j + 1], both = a + b, v = u[j];
                int64_t own_a = owner[2 * j], own_b = owner[2 * j + 1], full = both >= 1.0;
                int64_t closes_a = (full & (v * (2.0 - both) < 1.0 - b)) | ((1 - full) & (v * both >= a));
                int64_t differ = (own_a ^ own_b) & -closes_a;
                copies[own_b ^ differ] += full;
                left -= full;
                owner[j] = own_a ^ differ;
                w[j] = both - (double)full;
            }
            if (many % 2) {
                owner[pairs] = owner[many - 1];
                w[pairs] = w[many - 1];
            }
            u += pairs;
        }
        copies[owner[0]] += left; /* the last fraction is 0 or 1, but for rounding */
        copied(out + row * n, copies, size, n);
    }
}

/* Multinomial draws: of n sorted uniforms the sums over the last one, as _schemes.py has them. */
void multinomial(const double *logw, const double *sums, double *w, int64_t *out, int64_t begin, int64_t end, int64_t size, int64_t n) {
    for (int64_t row = begin; row < end; row++) {
        const double *p = sums + row * (n + 1);
        double sum, squares;
        unnormalized(logw + row * size, w, size, &sum, &squares);
        merge(w, rounded(w, sum, size), p, p[n], out + row * n, size, n);
    }
}

/* Copies, and multinomial draws of what is left: of r sorted uniforms the first r sums over the (r + 1)-th. */
void residual(const double *logw, const double *sums, double *w, int64_t *copies, int64_t *out, int64_t begin, int64_t end,
              int64_t size, int64_t n) {
    for (int64_t row = begin; row < end; row++) {
        const double *p = sums + row * (n + 1);
        double sum, squares;
        unnormalized(logw + row * size, w, size, &sum, &squares);
        int64_t many = n, begin;
        many -= parts(w, sum, copies, size, n);
        begin = copied(out + row * n, copies, size, n);
        sum = 0.0;
        for (int64_t i = 0; i < size; i++) sum += w[i];
        if (many > 0) merge(w, rounded(w, sum, size), p, p[many], out + row * n + begin, size, many);
    }
}

/* logw + incr, with equal weights where none is left; its largest; the logarithm of the sums before and after. */
void reweight(const double *logw, const double *incr, double *out, double *tops, double *before, double *after, int64_t begin,
              int64_t end, int64_t size) {
    for (int64_t row = begin; row < end; row++) {
        const double *l = logw + row * size, *g = incr + row * size;
        double *o = out + row * size, old = l[0], top, s = 0.0, t = 0.0;
#pragma omp simd reduction(max : old)
        for (int64_t i = 0; i < size; i++) old = l[i] > old ? l[i] : old;
        int lone = !(old - old == 0.0);
        for (int64_t i = 0; lone && i < size; i++) o[i] = l[i] == old || old != old ? 0.0 : -INFINITY;
        const double *from = lone ? o : l;
        if (lone) old = 0.0;
        top = from[0] + g[0];
#pragma omp simd reduction(max : top) reduction(+ : s)
        for (int64_t i = 0; i < size; i++) {
            double x = from[i] + g[i];
            s += weight(from[i] - old);
            o[i] = x;
            top = x > top ? x : top;
        }
        before[row] = old + log(s);
        if (!(top - top == 0.0)) { /* an atom, no weight, or NaN */
            for (int64_t i = 0; i < size; i++) t += o[i];
            tops[row] = after[row] = t != t && top != INFINITY && top != -INFINITY ? NAN : top;
            continue;
        }
#pragma omp simd reduction(+ : t)
        for (int64_t i = 0; i < size; i++) t += weight(o[i] - top);
        tops[row] = t != t ? NAN : top;
        after[row] = top + log(t);
    }
}

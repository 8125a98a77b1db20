/* Products of sparse codes with rows of a table, and top-k selection; built at first use by native.py, called by
   sparse_products.py, atom_norms.py and selection.py, which have the shapes. FLOAT64 selects the type.

   A kernel works on the rows begin .. end - 1 of its result, so that threads share it. Sums are kept apart in vectors of
   fixed size: results depend neither on addresses nor on the number of threads, and two runs are equal bit by bit. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

#ifdef FLOAT64
typedef double real;
#else
typedef float real;
#endif

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#define LANES ((int64_t)(BYTES / sizeof(real)))
#define BLOCK 64 /* pre-activations that are compared at once */

typedef real lanes __attribute__((vector_size(BYTES), aligned(sizeof(real)), may_alias));
#define AT(p) (*(const lanes *)(p))

static inline real dot(const real *x, const real *y, int64_t d) {
    lanes a = {0}, b = {0}, c = {0}, e = {0};
    int64_t j = 0;
    for (; j + 4 * LANES <= d; j += 4 * LANES) {
        a += AT(x + j) * AT(y + j);
        b += AT(x + j + LANES) * AT(y + j + LANES);
        c += AT(x + j + 2 * LANES) * AT(y + j + 2 * LANES);
        e += AT(x + j + 3 * LANES) * AT(y + j + 3 * LANES);
    }
    for (; j + LANES <= d; j += LANES) a += AT(x + j) * AT(y + j);
    a = (a + b) + (c + e);
    real sum = 0;
    for (int64_t i = 0; i < LANES; i++) sum += a[i];
    for (; j < d; j++) sum += x[j] * y[j];
    return sum;
}

static inline void prefetch(const real *row, int64_t d) {
    for (int64_t j = 0; j < d; j += 64 / (int64_t)sizeof(real)) __builtin_prefetch(row + j);
}

/* out[n][j] = <left[n], table[indices[n][j]]>; 0 where `values` is given and 0. */
void pair_dots(int64_t begin, int64_t end, int64_t k, int64_t d, const real *left, const real *table,
               const int64_t *indices, const real *values, real *out) {
    for (int64_t e = begin * k; e < end * k; e++) {
        if (e + 2 < end * k) prefetch(table + indices[e + 2] * d, d);
        out[e] = values && values[e] == 0 ? 0 : dot(left + e / k * d, table + indices[e] * d, d);
    }
}

/* out[i] = sum over e in offsets[i] .. offsets[i + 1] - 1 of weights[e] * table[rows[e]]. */
void row_sums(int64_t begin, int64_t end, int64_t d, const int64_t *offsets, const int64_t *rows, const real *weights,
              const real *table, real *out) {
    for (int64_t i = begin; i < end; i++) {
        real *restrict sum = out + i * d;
        int64_t e = offsets[i], stop = offsets[i + 1];
        memset(sum, 0, (size_t)d * sizeof(real));
        for (; e + 4 <= stop; e += 4) {
            const real *p = table + rows[e] * d, *q = table + rows[e + 1] * d;
            const real *r = table + rows[e + 2] * d, *s = table + rows[e + 3] * d;
            real u = weights[e], v = weights[e + 1], w = weights[e + 2], x = weights[e + 3];
            for (int64_t f = e + 4; f < e + 8 && f < stop; f++) prefetch(table + rows[f] * d, d);
            int64_t j = 0;
            for (; j + LANES <= d; j += LANES)
                *(lanes *)(sum + j) += (u * AT(p + j) + v * AT(q + j)) + (w * AT(r + j) + x * AT(s + j));
            for (; j < d; j++) sum[j] += (u * p[j] + v * q[j]) + (w * r[j] + x * s[j]);
        }
        for (; e < stop; e++) {
            const real *p = table + rows[e] * d, u = weights[e];
            for (int64_t j = 0; j < d; j++) sum[j] += u * p[j];
        }
    }
}

/* Sort the entries of codes (n, k) by concept, in the order of rows and without those of value 0: those of concept i
   are offsets[i] .. offsets[i + 1] - 1. */
void by_concept(int64_t n, int64_t k, int64_t concepts, const int64_t *indices, const real *values, int64_t *offsets,
                int64_t *rows, real *weights) {
    memset(offsets, 0, (size_t)(concepts + 1) * sizeof(int64_t));
    for (int64_t e = 0; e < n * k; e++) offsets[indices[e] + 1] += values[e] != 0;
    for (int64_t i = 0; i < concepts; i++) offsets[i + 1] += offsets[i];
    for (int64_t e = 0; e < n * k; e++) {
        if (values[e] == 0) continue;
        int64_t at = offsets[indices[e]]++;
        rows[at] = e / k, weights[at] = values[e];
    }
    memmove(offsets + 1, offsets, (size_t)concepts * sizeof(int64_t));
    offsets[0] = 0;
}

/* Copy the entries of codes (n, k) at or above `least`, in their order, to codes of width `width`. */
void keep_at_least(int64_t begin, int64_t end, int64_t k, int64_t width, double least, const real *values,
                   const int64_t *indices, real *kept, int64_t *places) {
    for (int64_t n = begin; n < end; n++) {
        int64_t at = n * width;
        for (int64_t e = n * k; e < (n + 1) * k && at < (n + 1) * width; e++)
            if ((double)values[e] >= least) kept[at] = values[e], places[at++] = indices[e];
        for (; at < (n + 1) * width; at++) kept[at] = 0, places[at] = 0;
    }
}

/* Ask for large pages under memory that is about to be written: fewer faults now, and less to give back later. */
void use_large_pages(void *memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    uintptr_t page = 1 << 21, from = ((uintptr_t)memory + page - 1) & ~(page - 1), to = (uintptr_t)memory + (uintptr_t)bytes;
    if (to > from + page) madvise((void *)from, (to - from) & ~(page - 1), MADV_HUGEPAGE); /* without it, it works too */
#else
    (void)memory, (void)bytes;
#endif
}

/* Take from each row of a gradient its part along the atom. */
void remove_parallel(int64_t begin, int64_t end, int64_t d, const real *atoms, real *gradient) {
    for (int64_t i = begin; i < end; i++) {
        const real *atom = atoms + i * d;
        real *g = gradient + i * d, square = dot(atom, atom, d);
        real along = square > 0 ? dot(g, atom, d) / square : 0;
        for (int64_t j = 0; j < d; j++) g[j] -= along * atom[j];
    }
}

/* Divide rows by their norm plus eps; a row of infinite norm becomes NaN. */
void normalize_rows(int64_t begin, int64_t end, int64_t d, double eps, real *atoms) {
    for (int64_t i = begin; i < end; i++) {
        real *atom = atoms + i * d, square = dot(atom, atom, d);
        real scale = isinf(square) ? (real)NAN : (real)(1 / (sqrt((double)square) + eps));
        for (int64_t j = 0; j < d; j++) atom[j] *= scale;
    }
}

#ifndef FLOAT64
/* Round rows to bfloat16 (to nearest, ties to even); with the norm of each, and of what rounding took away. */
void narrow(int64_t begin, int64_t end, int64_t d, const float *x, uint16_t *out, float *norms, float *lost) {
    for (int64_t i = begin; i < end; i++) {
        float square = 0, rest = 0;
        for (int64_t from = 0; from < d; from += BLOCK) {
            float squares[BLOCK] = {0}, rests[BLOCK] = {0};
            int64_t width = d - from < BLOCK ? d - from : BLOCK;
            for (int64_t j = 0; j < width; j++) {
                uint32_t u, kept;
                float v = x[i * d + from + j], w;
                memcpy(&u, &v, 4);
                kept = (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u;
                memcpy(&w, &kept, 4);
                out[i * d + from + j] = (uint16_t)(kept >> 16);
                squares[j] = v * v, rests[j] = (v - w) * (v - w);
            }
            for (int64_t j = 0; j < width; j++) square += squares[j], rest += rests[j];
        }
        norms[i] = sqrtf(square), lost[i] = sqrtf(rest);
    }
}

/* A candidate is a pre-activation and its concept in one integer: larger for larger values, then for lower concepts. */
static inline uint64_t key_of(float value, int64_t concept) {
    uint32_t u;
    memcpy(&u, &value, 4);
    u ^= u >> 31 ? 0xffffffffu : 0x80000000u;
    return (uint64_t)u << 32 | (uint32_t)~(uint32_t)concept;
}

static inline float value_of(uint64_t key) {
    uint32_t u = (uint32_t)(key >> 32);
    float value;
    u ^= u >> 31 ? 0x80000000u : 0xffffffffu;
    memcpy(&value, &u, 4);
    return value;
}

static inline int64_t concept_of(uint64_t key) { return (int64_t)(uint32_t)~(uint32_t)key; }

/* Put the k largest keys first. */
static void partition(uint64_t *keys, int64_t count, int64_t k) {
    int64_t low = 0, high = count - 1;
    while (low < high) {
        uint64_t a = keys[low], b = keys[low + (high - low) / 2], c = keys[high];
        uint64_t pivot = a > b ? (b > c ? b : a > c ? c : a) : (a > c ? a : b > c ? c : b);
        int64_t i = low, j = high;
        while (i <= j) {
            while (keys[i] > pivot) i++;
            while (keys[j] < pivot) j--;
            if (i <= j) {
                uint64_t swap = keys[i];
                keys[i++] = keys[j], keys[j--] = swap;
            }
        }
        if (k - 1 <= j) high = j;
        else if (k - 1 >= i) low = i;
        else break;
    }
}

/* Raise a row's bound to what its k-th largest candidate leaves possible, and drop the candidates below it. */
static int64_t tighten(uint64_t *keys, int64_t count, int64_t k, float margin, float relative, float *bound) {
    if (count <= k) return count;
    partition(keys, count, k);
    float least = value_of(keys[0]);
    for (int64_t i = 1; i < k; i++) {
        float value = value_of(keys[i]);
        least = value < least ? value : least;
    }
    float now = least > 0 ? least - 2 * margin - 2 * relative * least : 0;
    if (now > *bound) *bound = now;
    int64_t kept = k;
    for (int64_t i = k; i < count; i++)
        if (value_of(keys[i]) >= *bound) keys[kept++] = keys[i];
    return kept;
}

/* Say which of BLOCK pre-activations are at or above a bound, one bit each. */
static inline uint64_t at_or_above(const float *p, float bound) {
    uint64_t bits = 0;
#ifdef __AVX512F__
    for (int64_t j = 0; j < BLOCK; j += 16)
        bits |= (uint64_t)_mm512_cmp_ps_mask(_mm512_loadu_ps(p + j), _mm512_set1_ps(bound), _CMP_GE_OQ) << j;
#else
    for (int64_t j = 0; j < BLOCK; j++) bits |= (uint64_t)(p[j] >= bound) << j;
#endif
    return bits;
}

/* Collect, from a tile (rows, width) of approximate pre-activations in bfloat16 (wide: float32), the candidates of each
   row: all at or above its bound. With k > 0, the bound rises so that just those remain that could be among the k
   largest. A row of more than `room` candidates is given up: its count becomes -1. */
void collect(int64_t begin, int64_t end, int64_t width, int64_t first, int64_t k, int64_t room, int64_t wide,
             const void *tile, const float *bias, const float *margins, double relative, float *bounds, int64_t *counts,
             uint64_t *candidates) {
    for (int64_t n = begin; n < end; n++) {
        int64_t count = counts[n], limit = k > 0 && 4 * k + count < room ? 4 * k + count : room;
        uint64_t *keys = candidates + n * room;
        float bound = bounds[n], p[BLOCK];
        for (int64_t from = 0; from < width && count >= 0; from += BLOCK) {
            int64_t size = width - from < BLOCK ? width - from : BLOCK;
            const uint16_t *halves = (const uint16_t *)tile + n * width + from;
            const float *b = bias + from;
            if (wide) {
                for (int64_t j = 0; j < size; j++) p[j] = ((const float *)tile)[n * width + from + j] + b[j];
            } else {
                for (int64_t j = 0; j < size; j++) {
                    uint32_t u = (uint32_t)halves[j] << 16;
                    float v;
                    memcpy(&v, &u, 4);
                    p[j] = v + b[j];
                }
            }
            for (int64_t j = size; j < BLOCK; j++) p[j] = -INFINITY;
            uint64_t bits = at_or_above(p, bound);
            if (!bits) continue;
            if (count + BLOCK > limit && k > 0) {
                count = tighten(keys, count, k, margins[n], (float)relative, &bound);
                limit = 4 * k + 2 * count < room ? 4 * k + 2 * count : room;
                bits = at_or_above(p, bound);
            }
            if (count + BLOCK > room) {
                count = -1;
                break;
            }
            for (; bits; bits &= bits - 1) {
                int64_t j = __builtin_ctzll(bits);
                keys[count++] = key_of(p[j], first + from + j);
            }
        }
        counts[n] = count, bounds[n] = bound;
    }
}

/* Replace the approximate values of the candidates by exact ones; keep those above 0 that are not below `least`, and
   with k > 0 the k largest of them, in falling order. */
void settle(int64_t begin, int64_t end, int64_t d, int64_t k, int64_t room, double least, const float *x, const float *weight,
            const float *bias, const float *margins, double relative, float *bounds, int64_t *counts,
            uint64_t *candidates) {
    for (int64_t n = begin; n < end; n++) {
        if (counts[n] < 0) continue;
        uint64_t *keys = candidates + n * room;
        int64_t count = counts[n], kept = 0;
        if (k > 0) count = tighten(keys, count, k, margins[n], (float)relative, &bounds[n]);
        for (int64_t i = 0; i < count; i++) {
            if (i + 2 < count) prefetch(weight + concept_of(keys[i + 2]) * d, d);
            int64_t concept = concept_of(keys[i]);
            float exact = dot(x + n * d, weight + concept * d, d) + bias[concept];
            if (exact > 0 && (double)exact >= least) keys[kept++] = key_of(exact, concept);
        }
        if (k > 0 && kept > k) {
            partition(keys, kept, k);
            kept = k;
        }
        for (int64_t i = 1; i < kept && k > 0; i++) {
            uint64_t key = keys[i];
            int64_t j = i;
            for (; j > 0 && keys[j - 1] < key; j--) keys[j] = keys[j - 1];
            keys[j] = key;
        }
        counts[n] = kept;
    }
}

/* Write the candidates as codes of width k, filled up with value 0 at index 0. */
void unpack(int64_t begin, int64_t end, int64_t k, int64_t room, const int64_t *counts, const uint64_t *candidates,
            float *values, int64_t *indices) {
    for (int64_t n = begin; n < end; n++) {
        for (int64_t i = 0; i < k; i++) {
            uint64_t key = i < counts[n] ? candidates[n * room + i] : key_of(0, 0);
            values[n * k + i] = value_of(key), indices[n * k + i] = concept_of(key);
        }
    }
}
#endif

/* The forward pass of a decoder-only Transformer over tokens that each know their sequence and position, in float32;
   built at first use by native_rows.py, which mirrors the structures and has the shapes.

   What is computed for a token depends on its own sequence alone, bit by bit: every product sums over its depth in
   order, however many rows there are, and attention goes through a sequence's keys page by page, from the first.

   A matrix (depth, width) that rows are multiplied by is packed in panels of COLUMNS columns, each (depth, COLUMNS), the
   last filled up with zeros. A page holds PAGE positions of all layers: per layer keys (kv_heads, head_dim, PAGE), then
   values (kv_heads, PAGE, head_dim). */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define PAGE 16
#define CHUNK 64 /* tokens that go through a layer together */
#ifdef __AVX512F__
#define VECTORS 2 /* of a panel, and as many rows at once as there are registers for their sums */
#define ROWS 8
#else
#define VECTORS 1
#define ROWS 4
#endif
#define COLUMNS (16 * VECTORS)

typedef float lanes __attribute__((vector_size(64), aligned(4), may_alias));

enum { RMS_NORM, LAYER_NORM };
enum { RELU, SILU, GELU, GELU_TANH };

typedef struct { /* as in native_rows.py; NULL: no norm of queries and keys, no bias */
    const float *attention_norm, *qkv, *q_norm, *k_norm, *out, *mlp_norm, *up, *up_bias, *down, *down_bias;
} Layer;

typedef struct { /* NULL: no rotation, no slopes */
    int64_t n_layers, d_model, n_heads, kv_heads, head_dim, d_ff, width;
    int64_t norm, before, norm_all_heads, activation, gated; /* `before`: norms precede what they belong to */
    double eps, scale;
    const Layer *layers;
    const float *embedding, *norm_weight, *head, *cos, *sin, *slopes;
} Model;

typedef struct {
    const int64_t *ids, *positions;
    float *const *pages; /* (tokens, most pages) of each token's sequence */
    int64_t most_pages;
    const int64_t *row; /* of the logits that follow a token; -1: none wanted */
    float *logits;
} Tokens;

const int64_t native_rows_columns = COLUMNS, native_rows_page = PAGE, native_rows_chunk = CHUNK;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t padded(int64_t width) { return (width + COLUMNS - 1) / COLUMNS * COLUMNS; }

/* e^x to 2 units in the last place: 2^n times a polynomial in x - n log 2; 0 below -87.3. */
static inline float exp_of(float x) {
    float bounded = x < -87.3f ? -87.3f : x;
    bounded = bounded > 88.3f ? 88.3f : bounded;
    float shifted = bounded * 0x1.715476p+0f + 0x1.8p23f, n = shifted - 0x1.8p23f; /* n = round(x / log 2) */
    float r = bounded - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;
    float y = 0x1.a01a02p-13f;
    y = y * r + 0x1.6c16c2p-10f;
    y = y * r + 0x1.111112p-7f;
    y = y * r + 0x1.555556p-5f;
    y = y * r + 0x1.555556p-3f;
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    uint32_t power;
    memcpy(&power, &shifted, 4);
    power = (power << 23) + 0x3f800000u;
    float scale;
    memcpy(&scale, &power, 4);
    y *= scale;
    y = x < -87.3f ? 0.0f : y;
    return x > 88.3f ? INFINITY : y;
}

static float total(lanes sums) {
    for (int half = 8; half; half /= 2)
        for (int l = 0; l < half; l++) sums[l] += sums[l + half];
    return sums[0];
}

static float dot(const float *a, const float *b, int64_t n) {
    lanes sums = {0};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) sums += *(const lanes *)(a + i) * *(const lanes *)(b + i);
    float rest = 0;
    for (; i < n; i++) rest += a[i] * b[i];
    return rest + total(sums);
}

static float sum(const float *a, int64_t n) {
    lanes sums = {0};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) sums += *(const lanes *)(a + i);
    float rest = 0;
    for (; i < n; i++) rest += a[i];
    return rest + total(sums);
}

/* ---- products: every sum runs over the depth in order, in registers of its own ---- */

static inline __attribute__((always_inline)) void tile(float *y, int64_t ldy, const float *x, int64_t ldx,
                                                       const float *panel, int64_t depth, const int rows) {
    lanes sums[ROWS * VECTORS] = {{0}};
    for (int64_t i = 0; i < depth; i++, panel += COLUMNS)
#pragma GCC unroll 16
        for (int s = 0; s < rows * VECTORS; s++)
            sums[s] += x[s / VECTORS * ldx + i] * ((const lanes *)panel)[s % VECTORS];
#pragma GCC unroll 16
    for (int s = 0; s < rows * VECTORS; s++) ((lanes *)(y + s / VECTORS * ldy))[s % VECTORS] = sums[s];
}

/* y (rows, padded width) = x (rows, depth) times a packed matrix. */
static void product(float *y, int64_t ldy, const float *x, int64_t ldx, int64_t rows, const float *matrix,
                    int64_t depth, int64_t width) {
    for (int64_t c = 0; c < width; c += COLUMNS, matrix += depth * COLUMNS) {
        float *to = y + c;
        const float *from = x;
        int64_t left = rows;
        for (; left >= ROWS; left -= ROWS, to += ROWS * ldy, from += ROWS * ldx)
            tile(to, ldy, from, ldx, matrix, depth, ROWS);
        if (left & 4) tile(to, ldy, from, ldx, matrix, depth, 4), to += 4 * ldy, from += 4 * ldx;
        if (left & 2) tile(to, ldy, from, ldx, matrix, depth, 2), to += 2 * ldy, from += 2 * ldx;
        if (left & 1) tile(to, ldy, from, ldx, matrix, depth, 1);
    }
}

/* ---- what belongs to one token ---- */

static void normalise(float *y, const float *x, const float *weight, int64_t n, const Model *m) {
    float mean = m->norm == LAYER_NORM ? sum(x, n) / (float)n : 0;
    for (int64_t i = 0; i < n; i++) y[i] = x[i] - mean;
    float r = 1 / sqrtf(dot(y, y, n) / (float)n + (float)m->eps);
    for (int64_t i = 0; i < n; i++) y[i] = y[i] * r * weight[i];
}

static void activate(float *h, int64_t n, int64_t kind) {
    switch (kind) {
    case RELU:
        for (int64_t i = 0; i < n; i++) h[i] = h[i] < 0 ? 0 : h[i];
        break;
    case SILU:
        for (int64_t i = 0; i < n; i++) h[i] = h[i] / (1 + exp_of(-h[i]));
        break;
    case GELU:
        for (int64_t i = 0; i < n; i++) h[i] = 0.5f * h[i] * (1 + erff(h[i] * 0.70710678118654752440f));
        break;
    case GELU_TANH: /* (1 + tanh y) / 2 = 1 / (1 + e^-2y), y = sqrt(2 / pi) (h + 0.044715 h^3) */
        for (int64_t i = 0; i < n; i++)
            h[i] = h[i] / (1 + exp_of(-1.59576912160573071176f * (h[i] + 0.044715f * h[i] * h[i] * h[i])));
    }
}

/* Normalise and rotate the heads of a query or key in place. */
static void position_heads(float *x, int64_t heads, const float *weight, int64_t position, const Model *m) {
    int64_t dim = m->head_dim, half = dim / 2, together = m->norm_all_heads ? heads * dim : dim;
    if (weight)
        for (int64_t c = 0; c < heads * dim; c += together) normalise(x + c, x + c, weight, together, m);
    if (m->cos)
        for (int64_t h = 0; h < heads; h++, x += dim) {
            const float *cos = m->cos + position * half, *sin = m->sin + position * half;
            for (int64_t i = 0; i < half; i++) {
                float a = x[i], b = x[i + half];
                x[i] = a * cos[i] - b * sin[i];
                x[i + half] = b * cos[i] + a * sin[i];
            }
        }
}

/* Put a position's keys and values into its page; the rest of a page that begins is 0, since zero weights meet it. */
static void store(float *page, const float *key, const float *value, int64_t slot, const Model *m) {
    int64_t dim = m->head_dim, size = m->kv_heads * dim * PAGE;
    if (!slot) memset(page, 0, 2 * size * sizeof(float));
    for (int64_t h = 0; h < m->kv_heads; h++) {
        for (int64_t d = 0; d < dim; d++) page[(h * dim + d) * PAGE + slot] = key[h * dim + d];
        memcpy(page + size + (h * PAGE + slot) * dim, value + h * dim, dim * sizeof(float));
    }
}

/* Have memory send what is read soon; what lies behind the last page's end is never read. */
static inline void fetch(const float *at, int64_t numbers) {
    for (int64_t i = 0; i < numbers; i += 16) __builtin_prefetch(at + i);
}

/* Attention of one token's queries (n_heads, head_dim) over its sequence up to itself; `at`: of the layer in a page. */
static void attend(float *to, const float *q, float *const *pages, int64_t at, int64_t position, float *logits,
                   const Model *m) {
    int64_t dim = m->head_dim, size = m->kv_heads * dim * PAGE, count = position / PAGE + 1;
    float scale = 1 / sqrtf((float)dim);
    for (int64_t h = 0; h < m->n_heads; h++, q += dim, to += dim) {
        int64_t offset = at + h / (m->n_heads / m->kv_heads) * dim * PAGE;
        lanes best, sums = {0};
        for (int l = 0; l < 16; l++) best[l] = -INFINITY;
        for (int64_t p = 0; p < count; p++) {
            const lanes *keys = (const lanes *)(pages[p] + offset);
            fetch(pages[p] + offset + size, dim * PAGE);
            lanes s, parts[4] = {{0}}; /* of channels that leave these remainders: no sum need wait for the last */
            int64_t d = 0;
            for (; d + 4 <= dim; d += 4)
#pragma GCC unroll 4
                for (int k = 0; k < 4; k++) parts[k] += q[d + k] * keys[d + k];
            for (; d < dim; d++) parts[0] += q[d] * keys[d];
            s = ((parts[0] + parts[1]) + (parts[2] + parts[3])) * scale;
            if (m->slopes)
                for (int l = 0; l < PAGE; l++) s[l] += m->slopes[h] * (float)(position - p * PAGE - l);
            for (int64_t l = position - p * PAGE + 1; l < PAGE; l++) s[l] = -INFINITY;
            for (int l = 0; l < PAGE; l++) best[l] = s[l] > best[l] ? s[l] : best[l];
            ((lanes *)logits)[p] = s;
        }
        float most = best[0];
        for (int l = 1; l < PAGE; l++) most = best[l] > most ? best[l] : most;
        for (int64_t j = 0; j < count * PAGE; j++) logits[j] = exp_of(logits[j] - most);
        for (int64_t p = 0; p < count; p++) {
            sums += ((const lanes *)logits)[p];
            fetch(pages[p] + offset + dim * PAGE, dim * PAGE);
        }
        float norm = 1 / total(sums);
        int64_t d = 0;
        for (; d + 16 <= dim; d += 16) {
            lanes mixed[4] = {{0}}; /* of slots, likewise */
            for (int64_t p = 0; p < count; p++) {
                const float *values = pages[p] + offset + size + d, *weights = logits + p * PAGE;
                for (int64_t j = 0; j < PAGE; j += 4)
#pragma GCC unroll 4
                    for (int k = 0; k < 4; k++) mixed[k] += weights[j + k] * *(const lanes *)(values + (j + k) * dim);
            }
            *(lanes *)(to + d) = ((mixed[0] + mixed[1]) + (mixed[2] + mixed[3])) * norm;
        }
        for (; d < dim; d++) {
            float mixed = 0;
            for (int64_t j = 0; j < count * PAGE; j++)
                mixed += logits[j] * pages[j / PAGE][offset + size + j % PAGE * dim + d];
            to[d] = mixed * norm;
        }
    }
}

/* ---- the network ---- */

/* x += scale * y, or the norm of y where norms come after. */
static void add(float *x, float *y, const float *weight, int64_t ld, int64_t rows, const Model *m) {
    for (int64_t r = 0; r < rows; r++, x += ld, y += ld) {
        if (!m->before) normalise(y, y, weight, m->d_model, m);
        for (int64_t c = 0; c < m->d_model; c++) x[c] += (float)m->scale * y[c];
    }
}

static const float *source(float *to, const float *x, const float *weight, int64_t ld, int64_t rows, const Model *m) {
    if (!m->before) return x;
    for (int64_t r = 0; r < rows; r++) normalise(to + r * ld, x + r * ld, weight, m->d_model, m);
    return to;
}

/* Tokens first .. last - 1, of which those of one sequence are in order. scratch: see native_rows.py. */
void forward(const Model *m, const Tokens *t, int64_t first, int64_t last, float *scratch) {
    int64_t n = m->d_model, kv = m->kv_heads * m->head_dim, ld = padded(n), ff = padded(m->d_ff);
    int64_t hidden = m->gated ? 2 * ff : ff, ldw = padded(n + 2 * kv) > hidden ? padded(n + 2 * kv) : hidden;
    float *x = scratch, *a = x + CHUNK * ld, *b = a + CHUNK * ld, *wide = b + CHUNK * ld, *logits = wide + CHUNK * ldw;
    for (; first < last; first += CHUNK) {
        int64_t rows = least(CHUNK, last - first);
        for (int64_t r = 0; r < rows; r++)
            memcpy(x + r * ld, m->embedding + t->ids[first + r] * n, n * sizeof(float));
        for (int64_t i = 0; i < m->n_layers; i++) {
            const Layer *l = m->layers + i;
            int64_t at = i * 2 * kv * PAGE;
            product(wide, ldw, source(a, x, l->attention_norm, ld, rows, m), ld, rows, l->qkv, n, n + 2 * kv);
            for (int64_t r = 0; r < rows; r++) {
                float *q = wide + r * ldw, *k = q + n;
                int64_t position = t->positions[first + r];
                float *const *pages = t->pages + (first + r) * t->most_pages;
                position_heads(q, m->n_heads, l->q_norm, position, m);
                position_heads(k, m->kv_heads, l->k_norm, position, m);
                store(pages[position / PAGE] + at, k, k + kv, position % PAGE, m);
            }
            for (int64_t r = 0; r < rows; r++)
                attend(a + r * ld, wide + r * ldw, t->pages + (first + r) * t->most_pages, at, t->positions[first + r],
                       logits, m);
            product(b, ld, a, ld, rows, l->out, n, n);
            add(x, b, l->attention_norm, ld, rows, m);
            product(wide, ldw, source(a, x, l->mlp_norm, ld, rows, m), ld, rows, l->up, n, hidden);
            for (int64_t r = 0; r < rows; r++) {
                float *h = wide + r * ldw;
                if (l->up_bias)
                    for (int64_t c = 0; c < hidden; c++) h[c] += l->up_bias[c];
                activate(h, m->d_ff, m->activation);
                if (m->gated)
                    for (int64_t c = 0; c < m->d_ff; c++) h[c] *= h[c + ff];
            }
            product(b, ld, wide, ldw, rows, l->down, m->d_ff, n);
            for (int64_t r = 0; l->down_bias && r < rows; r++)
                for (int64_t c = 0; c < n; c++) b[r * ld + c] += l->down_bias[c];
            add(x, b, l->mlp_norm, ld, rows, m);
        }
        int64_t wanted = 0, top = -1;
        for (int64_t r = 0; r < rows; r++)
            if (t->row[first + r] >= 0) {
                top = top < 0 ? t->row[first + r] : top;
                normalise(a + wanted++ * ld, x + r * ld, m->norm_weight, n, m);
            }
        if (wanted)
            product(t->logits + top * padded(m->width), padded(m->width), a, ld, wanted, m->head, n, m->width);
    }
}

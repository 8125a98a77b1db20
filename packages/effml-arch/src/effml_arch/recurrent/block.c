/* The sequential part of a recurrent layer, forward and backward; built at first use by native.py, which mirrors the
   structures and has the shapes. FLOAT64 selects the type.

   A matrix (depth, width) that rows are multiplied by is packed in panels of some columns, each (depth, columns) on its
   own and the last filled up with zeros. Sums are kept apart in vectors of fixed size, so that results do not depend on
   addresses and two runs are equal bit by bit. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef FLOAT64
typedef double real;
#else
typedef float real;
#endif

#if defined(__AVX512F__) /* bytes of a vector, and as many sums as registers have room for */
#define BYTES 64
#define SUMS 16
#elif defined(__AVX__)
#define BYTES 32
#define SUMS 8
#else
#define BYTES 16
#define SUMS 8
#endif
#define COLUMNS ((int64_t)(128 / sizeof(real))) /* of a wide panel, as in native.py; a narrow one has half of them */
#define LANES ((int64_t)(BYTES / sizeof(real)))
#define CHUNK 128 /* keys, and */
#define BATCH 32  /* rows of queries, whose logits exist at once */

typedef real lanes __attribute__((vector_size(BYTES), aligned(sizeof(real)), may_alias));

enum { NO_NORM, RMS_NORM, LAYER_NORM };
enum { RELU, SILU, GELU, GELU_TANH };

/* Arrays as in native.py; NULL stands for no bias, no mask, no dropout, no rotation. */
typedef struct {
    int64_t batch, seq, kv_heads, group, head_dim, d_model, d_ff;
    int64_t slot, window; /* of the first position; 0: none */
    const real *slopes, *q;
    const uint8_t *valid;
    const int64_t *documents;
    real *logits, *mixed, *narrow, *normed, *wide; /* scratch */
} Layer;

typedef struct {
    Layer layer;
    int64_t source_norm, mlp_norm, key_norm, activation, gated; /* key_norm: channels normalised together, or 0 */
    double source_eps, mlp_eps, key_eps, write_mix;
    const real *out, *up, *down, *key_value, *up_bias, *down_bias, *x, *kept, *cos, *sin;
    int64_t cos_position, cos_batch, cos_head, sin_position, sin_batch, sin_head; /* strides */
    real *maximum, *denominator, *numerator, *z, *heads, *keys, *values, *lse;
    real *key_columns, *value_rows; /* keys and values once more, in panels */
} Forward;

typedef struct {
    Layer layer;
    int64_t parts, key_norm;
    const real *key_value, *down, *up, *out, *keys, *heads, *lse, *key_columns, *value_columns, *key_rows;
    int64_t first; /* position that the coefficients begin with */
    const real *mlp_scale, *mlp_unit, *slope, *source_scale, *source_unit, *straight, *key_unit, *turned, *kept;
    real *g, *dz, *dk, *dv, *dq;
    real *d_logits, *q_rows, *g_rows, *sums; /* scratch */
} Backward;

static inline int64_t panels(int64_t width) { return (width + COLUMNS - 1) / COLUMNS; }
static inline int64_t padded(int64_t width) { return panels(width) * COLUMNS; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- exponentials: libm in float64; in float32 polynomials fitted here, to 2 units in the last place ---- */

#ifdef FLOAT64
static inline real exp_of(real x) { return exp(x); }
static inline real erf_of(real x) { return erf(x); }
#else
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

/* x + x p(x^2) near 0, else 1 - e^-p(|x|), with p fitted to - log erfc. */
static inline float erf_of(float x) {
    float a = fabsf(x), t = x * x, near = -0x1.453bf4p-11f, far = -0x1.a3397ap-13f;
    near = near * t + 0x1.49ca54p-8f;
    near = near * t - 0x1.b6f39cp-6f;
    near = near * t + 0x1.ce212p-4f;
    near = near * t - 0x1.81270cp-2f;
    near = near * t + 0x1.06eba6p-3f;
    near = near * x + x;
    float b = a > 4.0f ? 4.0f : a;
    far = far * b + 0x1.93f6c2p-9f;
    far = far * b - 0x1.6eb0e8p-6f;
    far = far * b + 0x1.ab024ap-4f;
    far = far * b + 0x1.460d5ap-1f;
    far = far * b + 0x1.20bd5cp+0f;
    far = far * b + 0x1.2e6cecp-13f;
    far = copysignf(1.0f - exp_of(-far), x);
    return a < 0.875f ? near : far;
}
#endif

/* ---- sums and products ---- */

static real sum(const real *a, int64_t n) {
    lanes sums = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sums += *(const lanes *)(a + i);
    real total = 0;
    for (; i < n; i++) total += a[i];
    for (int64_t l = 0; l < LANES; l++) total += sums[l];
    return total;
}

static real dot(const real *a, const real *b, int64_t n) {
    lanes sums = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sums += *(const lanes *)(a + i) * *(const lanes *)(b + i);
    real total = 0;
    for (; i < n; i++) total += a[i] * b[i];
    for (int64_t l = 0; l < LANES; l++) total += sums[l];
    return total;
}

typedef struct { const real *at; int64_t row, step; } Left;              /* (r, i) lies at `r row + i step` */
typedef struct { const real *at; int64_t stride, count, columns; } Right; /* panels, `stride` apart */

static inline __attribute__((always_inline)) void panel_product(real *y, int64_t ldy, const real *x, int64_t row,
                                                                int64_t step, const real *panel, int64_t depth,
                                                                const int rows, const int vectors) {
    lanes sums[SUMS] = {{0}};
    for (int64_t i = 0; i < depth; i++, x += step, panel += vectors * LANES)
#pragma GCC unroll 16
        for (int s = 0; s < rows * vectors; s++)
            sums[s] += x[s / vectors * row] * ((const lanes *)panel)[s % vectors];
#pragma GCC unroll 16
    for (int s = 0; s < rows * vectors; s++) ((lanes *)(y + s / vectors * ldy))[s % vectors] = sums[s];
}

/* As many rows at once as there are sums for, at most 8, and what is left over by halves. */
static inline __attribute__((always_inline)) void panel_rows(real *y, int64_t ldy, Left x, int64_t rows,
                                                             const real *panel, int64_t depth, const int vectors) {
    const int most = SUMS / vectors < 8 ? SUMS / vectors : 8;
    for (; rows >= most; rows -= most) {
        panel_product(y, ldy, x.at, x.row, x.step, panel, depth, most, vectors);
        y += most * ldy, x.at += most * x.row;
    }
#pragma GCC unroll 4
    for (int some = most / 2; some; some /= 2)
        if (rows & some) {
            panel_product(y, ldy, x.at, x.row, x.step, panel, depth, some, vectors);
            y += some * ldy, x.at += some * x.row;
        }
}

/* y (rows, columns of all panels) = x (rows, depth) times a packed matrix. */
static void product(real *y, int64_t ldy, Left x, int64_t rows, Right w, int64_t depth) {
    for (int64_t p = 0; p < w.count; p++)
        if (w.columns == COLUMNS)
            panel_rows(y + p * COLUMNS, ldy, x, rows, w.at + p * w.stride, depth, 128 / BYTES);
        else
            panel_rows(y + p * COLUMNS / 2, ldy, x, rows, w.at + p * w.stride, depth, 64 / BYTES);
}

static void whole_product(real *y, int64_t ldy, const real *x, int64_t ldx, int64_t rows, const real *matrix,
                          int64_t depth, int64_t width) {
    product(y, ldy, (Left){x, ldx, 1}, rows, (Right){matrix, depth * COLUMNS, panels(width), COLUMNS}, depth);
}

/* Heads lie in narrow panels where these leave fewer columns empty: native.py does the same. */
static inline int64_t head_columns(int64_t dim) {
    return (dim + COLUMNS / 2 - 1) / (COLUMNS / 2) % 2 ? COLUMNS / 2 : COLUMNS;
}

/* `matrix` (count, depth, head_dim) in panels of head_columns, from row `first` of number `which` on. */
static inline Right heads_of(const real *matrix, int64_t which, int64_t depth, int64_t dim, int64_t first) {
    int64_t columns = head_columns(dim), count = (dim + columns - 1) / columns;
    return (Right){matrix + (which * count * depth + first) * columns, depth * columns, count, columns};
}

static void normalise(real *y, const real *x, int64_t n, int64_t kind, double eps) {
    if (kind == NO_NORM) {
        memcpy(y, x, n * sizeof(real));
        return;
    }
    real mean = kind == LAYER_NORM ? sum(x, n) / (real)n : 0;
    for (int64_t i = 0; i < n; i++) y[i] = x[i] - mean;
    real r = 1 / (real)sqrt(dot(y, y, n) / (real)n + (real)eps);
    for (int64_t i = 0; i < n; i++) y[i] *= r;
}

/* Not static for the sake of tests. */
void activate(real *h, int64_t n, int64_t kind) {
    switch (kind) {
    case RELU:
        for (int64_t i = 0; i < n; i++) h[i] = h[i] < 0 ? 0 : h[i];
        break;
    case SILU:
        for (int64_t i = 0; i < n; i++) h[i] = h[i] / (1 + exp_of(-h[i]));
        break;
    case GELU:
        for (int64_t i = 0; i < n; i++) h[i] = (real)0.5 * h[i] * (1 + erf_of(h[i] * (real)0.70710678118654752440));
        break;
    case GELU_TANH: /* (1 + tanh y) / 2 = 1 / (1 + e^-2y), y = sqrt(2 / pi) (h + 0.044715 h^3) */
        for (int64_t i = 0; i < n; i++) {
            real y = (real)-1.59576912160573071176 * (h[i] + (real)0.044715 * h[i] * h[i] * h[i]);
            h[i] = h[i] / (1 + exp_of(y));
        }
    }
}

/* Put vector j of `which` (head_dim) where a row times panels of columns is its product with every vector. */
static void put_column(real *to, const real *vector, int64_t which, int64_t j, int64_t n, int64_t dim) {
    to += which * padded(n) * dim + j / COLUMNS * dim * COLUMNS + j % COLUMNS;
    for (int64_t d = 0; d < dim; d++) to[d * COLUMNS] = vector[d];
}

/* Put it where weights times panels of rows are a sum of vectors. */
static void put_row(real *to, const real *vector, int64_t which, int64_t j, int64_t n, int64_t dim) {
    Right rows = heads_of(to, which, n, dim, j);
    for (int64_t p = 0; p < rows.count; p++) {
        real *row = to + (rows.at - to) + p * rows.stride;
        int64_t columns = least(rows.columns, dim - p * rows.columns);
        for (int64_t d = 0; d < columns; d++) row[d] = vector[p * rows.columns + d];
    }
}

/* ---- pairs of queries and keys ---- */

/* Rows r0 .. r0 + rows - 1 of one key head's queries and keys lo .. hi - 1, in columns that begin with key c0. */
typedef struct { int64_t pair, r0, rows, c0, lo, hi; } Piece;

/* Go to the next piece of queries q0 .. q1 - 1 and keys k0 .. k1 - 1; a piece of zeros begins. */
static int next_piece(const Layer *l, Piece *p, int64_t q0, int64_t q1, int64_t k0, int64_t k1) {
    if (p->rows && (p->r0 += p->rows) == q1 * l->group) {
        p->r0 = q0 * l->group;
        if ((p->c0 += CHUNK) >= k1) p->pair++, p->c0 = k0 / COLUMNS * COLUMNS;
    } else if (!p->rows) {
        p->r0 = q0 * l->group, p->c0 = k0 / COLUMNS * COLUMNS;
    }
    p->rows = least(BATCH, q1 * l->group - p->r0);
    p->lo = p->c0 > k0 ? p->c0 : k0, p->hi = least(p->c0 + CHUNK, k1);
    return p->pair < l->batch * l->kv_heads;
}

/* Biased logits of row r of a piece, minus infinity at hidden keys and up to a whole number of panels. */
static void mask(const Layer *l, const Piece *p, int64_t r, real *s) {
    int64_t b = p->pair / l->kv_heads, query = l->slot + (p->r0 + r) / l->group, key = l->slot + p->c0;
    int64_t head = p->pair % l->kv_heads * l->group + (p->r0 + r) % l->group;
    int64_t from = p->lo - p->c0, to = p->hi - p->c0, slots = l->slot + l->seq;
    if (l->slopes)
        for (int64_t j = from; j < to; j++) s[j] += l->slopes[head] * (real)(int32_t)(query - key - j);
    if (l->window)
        for (int64_t j = from; j < least(to, query - l->window + 1 - key); j++) s[j] = -INFINITY;
    if (l->valid)
        for (int64_t j = from; j < to; j++)
            if (!l->valid[b * slots + key + j]) s[j] = -INFINITY;
    if (l->documents)
        for (int64_t j = from; j < to; j++)
            if (l->documents[b * slots + key + j] != l->documents[b * slots + query]) s[j] = -INFINITY;
    for (int64_t j = 0; j < from; j++) s[j] = -INFINITY;
    for (int64_t j = to; j < padded(to); j++) s[j] = -INFINITY;
}

static real largest_of(const real *s, int64_t n, real start) {
    real best[16];
    for (int l = 0; l < 16; l++) best[l] = start;
    for (int64_t j = 0; j < n; j += 16)
        for (int l = 0; l < 16; l++) best[l] = s[j + l] > best[l] ? s[j + l] : best[l];
    for (int l = 0; l < 16; l++) start = best[l] > start ? best[l] : start;
    return start;
}

/* Logits of a piece: rows (head_dim, and `extra` numbers after each) times the columns of its keys. */
static void multiply(const Layer *l, const Piece *p, real *s, const real *rows, int64_t extra, const real *columns) {
    int64_t dim = l->head_dim, ld = dim + extra;
    Left left = {rows + (p->pair * l->seq * l->group + p->r0) * ld, ld, 1};
    const real *at = columns + p->pair * padded(l->seq) * dim + p->c0 * dim;
    product(s, CHUNK, left, p->rows, (Right){at, dim * COLUMNS, panels(p->hi - p->c0), COLUMNS}, dim);
}

/* Merge persistent keys k0 .. k1 - 1 into the state of queries q0 .. q1 - 1. */
void merge(const Forward *f, int64_t q0, int64_t q1, int64_t k0, int64_t k1) {
    const Layer *l = &f->layer;
    int64_t dim = l->head_dim;
    for (Piece p = {0}; next_piece(l, &p, q0, q1, k0, k1);) {
        Right values = heads_of(f->value_rows, p.pair, l->seq, dim, p.lo);
        int64_t width = values.count * values.columns, many = padded(p.hi - p.c0);
        int64_t row = p.pair * l->seq * l->group + p.r0;
        real decay[BATCH];
        multiply(l, &p, l->logits, l->q, 0, f->key_columns);
        for (int64_t r = 0; r < p.rows; r++) {
            real *s = l->logits + r * CHUNK, old = f->maximum[row + r];
            mask(l, &p, r, s);
            real new = largest_of(s, many, old);
            for (int64_t j = 0; j < many; j++) s[j] = exp_of(s[j] - new);
            decay[r] = exp_of(old - new);
            f->maximum[row + r] = new;
            f->denominator[row + r] = f->denominator[row + r] * decay[r] + sum(s, many);
        }
        product(l->mixed, width, (Left){l->logits + p.lo - p.c0, CHUNK, 1}, p.rows, values, p.hi - p.lo);
        for (int64_t r = 0; r < p.rows; r++) {
            real *to = f->numerator + (row + r) * dim;
            const real *from = l->mixed + r * width;
            for (int64_t d = 0; d < dim; d++) to[d] = to[d] * decay[r] + from[d];
        }
    }
}

/* Add rows of `width` numbers, of which `dim` count, to rows of `dim`. */
static void add_rows(real *restrict to, const real *restrict from, int64_t rows, int64_t dim, int64_t width) {
    if (dim == width) dim *= rows, width = dim, rows = 1;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < dim; d++) to[r * dim + d] += from[r * width + d];
}

/* Go back through attention of queries q0 .. q1 - 1 to persistent pairs k0 .. k1 - 1, and to the queries. */
void spread(const Backward *k, int64_t q0, int64_t q1, int64_t k0, int64_t k1) {
    const Layer *l = &k->layer;
    int64_t dim = l->head_dim;
    for (Piece p = {0}; next_piece(l, &p, q0, q1, k0, k1);) {
        Right keys = heads_of(k->key_rows, p.pair, l->seq, dim, p.lo);
        int64_t width = keys.count * keys.columns, many = padded(p.hi - p.c0), size = p.hi - p.lo;
        int64_t row = p.pair * l->seq * l->group + p.r0, shift = p.lo - p.c0;
        multiply(l, &p, l->logits, l->q, 0, k->key_columns);
        multiply(l, &p, k->d_logits, k->g, 1, k->value_columns);
        for (int64_t r = 0; r < p.rows; r++) {
            real *weight = l->logits + r * CHUNK, *slope = k->d_logits + r * CHUNK, lse = k->lse[row + r];
            const real *g = k->g + (row + r) * (dim + 1);
            mask(l, &p, r, weight);
            for (int64_t j = 0; j < many; j++) weight[j] = exp_of(weight[j] - lse);
            const real minus = g[dim];
            for (int64_t j = 0; j < many; j++) {
                real value = weight[j] * (slope[j] + minus);
                slope[j] = weight[j] == 0 ? 0 : value; /* columns that are not filled yet may hold anything */
            }
            put_row(k->q_rows, l->q + (row + r) * dim, 0, r, BATCH, dim);
            put_row(k->g_rows, g, 0, r, BATCH, dim);
        }
        product(l->mixed, width, (Left){k->d_logits + shift, CHUNK, 1}, p.rows, keys, size);
        add_rows(k->dq + row * dim, l->mixed, p.rows, dim, width);
        for (int value = 0; value < 2; value++) {
            const real *weights = (value ? l->logits : k->d_logits) + shift;
            Right rows = heads_of(value ? k->g_rows : k->q_rows, 0, BATCH, dim, 0);
            real *to = (value ? k->dv : k->dk) + (p.pair * l->seq + p.lo) * dim;
            product(k->sums, width, (Left){weights, 1, CHUNK}, size, rows, p.rows);
            add_rows(to, k->sums, size, dim, width);
        }
    }
}

/* ---- forward ---- */

/* Attention of position t, whose state is complete. */
static void settle(const Forward *f, int64_t t) {
    const Layer *l = &f->layer;
    int64_t dim = l->head_dim;
    for (int64_t pair = 0; pair < l->batch * l->kv_heads; pair++)
        for (int64_t r = 0; r < l->group; r++) {
            int64_t row = (pair * l->seq + t) * l->group + r;
            int64_t b = pair / l->kv_heads, head = pair % l->kv_heads * l->group + r;
            real *to = f->heads + (t * l->batch + b) * l->d_model + head * dim, total = f->denominator[row];
            for (int64_t d = 0; d < dim; d++) to[d] = f->numerator[row * dim + d] / total;
            if (f->lse) f->lse[row] = f->maximum[row] + (real)log(total);
        }
}

/* The layer's output at position t from its input and its heads. */
static void finish(const Forward *f, int64_t t) {
    const Layer *l = &f->layer;
    int64_t n = l->d_model, hidden = l->d_ff * (1 + f->gated), ldn = padded(n), ldw = padded(hidden);
    const real *x = f->x + t * l->batch * n, *kept = f->kept ? f->kept + 2 * t * l->batch * n : 0;
    real *z = f->z + t * l->batch * n;
    whole_product(l->narrow, ldn, f->heads + t * l->batch * n, n, l->batch, f->out, n, n);
    for (int64_t b = 0; b < l->batch; b++) {
        real *u = l->narrow + b * ldn;
        for (int64_t d = 0; kept && d < n; d++) u[d] *= kept[b * n + d];
        for (int64_t d = 0; d < n; d++) u[d] += x[b * n + d];
        normalise(l->normed + b * ldn, u, n, f->mlp_norm, f->mlp_eps);
    }
    whole_product(l->wide, ldw, l->normed, ldn, l->batch, f->up, n, hidden);
    for (int64_t b = 0; b < l->batch; b++) {
        real *gate = l->wide + b * ldw, *up = gate + l->d_ff;
        if (f->up_bias)
            for (int64_t j = 0; j < hidden; j++) gate[j] += f->up_bias[j];
        activate(gate, l->d_ff, f->activation);
        if (f->gated)
            for (int64_t j = 0; j < l->d_ff; j++) gate[j] *= up[j];
    }
    whole_product(l->normed, ldn, l->wide, ldw, l->batch, f->down, l->d_ff, n);
    for (int64_t b = 0; b < l->batch; b++) {
        const real *u = l->narrow + b * ldn, *keep = kept ? kept + (l->batch + b) * n : 0;
        real *branch = l->normed + b * ldn;
        for (int64_t d = 0; f->down_bias && d < n; d++) branch[d] += f->down_bias[d];
        for (int64_t d = 0; keep && d < n; d++) branch[d] *= keep[d];
        for (int64_t d = 0; d < n; d++) z[b * n + d] = u[d] + branch[d];
    }
}

/* The persistent pair of position t. */
static void persist(const Forward *f, int64_t t) {
    const Layer *l = &f->layer;
    int64_t n = l->d_model, dim = l->head_dim, half = dim / 2, kv_dim = l->kv_heads * dim;
    int64_t ldn = padded(n), ldp = padded(2 * kv_dim), together = f->key_norm;
    for (int64_t b = 0; b < l->batch; b++) {
        const real *x = f->x + (t * l->batch + b) * n, *z = f->z + (t * l->batch + b) * n;
        real *source = l->narrow + b * ldn, mix = (real)f->write_mix;
        for (int64_t d = 0; d < n; d++) source[d] = mix == 1 ? z[d] : x[d] + mix * (z[d] - x[d]);
        normalise(l->normed + b * ldn, source, n, f->source_norm, f->source_eps);
    }
    whole_product(l->wide, ldp, l->normed, ldn, l->batch, f->key_value, n, 2 * kv_dim);
    for (int64_t b = 0; b < l->batch; b++) {
        real *all = l->wide + b * ldp;
        for (int64_t c = 0; together && c < kv_dim; c += together)
            normalise(all + c, all + c, together, RMS_NORM, f->key_eps); /* its matrix has the centring, if any */
        for (int64_t h = 0; h < l->kv_heads; h++) {
            int64_t pair = b * l->kv_heads + h;
            const real *from = all + h * dim, *value = from + kv_dim;
            real *key = f->keys + (pair * l->seq + t) * dim;
            memcpy(key, from, dim * sizeof(real));
            if (f->cos) {
                const real *cos = f->cos + t * f->cos_position + b * f->cos_batch + h * f->cos_head;
                for (int64_t d = 0; d < dim; d++) key[d] *= cos[d];
            }
            if (f->sin) {
                const real *sin = f->sin + t * f->sin_position + b * f->sin_batch + h * f->sin_head;
                for (int64_t d = 0; d < half; d++) key[d] += from[d + half] * sin[d];
                for (int64_t d = 0; d < half; d++) key[d + half] += from[d] * sin[d + half];
            }
            memcpy(f->values + (pair * l->seq + t) * dim, value, dim * sizeof(real));
            put_column(f->key_columns, key, pair, t, l->seq, dim);
            put_row(f->value_rows, value, pair, t, l->seq, dim);
        }
    }
}

/* Positions start .. stop - 1, earlier keys being merged. */
void forward(const Forward *f, int64_t start, int64_t stop) {
    for (int64_t t = start; t < stop; t++) {
        if (t > start) merge(f, t, t + 1, start, t);
        settle(f, t);
        finish(f, t);
        persist(f, t);
    }
}

/* ---- backward ---- */

/* y <- y - unit <unit, y>. */
static void project(real *y, const real *unit, int64_t n) {
    real along = dot(y, unit, n);
    for (int64_t i = 0; i < n; i++) y[i] -= along * unit[i];
}

/* Add to dz at position t what the complete cotangents of its persistent pair amount to. */
static void to_source(const Backward *k, int64_t t) {
    const Layer *l = &k->layer;
    int64_t n = l->d_model, dim = l->head_dim, half = dim / 2, kv_dim = l->kv_heads * dim;
    int64_t ldn = padded(n), together = k->key_norm;
    for (int64_t b = 0; b < l->batch; b++) {
        int64_t at = ((t - k->first) * l->batch + b) * kv_dim;
        real *raw = l->wide + b * 2 * kv_dim, along = 0;
        const real *unit = k->key_unit + at;
        for (int64_t h = 0; h < l->kv_heads; h++) {
            int64_t row = (((b * l->kv_heads + h) * l->seq) + t) * dim;
            const real *dk = k->dk + row, *straight = k->straight + at + h * dim;
            real *to = raw + h * dim;
            for (int64_t d = 0; d < dim; d++) to[d] = dk[d] * straight[d];
            if (k->turned) {
                const real *turned = k->turned + at + h * dim;
                for (int64_t d = 0; d < half; d++) to[d] += dk[d + half] * turned[d];
                for (int64_t d = 0; d < half; d++) to[d + half] += dk[d] * turned[d + half];
            }
            memcpy(raw + kv_dim + h * dim, k->dv + row, dim * sizeof(real));
            if (!together) continue;
            along += dot(dk, k->keys + row, dim);
            int64_t stop = (h + 1) * dim;
            if (stop % together) continue;
            for (int64_t c = stop - together; c < stop; c++) raw[c] -= along * unit[c];
            along = 0;
        }
    }
    whole_product(l->narrow, ldn, l->wide, 2 * kv_dim, l->batch, k->key_value, 2 * kv_dim, n);
    for (int64_t b = 0; b < l->batch; b++) {
        int64_t at = (t - k->first) * l->batch + b;
        real *d = l->narrow + b * ldn, *dz = k->dz + (t * l->batch + b) * n, scale = k->source_scale[at];
        project(d, k->source_unit + at * n, n);
        for (int64_t c = 0; c < n; c++) dz[c] += scale * d[c];
    }
}

/* Rows (g, -<g, a>) at position t, where g is the cotangent of its heads a, from the complete dz. */
static void to_heads(const Backward *k, int64_t t) {
    const Layer *l = &k->layer;
    int64_t n = l->d_model, dim = l->head_dim, hidden = k->parts * l->d_ff;
    int64_t ldn = padded(n), ldw = padded(hidden);
    const real *dz = k->dz + t * l->batch * n, *kept = k->kept ? k->kept + 2 * (t - k->first) * l->batch * n : 0;
    for (int64_t b = 0; b < l->batch; b++)
        for (int64_t c = 0; c < n; c++)
            l->normed[b * ldn + c] = dz[b * n + c] * (kept ? kept[(l->batch + b) * n + c] : 1);
    whole_product(l->wide, ldw, l->normed, ldn, l->batch, k->down, n, l->d_ff);
    for (int64_t b = 0; b < l->batch; b++) {
        const real *slope = k->slope + ((t - k->first) * l->batch + b) * hidden;
        real *d = l->wide + b * ldw;
        for (int64_t j = l->d_ff; j < hidden; j++) d[j] = d[j - l->d_ff] * slope[j];
        for (int64_t j = 0; j < l->d_ff; j++) d[j] *= slope[j];
    }
    whole_product(l->narrow, ldn, l->wide, ldw, l->batch, k->up, hidden, n);
    for (int64_t b = 0; b < l->batch; b++) {
        int64_t at = (t - k->first) * l->batch + b;
        real *d = l->narrow + b * ldn, scale = k->mlp_scale[at];
        project(d, k->mlp_unit + at * n, n);
        for (int64_t c = 0; c < n; c++) d[c] = dz[b * n + c] + scale * d[c];
        for (int64_t c = 0; kept && c < n; c++) d[c] *= kept[b * n + c];
    }
    whole_product(l->normed, ldn, l->narrow, ldn, l->batch, k->out, n, n);
    for (int64_t pair = 0; pair < l->batch * l->kv_heads; pair++) {
        int64_t b = pair / l->kv_heads, head = pair % l->kv_heads * l->group;
        for (int64_t r = 0; r < l->group; r++) {
            const real *from = l->normed + b * ldn + (head + r) * dim;
            real *g = k->g + ((pair * l->seq + t) * l->group + r) * (dim + 1);
            memcpy(g, from, dim * sizeof(real));
            g[dim] = -dot(from, k->heads + (t * l->batch + b) * n + (head + r) * dim, dim);
        }
    }
}

/* Positions stop - 1 .. start, later queries having been spread. */
void backward(const Backward *k, int64_t start, int64_t stop) {
    for (int64_t t = stop - 1; t >= start; t--) {
        to_source(k, t);
        to_heads(k, t);
        if (t > start) spread(k, t, t + 1, start, t);
    }
}

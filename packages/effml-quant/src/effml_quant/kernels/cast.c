/* Casts of contiguous tensors in one pass over memory, built at first use by native.py.

   The arithmetic is that of rounding.py and scales.py, operation by operation, so results are equal bit by bit; it
   needs IEEE float32 without contraction into fused multiply-adds. A tensor is (outer, length, inner), blocks run along
   `length`, the last one of each line may be short. A kernel works on the items begin .. end - 1, so that threads share
   a tensor. An item is one block if `inner` is 1, else up to LANES blocks side by side.

   native.py defines the kernel's name, ROUNDING, DIVIDE, INPUT, OUTPUT and BLOCK (elements, if known): one library for each
   combination in use, with loops that compilers turn into vectors in a fraction of a second. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 64

enum { NEAREST_EVEN, NEAREST_AWAY, TOWARD_ZERO, STOCHASTIC };
enum { POWER_OF_TWO, FROM_LARGEST, GIVEN, NVFP4, NVFP4_TORCHAO }; /* how a block gets its scale */
enum { FLOAT32, BFLOAT16, CODE, NIBBLE, SIXBIT };

INLINE uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
INLINE float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE void store(void *out, int64_t i, float value) {
    uint32_t u = bits_of(value);
    if (OUTPUT == FLOAT32) {
        ((uint32_t *)out)[i] = u;
    } else {
        uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
        ((uint16_t *)out)[i] = (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
    }
}

#ifndef DECODE
typedef struct {
    int64_t outer, length, inner, block;
    int32_t man_bits;       /* of the grid that is rounded to */
    int32_t floor_bits;     /* float32 bits of 2^emin */
    int32_t emax;
    int32_t step;           /* what a scale rule adds below the exponent */
    int32_t scale;          /* POWER_OF_TWO .. NVFP4_TORCHAO */
    int32_t given_stride;   /* 0: one scale for all blocks */
    int32_t code_shift;     /* (127 - bias) << code_man_bits; 0: integers */
    int32_t code_man_bits, code_bits;
    float largest, bound;   /* of the format, of the output's dtype */
    float min_normal, per_spacing;
    float total, total_sixth, per_total; /* NVFP4's scale of the tensor, over 6, and its inverse */
    uint32_t seed_low, seed_high;
    const float *encode, *decode; /* GIVEN: x * encode, or x / decode if DIVIDE; back by decode */
    float *real_scales;           /* written if FROM_LARGEST; may be null */
    uint8_t *scale_codes;         /* written if POWER_OF_TWO or NVFP4; may be null */
} Cast;

INLINE uint32_t load(const void *x, int64_t i) {
    return INPUT == FLOAT32 ? ((const uint32_t *)x)[i] : (uint32_t)((const uint16_t *)x)[i] << 16;
}

INLINE uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

/* From the bits of x to its magnitude on the grid, in units of the scale. */
INLINE float on_grid(uint32_t u, float encode, float decode, const Cast *c, int64_t index) {
    float x = float_of(u & 0x7fffffffu), z = DIVIDE ? x / decode : x * encode, p;
    int32_t field = (int32_t)(bits_of(z) & 0x7f800000u), power = field > c->floor_bits ? field : c->floor_bits;
    if (ROUNDING == NEAREST_EVEN) {
        float magic = float_of((uint32_t)power + ((uint32_t)(23 - c->man_bits) << 23));
        p = (z + magic) - magic;
    } else {
        float inverse = float_of(((uint32_t)(254 + c->man_bits) << 23) - (uint32_t)power);
        float spacing = float_of((uint32_t)power - ((uint32_t)c->man_bits << 23));
        float t = z * inverse, low = floorf(t);
        if (ROUNDING == NEAREST_AWAY) low += t - low >= 0.5f ? 1.0f : 0.0f;
        if (ROUNDING == STOCHASTIC) {
            uint32_t h = mix((uint32_t)index ^ c->seed_low);
            h = mix(h ^ c->seed_high ^ (uint32_t)((uint64_t)index >> 32));
            low += (float)(int32_t)(h >> 8) * 0x1p-24f < t - low ? 1.0f : 0.0f;
        }
        p = low * spacing;
    }
    return p < c->largest ? p : c->largest;
}

INLINE float back(float p, float decode, uint32_t u, float bound) {
    float value = p * decode;
    value = value > bound ? bound : value;
    return float_of(bits_of(value) | (u & 0x80000000u));
}

INLINE uint8_t code_of(float p, float decode, uint32_t u, const Cast *c) {
    int32_t small = (int32_t)(p * c->per_spacing), normal, code;
    if (c->code_shift == 0) {
        code = u >> 31 ? -small : small;
    } else {
        normal = (int32_t)(bits_of(p) >> (23 - c->code_man_bits)) - c->code_shift;
        code = (p >= c->min_normal ? normal : small) | (int32_t)((u >> 31) << (c->code_bits - 1));
    }
    return (uint8_t)(decode == decode ? code : 0);
}

/* The scale of a block from the bits of its largest magnitude. */
INLINE void scale_of(uint32_t largest, const Cast *c, int64_t block, float *encode, float *decode) {
    if (c->scale == GIVEN) {
        int64_t at = block * c->given_stride;
        *decode = c->decode[at];
        *encode = DIVIDE ? 0.0f : c->encode[at];
    } else if (c->scale == FROM_LARGEST) {
        float scale = float_of(largest) / c->largest;
        scale = scale == 0.0f ? 1.0f : scale;
        *decode = largest >= 0x7f800000u ? NAN : scale;
        *encode = 0.0f;
        if (c->real_scales) c->real_scales[block] = *decode;
    } else if (c->scale >= NVFP4) {
        float v = float_of(largest) / 6.0f / c->total;
        if (c->scale == NVFP4) v = float_of(largest) * c->total_sixth;
        else v = v < 0x1p-6f ? 0x1p-6f : v;
        v = v < 448.0f ? v : 448.0f;
        int32_t field = (int32_t)(bits_of(v) & 0x7f800000u), power = field > 121 << 23 ? field : 121 << 23;
        float magic = float_of((uint32_t)power + (20u << 23)), s = (v + magic) - magic; /* to E4M3 */
        *decode = c->scale == NVFP4 ? s / c->total : s * c->total;
        *encode = c->scale == NVFP4 ? 1.0f / (s * c->per_total) : c->per_total / s;
        if (c->scale == NVFP4) *encode = *encode < FLT_MAX ? *encode : FLT_MAX;
        int32_t code = s >= 0x1p-6f ? (int32_t)(bits_of(s) >> 20) - (120 << 3) : (int32_t)(s * 512.0f);
        if (largest >= 0x7f800000u) *decode = NAN;
        if (c->scale_codes) c->scale_codes[block] = largest >= 0x7f800000u ? 127 : (uint8_t)code;
    } else {
        int subnormal = largest < 0x00800000u;
        uint32_t a = subnormal ? bits_of(float_of(largest) * 0x1p24f) : largest;
        int32_t e = (int32_t)((a + (uint32_t)c->step) >> 23) - (subnormal ? 24 : 0) - 127 - c->emax;
        e = largest == 0 || e < -127 ? -127 : e > 127 ? 127 : e;
        *decode = e > -127 ? float_of((uint32_t)(e + 127) << 23) : float_of(1u << 22);
        *encode = e < 127 ? float_of((uint32_t)(127 - e) << 23) : float_of(1u << 22);
        if (largest >= 0x7f800000u) *decode = NAN;
        if (c->scale_codes) c->scale_codes[block] = largest >= 0x7f800000u ? 255 : (uint8_t)(e + 127);
    }
}

INLINE void pack(const uint8_t *codes, uint8_t *out, int64_t n) {
    if (OUTPUT == NIBBLE)
        for (int64_t i = 0; i < n / 2; i++) out[i] = (uint8_t)((codes[2 * i] & 15) | (codes[2 * i + 1] << 4));
    else
        for (int64_t i = 0; i < n / 4; i++) {
            const uint8_t *c = codes + 4 * i;
            out[3 * i] = (uint8_t)(c[0] | c[1] << 6);
            out[3 * i + 1] = (uint8_t)(c[1] >> 2 | c[2] << 4);
            out[3 * i + 2] = (uint8_t)(c[2] >> 4 | c[3] << 2);
        }
}

/* A block that lies together: n elements from position `at`. */
INLINE void cast_run(const void *x, void *out, int64_t at, int64_t n, const Cast *c, int64_t block) {
    uint32_t largest = 0;
    if (c->scale != GIVEN)
        for (int64_t i = 0; i < n; i++) {
            uint32_t a = load(x, at + i) & 0x7fffffffu;
            largest = a > largest ? a : largest;
        }
    float encode, decode;
    scale_of(largest, c, block, &encode, &decode);
    if (OUTPUT <= BFLOAT16) {
        for (int64_t i = 0; i < n; i++) {
            uint32_t u = load(x, at + i);
            store(out, at + i, back(on_grid(u, encode, decode, c, at + i), decode, u, c->bound));
        }
        return;
    }
    for (int64_t first = at; first < at + n; first += 256) {
        int64_t m = least(at + n - first, 256);
        uint8_t codes[256]; /* of this function's own: bytes elsewhere might be the input's, for all compilers know */
        for (int64_t i = 0; i < m; i++) {
            uint32_t u = load(x, first + i);
            codes[i] = code_of(on_grid(u, encode, decode, c, first + i), decode, u, c);
        }
        if (OUTPUT == CODE) memcpy((uint8_t *)out + first, codes, (size_t)m);
        else pack(codes, (uint8_t *)out + (OUTPUT == NIBBLE ? first / 2 : first / 4 * 3), m);
    }
}

/* Up to LANES blocks side by side: `rows` rows of `lanes` elements, `stride` apart. */
INLINE void cast_lanes(const void *x, void *out, int64_t at, int64_t rows, int64_t lanes, int64_t stride, const Cast *c,
                       int64_t block) {
    uint32_t largest[LANES] = {0};
    float encode[LANES], decode[LANES];
    if (c->scale != GIVEN)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < lanes; i++) {
                uint32_t a = load(x, at + r * stride + i) & 0x7fffffffu;
                largest[i] = a > largest[i] ? a : largest[i];
            }
    for (int64_t i = 0; i < lanes; i++) scale_of(largest[i], c, block + i, &encode[i], &decode[i]);
    for (int64_t line = at; line < at + rows * stride; line += stride) {
        uint8_t codes[LANES];
        for (int64_t i = 0; i < lanes; i++) {
            uint32_t u = load(x, line + i);
            float p = on_grid(u, encode[i], decode[i], c, line + i);
            if (OUTPUT <= BFLOAT16) store(out, line + i, back(p, decode[i], u, c->bound));
            else codes[i] = code_of(p, decode[i], u, c);
        }
        if (OUTPUT == CODE) memcpy((uint8_t *)out + line, codes, (size_t)lanes);
    }
}

INLINE int64_t blocks_in_line(const Cast *c) { return (c->length + c->block - 1) / c->block; }

typedef struct {
    int64_t at, rows, lanes, block;
} Item; /* where it is, its size, and its first block */

INLINE Item item_of(const Cast *c, int64_t index) {
    int64_t count = blocks_in_line(c), chunks = (c->inner + LANES - 1) / LANES;
    int64_t line = index / chunks, lane = index % chunks * LANES, first = line % count * c->block;
    Item item = {(line / count * c->length + first) * c->inner + lane, least(c->length - first, c->block),
                 least(c->inner - lane, LANES), line * c->inner + lane};
    return item;
}
#endif

#ifdef CAST
void kernel(const Cast *c, const void *x, void *out, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
        Item item = item_of(c, i);
        if (c->inner == 1 && item.rows == BLOCK) cast_run(x, out, item.at, BLOCK, c, item.block);
        else if (c->inner == 1) cast_run(x, out, item.at, item.rows, c, item.block);
        else if (item.lanes == LANES) cast_lanes(x, out, item.at, item.rows, LANES, c->inner, c, item.block);
        else cast_lanes(x, out, item.at, item.rows, item.lanes, c->inner, c, item.block);
    }
}

#elif defined CAST_BOTH
/* An (m, n) matrix along its rows and along its columns, while a tile of it is in cache. An item is a tile of
   columns->block rows. */
void kernel(const Cast *rows, const Cast *columns, const void *x, void *row_out, void *column_out, int64_t begin,
            int64_t end) {
    int64_t m = columns->length, n = rows->length, k = rows->block, per_line = blocks_in_line(rows);
    int64_t width = k >= 128 ? k : 128 / k * k;
    for (int64_t tile = begin; tile < end; tile++) {
        int64_t top = tile * columns->block, bottom = least(m, top + columns->block);
        for (int64_t left = 0; left < n; left += width) {
            int64_t right = least(n, left + width);
            for (int64_t r = top; r < bottom; r++)
                for (int64_t i = left; i < right; i += k) {
                    int64_t size = least(right - i, k), block = r * per_line + i / k;
                    if (size == BLOCK) cast_run(x, row_out, r * n + i, BLOCK, rows, block);
                    else cast_run(x, row_out, r * n + i, size, rows, block);
                }
            for (int64_t i = left; i < right; i += LANES) {
                int64_t lanes = least(right - i, LANES), at = top * n + i, block = tile * n + i;
                if (lanes == LANES) cast_lanes(x, column_out, at, bottom - top, LANES, n, columns, block);
                else cast_lanes(x, column_out, at, bottom - top, lanes, n, columns, block);
            }
        }
    }
}

#elif defined AMAX
void kernel(const Cast *c, const void *x, float *out, int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; index++) {
        Item item = item_of(c, index);
        if (c->inner == 1) {
            uint32_t largest = 0;
            for (int64_t i = item.at; i < item.at + item.rows; i++) {
                uint32_t a = load(x, i) & 0x7fffffffu;
                largest = a > largest ? a : largest;
            }
            out[item.block] = float_of(largest);
            continue;
        }
        uint32_t largest[LANES] = {0};
        for (int64_t r = 0; r < item.rows; r++)
            for (int64_t i = 0; i < item.lanes; i++) {
                uint32_t a = load(x, item.at + r * c->inner + i) & 0x7fffffffu;
                largest[i] = a > largest[i] ? a : largest[i];
            }
        for (int64_t i = 0; i < item.lanes; i++) out[item.block + i] = float_of(largest[i]);
    }
}

#elif defined ELEMENTWISE
/* No blocks: a format with float32's own exponents (bfloat16) drops low bits of the integer. An item is an element. */
void kernel(const Cast *c, const void *x, void *out, int64_t begin, int64_t end) {
    uint32_t drop = (uint32_t)(23 - c->man_bits), largest = bits_of(c->largest);
    for (int64_t i = begin; i < end; i++) {
        uint32_t u = load(x, i), a = u & 0x7fffffffu, up = 0;
        if (ROUNDING == NEAREST_EVEN) up = (1u << (drop - 1)) - 1u + ((a >> drop) & 1u);
        if (ROUNDING == NEAREST_AWAY) up = 1u << (drop - 1);
        if (ROUNDING == STOCHASTIC) {
            uint32_t h = mix((uint32_t)i ^ c->seed_low);
            up = mix(h ^ c->seed_high ^ (uint32_t)((uint64_t)i >> 32)) >> (32 - drop);
        }
        uint32_t r = (a + up) & ~((1u << drop) - 1u);
        r = r < largest ? r : largest;
        store(out, i, float_of((a >= 0x7f800000u ? a : r) | (u & 0x80000000u)));
    }
}

#elif defined DECODE
/* Codes back to values, blocks lying together, one factor per block. INPUT: CODE, NIBBLE or SIXBIT. */
typedef struct {
    int64_t length, block;
    float bound;
    const float *table;  /* the value of each code; of NIBBLE, the two values of each byte */
    const float *decode; /* the factor of each block */
} Decode;

INLINE void look_up(const uint8_t *codes, int64_t at, int64_t n, const float *table, float *values) {
    if (INPUT == NIBBLE)
        for (int64_t i = 0; i < n / 2; i++) memcpy(values + 2 * i, table + 2 * codes[at / 2 + i], 8);
    else if (INPUT == SIXBIT)
        for (int64_t i = 0; i < n / 4; i++) {
            const uint8_t *b = codes + at / 4 * 3 + 3 * i;
            values[4 * i] = table[b[0] & 63];
            values[4 * i + 1] = table[(b[0] >> 6 | b[1] << 2) & 63];
            values[4 * i + 2] = table[(b[1] >> 4 | b[2] << 4) & 63];
            values[4 * i + 3] = table[b[2] >> 2];
        }
    else
        for (int64_t i = 0; i < n; i++) values[i] = table[codes[at + i]];
}

INLINE void decode_run(const uint8_t *codes, void *out, int64_t at, int64_t n, const Decode *d, float factor) {
    float values[256];
    look_up(codes, at, n, d->table, values);
    for (int64_t i = 0; i < n; i++) {
        float value = values[i] * factor;
        value = value > d->bound ? d->bound : value;
        store(out, at + i, value < -d->bound ? -d->bound : value);
    }
}

void kernel(const Decode *d, const uint8_t *codes, void *out, int64_t begin, int64_t end) {
    int64_t count = (d->length + d->block - 1) / d->block;
    for (int64_t item = begin; item < end; item++) {
        int64_t first = item % count * d->block, start = item / count * d->length + first;
        int64_t stop = start + least(d->length - first, d->block);
        float factor = d->decode[item];
        for (int64_t at = start; at < stop; at += 256) {
            int64_t n = least(stop - at, 256);
            if (n == BLOCK) decode_run(codes, out, at, BLOCK, d, factor);
            else decode_run(codes, out, at, n, d, factor);
        }
    }
}
#endif

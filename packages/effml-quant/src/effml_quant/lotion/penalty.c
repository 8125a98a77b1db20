/* The gradient of LOTION's penalty in one sweep over each block, built at first use by compiled.py.

   The arithmetic is that of penalty.py under a real-valued scale. Blocks lie one after the other, `length` floats each;
   a kernel works on the blocks begin .. end - 1. compiled.py defines FLOATS: 1 for a grid of floats, 0 for integers. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16   /* sums are kept apart, as vectors need and as rounding likes */
#define STRETCH 4096 /* floats whose sums are float32 */

typedef struct {
    int64_t length;
    int32_t man_bits, floor_bits, ceiling_bits, through_scale;
    float largest, spacing, snap, strength;
} Penalty;

static inline uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static inline float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

/* Add the gradient at fixed scale of one weight; its share of R, <w, h> and the ties go to sums. */
static inline __attribute__((always_inline)) void one(float x, float g, float *out, float scale, float amax,
                                                      const Penalty *c, float *value, float *along, int32_t *ties) {
    float unit = scale * c->spacing;
    if (FLOATS) {
        int32_t power = (int32_t)(bits_of(x / scale) & 0x7f800000u);
        power = power > c->floor_bits ? power : c->floor_bits;
        power = power < c->ceiling_bits ? power : c->ceiling_bits;
        unit = scale * float_of((uint32_t)power - ((uint32_t)c->man_bits << 23));
    }
    float t = x / unit, nearest = (t + 0x1.8p23f) - 0x1.8p23f, d = t - nearest; /* t is below 2^10 */
    d = fabsf(d) <= c->snap ? 0.0f : d;
    float e = (d == 0.0f ? 0.0f : copysignf(1.0f, d)) - d, weight = g * unit, h = e * weight;
    *value += h * unit * d;
    h -= d * weight;
    *along += x * h;
    *ties += fabsf(x) == amax;
    *out += 0.5f * c->strength * h;
}

void kernel(const Penalty *c, const float *w, const float *g, float *out, double *values, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
        const float *x = w + block * c->length, *weight = g + block * c->length;
        float *y = out + block * c->length;
        int64_t n = c->length;
        uint32_t largest = 0;
        for (int64_t i = 0; i < n; i++) {
            uint32_t u = bits_of(x[i]) & 0x7fffffffu;
            largest = u > largest ? u : largest;
        }
        float amax = float_of(largest), scale = amax / c->largest;
        if (largest >= 0x7f800000u) scale = NAN;
        if (scale < 0x1p-126f) scale = 1.0f;
        double value = 0, along = 0;
        int64_t ties = 0;
        for (int64_t first = 0; first < n; first += STRETCH) {
            int64_t last = first + STRETCH < n ? first + STRETCH : n, i = first;
            float r[LANES] = {0}, a[LANES] = {0};
            int32_t k[LANES] = {0};
            for (; i + LANES <= last; i += LANES)
                for (int l = 0; l < LANES; l++)
                    one(x[i + l], weight[i + l], y + i + l, scale, amax, c, r + l, a + l, k + l);
            for (; i < last; i++) one(x[i], weight[i], y + i, scale, amax, c, r, a, k);
            for (int l = 0; l < LANES; l++) value += r[l], along += a[l], ties += k[l];
        }
        values[block] = 0.5 * value;
        if (!c->through_scale || largest == 0) continue;
        float share = (float)(c->strength * (value - 0.5 * along) / ((double)amax * (double)(ties > 0 ? ties : 1)));
        for (int64_t i = 0; i < n; i++) y[i] += fabsf(x[i]) == amax ? (x[i] < 0.0f ? -share : share) : 0.0f;
    }
}

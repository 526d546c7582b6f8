/* Pointwise operations on rows of a CPU tensor, which round where transformers' modules round. Shared by pointwise.c and
 * decoder_layers.c. A row's result depends on that row alone, bit for bit.
 */
#include "vectors.h"

/* Elements that are loaded together: two vectors, in the order of `vectors.h`. */
#define TWO (2 * W)

typedef struct {
    vf a, b;
} Pair;

/* Loads elements [i, i + TWO) of a row. */
INLINE Pair load_pair(const int dtype, const char *row, int64_t i)
{
    if (dtype == FLOAT32)
        return (Pair){load((const float *)row + i), load((const float *)row + i + W)};
    vu words = *(const vu_memory *)(row + 2 * i);
    return (Pair){(vf)(words << 16), (vf)(words & 0xffff0000u)};
}

INLINE void store_pair(const int dtype, char *row, int64_t i, Pair x)
{
    if (dtype == FLOAT32) {
        store((float *)row + i, x.a);
        store((float *)row + i + W, x.b);
        return;
    }
    *(vu_memory *)(row + 2 * i) = (round_to_bfloat16(x.a) >> 16) | (round_to_bfloat16(x.b) & 0xffff0000u);
}

/* Rounds to the dtype. */
INLINE vf rounded(const int dtype, vf x)
{
    return dtype == FLOAT32 ? x : (vf)(round_to_bfloat16(x) & 0xffff0000u);
}

INLINE Pair rounded_pair(const int dtype, Pair x) { return (Pair){rounded(dtype, x.a), rounded(dtype, x.b)}; }
INLINE Pair times(Pair x, Pair y) { return (Pair){x.a * y.a, x.b * y.b}; }
INLINE Pair plus(Pair x, Pair y) { return (Pair){x.a + y.a, x.b + y.b}; }
INLINE Pair minus(Pair x, Pair y) { return (Pair){x.a - y.a, x.b - y.b}; }

/* ---- root mean square norm ------------------------------------------------------------------------------------- */

typedef struct {
    int64_t width;
    const float *factors; /* in the order in which rows of the dtype are loaded */
    float eps;
} Norm;

/* out = x / sqrt(mean(x^2) + eps) * factors, for one row; `out` may be `x`.
 *
 * `late`: multiply by the factors before rounding to the dtype, not after. */
INLINE void norm_row(const int dtype, const int late, const Norm *n, const char *x, char *out)
{
    int64_t width = n->width, whole = width / TWO * TWO;
    vf even = {0}, odd = {0};
    for (int64_t i = 0; i < whole; i += TWO) {
        Pair p = load_pair(dtype, x, i);
        even = fma_(p.a, p.a, even), odd = fma_(p.b, p.b, odd);
    }
    float squares = sum(even + odd);
    for (int64_t i = whole; i < width; i++) {
        float v = get(dtype, x, i);
        squares += v * v;
    }
    float scale = 1.0f / sqrtf(squares / (float)width + n->eps);
    for (int64_t i = 0; i < whole; i += TWO) {
        Pair p = load_pair(dtype, x, i);
        p.a = p.a * scale, p.b = p.b * scale;
        if (!late)
            p = rounded_pair(dtype, p);
        store_pair(dtype, out, i, times(p, (Pair){load(n->factors + i), load(n->factors + i + W)}));
    }
    for (int64_t i = whole; i < width; i++) {
        float v = get(dtype, x, i) * scale;
        if (!late)
            v = rounded(dtype, splat(v))[0];
        put(dtype, out, i, v * n->factors[i]);
    }
}

/* ---- rotary embeddings ----------------------------------------------------------------------------------------- */

/* (x0, x1) -> (x0 cos0 - x1 sin0, x1 cos1 + x0 sin1), for the halves x0 and x1 of a head; each product is rounded.
 * `out` may be `x`. */
INLINE void rotate_head(const int dtype, int64_t dim, const char *cosines, const char *sines, const char *x, char *out)
{
    int64_t half = dim / 2, whole = half / TWO * TWO;
    for (int64_t i = 0; i < whole; i += TWO) {
        Pair low = load_pair(dtype, x, i), high = load_pair(dtype, x, half + i);
        Pair a = rounded_pair(dtype, times(low, load_pair(dtype, cosines, i)));
        Pair b = rounded_pair(dtype, times(high, load_pair(dtype, sines, i)));
        Pair c = rounded_pair(dtype, times(high, load_pair(dtype, cosines, half + i)));
        Pair d = rounded_pair(dtype, times(low, load_pair(dtype, sines, half + i)));
        store_pair(dtype, out, i, minus(a, b));
        store_pair(dtype, out, half + i, plus(c, d));
    }
    for (int64_t i = whole; i < half; i++) {
        float low = get(dtype, x, i), high = get(dtype, x, half + i);
        vf products = {low * get(dtype, cosines, i), high * get(dtype, sines, i),
                       high * get(dtype, cosines, half + i), low * get(dtype, sines, half + i)};
        products = rounded(dtype, products);
        put(dtype, out, i, products[0] - products[1]);
        put(dtype, out, half + i, products[2] + products[3]);
    }
}

/* ---- sums and activations -------------------------------------------------------------------------------------- */

/* out = x + y; `out` may be one of both. */
INLINE void add_row(const int dtype, int64_t width, const char *x, const char *y, char *out)
{
    int64_t whole = width / TWO * TWO;
    for (int64_t i = 0; i < whole; i += TWO)
        store_pair(dtype, out, i, plus(load_pair(dtype, x, i), load_pair(dtype, y, i)));
    for (int64_t i = whole; i < width; i++)
        put(dtype, out, i, get(dtype, x, i) + get(dtype, y, i));
}

/* x / (1 + e^-x) */
INLINE vf silu(vf x)
{
    vf minus = -x; /* beyond 88 the exponential would overflow its range, and the result vanishes */
    return x / (1.0f + exponential(choose(minus > splat(88.0f), splat(88.0f), minus)));
}

/* out = silu(gate) * up; the activation is rounded before the product. `out` may be `gate`. */
INLINE void gated_row(const int dtype, int64_t width, const char *gate, const char *up, char *out)
{
    int64_t whole = width / TWO * TWO;
    for (int64_t i = 0; i < whole; i += TWO) {
        Pair g = load_pair(dtype, gate, i);
        store_pair(dtype, out, i, times(rounded_pair(dtype, (Pair){silu(g.a), silu(g.b)}), load_pair(dtype, up, i)));
    }
    for (int64_t i = whole; i < width; i++) {
        float g = rounded(dtype, silu(splat(get(dtype, gate, i))))[0];
        put(dtype, out, i, g * get(dtype, up, i));
    }
}

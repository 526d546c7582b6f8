/* Fused pointwise operations of transformers on a CPU; models/patches/pointwise_cpu.py builds, loads and calls them.
 *
 * Each entry point replaces several torch operations by one pass over memory, and rounds where they round. Rows are
 * independent, so a row's result does not depend on the batch composition, bit for bit.
 */
#include "vectors.h"

/* Elements that are loaded together: two vectors, in the order of `vectors.h`. */
#define TWO (2 * W)
/* Fewer elements than this are computed by one thread. */
#define ALONE 24576

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

/* ---- threads ------------------------------------------------------------------------------------------------- */

typedef void Parallel(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel, or NULL */

typedef struct {
    void (*rows)(const void *call, int64_t from, int64_t to);
    const void *call;
    int64_t count, at_once, next;
} Team;

static void take_rows(void *data)
{
    Team *team = data;
    for (;;) {
        int64_t from = __atomic_fetch_add(&team->next, team->at_once, __ATOMIC_RELAXED);
        if (from >= team->count)
            return;
        int64_t to = from + team->at_once;
        team->rows(team->call, from, to < team->count ? to : team->count);
    }
}

static void each_row(void (*rows)(const void *, int64_t, int64_t), const void *call, int64_t count, int64_t width,
                     int64_t threads, Parallel *parallel)
{
    if (count * width < ALONE || threads <= 1 || !parallel) {
        rows(call, 0, count);
        return;
    }
    Team team = {rows, call, count, (count + 4 * threads - 1) / (4 * threads), 0};
    parallel(take_rows, &team, (unsigned)threads, 0);
}

/* ---- root mean square norm ------------------------------------------------------------------------------------- */

typedef struct {
    int64_t width;
    const char *x;
    const float *factors;
    char *out;
    float eps;
} Norm;

INLINE void norm_rows(const int dtype, const int late, const Norm *n, int64_t from, int64_t to)
{
    int64_t width = n->width, whole = width / TWO * TWO;
    for (int64_t row = from; row < to; row++) {
        const char *x = n->x + row * width * size_of(dtype);
        char *out = n->out + row * width * size_of(dtype);
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
}

static void norm_float32(const void *n, int64_t from, int64_t to) { norm_rows(FLOAT32, 1, n, from, to); }
static void norm_early(const void *n, int64_t from, int64_t to) { norm_rows(BFLOAT16, 0, n, from, to); }
static void norm_late(const void *n, int64_t from, int64_t to) { norm_rows(BFLOAT16, 1, n, from, to); }

/* out = x / sqrt(mean(x^2) + eps) * factors, for `count` rows of `width` numbers.
 *
 * `factors` are floats in the pair order of `vectors.h` (see rollout_norm_factors). `late`: multiply by the factors
 * before rounding to the dtype, not after. */
void rollout_rms_norm(int64_t dtype, int64_t late, int64_t count, int64_t width, const char *x, const float *factors,
                      double eps, char *out, int64_t threads, Parallel *parallel)
{
    Norm n = {width, x, factors, out, (float)eps};
    each_row(dtype == FLOAT32 ? norm_float32 : late ? norm_late : norm_early, &n, count, width, threads, parallel);
}

/* Reorders the weight to the order in which rows of the dtype are loaded. */
void rollout_norm_factors(int64_t dtype, int64_t width, const float *weight, float *factors)
{
    int64_t whole = width / TWO * TWO;
    memcpy(factors, weight, (size_t)width * sizeof(float));
    for (int64_t i = 0; dtype == BFLOAT16 && i < whole; i += TWO)
        for (int64_t j = 0; j < W; j++)
            factors[i + j] = weight[i + 2 * j], factors[i + W + j] = weight[i + 2 * j + 1];
}

/* ---- rotary embeddings ----------------------------------------------------------------------------------------- */

typedef struct {
    int64_t heads, token, head; /* strides count bytes */
    const char *x;
    char *out;
} Rotated;

typedef struct {
    int64_t dim, angles; /* bytes from one token's cosines to the next one's */
    const char *cosines, *sines;
    Rotated parts[2];
} Rotation;

/* (x0, x1) -> (x0 cos0 - x1 sin0, x1 cos1 + x0 sin1), for the halves x0 and x1 of a head; each product is rounded. */
INLINE void rotate_rows(const int dtype, const Rotation *r, int64_t from, int64_t to)
{
    int64_t half = r->dim / 2, whole = half / TWO * TWO, size = size_of(dtype);
    for (int64_t token = from; token < to; token++) {
        const char *cosines = r->cosines + token * r->angles, *sines = r->sines + token * r->angles;
        for (int part = 0; part < 2; part++) {
            const Rotated *p = &r->parts[part];
            for (int64_t head = 0; head < p->heads; head++) {
                const char *x = p->x + token * p->token + head * p->head;
                char *out = p->out + (token * p->heads + head) * r->dim * size;
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
        }
    }
}

static void rotate_float32(const void *r, int64_t from, int64_t to) { rotate_rows(FLOAT32, r, from, to); }
static void rotate_bfloat16(const void *r, int64_t from, int64_t to) { rotate_rows(BFLOAT16, r, from, to); }

/* Rotates the heads of queries and keys [tokens, heads, dim]; the outputs are contiguous. */
void rollout_rotate(int64_t dtype, int64_t tokens, int64_t dim, const char *cosines, const char *sines,
                    int64_t angles, const char *query, int64_t query_heads, int64_t query_token, int64_t query_head,
                    char *query_out, const char *key, int64_t key_heads, int64_t key_token, int64_t key_head,
                    char *key_out, int64_t threads, Parallel *parallel)
{
    Rotation r = {dim, angles, cosines, sines,
                  {{query_heads, query_token, query_head, query, query_out},
                   {key_heads, key_token, key_head, key, key_out}}};
    each_row(dtype == FLOAT32 ? rotate_float32 : rotate_bfloat16, &r, tokens, (query_heads + key_heads) * dim, threads,
             parallel);
}

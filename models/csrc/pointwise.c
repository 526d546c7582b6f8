/* Fused pointwise operations of transformers on a CPU; models/patches/pointwise_cpu.py builds, loads and calls them.
 *
 * Each entry point replaces several torch operations by one pass over memory, and rounds where they round. Rows are
 * independent, so a row's result does not depend on the batch composition, bit for bit.
 */
#include "pointwise_rows.h"
#include "threads.h"

/* Fewer elements than this are computed by one thread. */
#define ALONE 24576

/* ---- threads ------------------------------------------------------------------------------------------------- */

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
    Norm norm;
    const char *x;
    char *out;
} NormCall;

INLINE void norm_rows(const int dtype, const int late, const NormCall *n, int64_t from, int64_t to)
{
    int64_t bytes = n->norm.width * size_of(dtype);
    for (int64_t row = from; row < to; row++)
        norm_row(dtype, late, &n->norm, n->x + row * bytes, n->out + row * bytes);
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
    NormCall n = {{width, factors, (float)eps}, x, out};
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

INLINE void rotate_rows(const int dtype, const Rotation *r, int64_t from, int64_t to)
{
    int64_t bytes = r->dim * size_of(dtype);
    for (int64_t token = from; token < to; token++) {
        const char *cosines = r->cosines + token * r->angles, *sines = r->sines + token * r->angles;
        for (int part = 0; part < 2; part++) {
            const Rotated *p = &r->parts[part];
            for (int64_t head = 0; head < p->heads; head++)
                rotate_head(dtype, r->dim, cosines, sines, p->x + token * p->token + head * p->head,
                            p->out + (token * p->heads + head) * bytes);
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

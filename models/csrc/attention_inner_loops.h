/* Inner loops of paged_attention.c: scores of rows against the keys of a block, and weighted sums of its values. */
#pragma once
#include "attention_call.h"
#include "bfloat16_products.h"

/* Rows (heads of one or several queries) that share one load of a key or value. ROWS x 4 sums, a vector per row and one
 * of a key fit into the registers: 32 with AVX-512 and on Arm, 16 elsewhere. */
#if defined(__AVX512F__) || defined(__aarch64__)
#define ROWS 6
#else
#define ROWS 3
#endif

/* Software prefetch of the next block's keys or values, all heads of the task, while the current block is computed.
 * Pages are scattered in memory, so the hardware prefetcher cannot predict them. */
typedef struct {
    const char *const *rows; /* [BLOCK] addresses */
    int64_t row, offset, bytes;
    int64_t heads, due; /* rows are fetched at the rate at which rows of one head are computed */
} Ahead;

INLINE void prefetch(Ahead *ahead, int64_t rows_of_a_head)
{
    ahead->due += rows_of_a_head;
    for (; ahead->due >= ahead->heads && ahead->row < BLOCK; ahead->due -= ahead->heads, ahead->row++) {
        const char *row = ahead->rows[ahead->row] + ahead->offset;
        for (int64_t byte = 0; byte < ahead->bytes; byte += 64)
            __builtin_prefetch(row + byte);
    }
}

/* sums[r][i] += the product of vectors [j, j + 1) of a query r and a key i, or [j, j + 2) in bfloat16. */
INLINE void multiply_keys(const int dtype, const int rows, int64_t vectors, int64_t j, const float *q,
                          const char *const k[4], vf sums[ROWS][4])
{
    const int halves = dtype == BFLOAT16 ? 2 : 1;
    UNROLL for (int half = 0; half < halves; half++) {
        vf query[ROWS];
        UNROLL for (int r = 0; r < rows; r++)
            query[r] = load(q + (r * vectors + j + half) * W);
        UNROLL for (int i = 0; i < 4; i++) {
            vf key = row_vector(dtype, k[i] + j * W * size_of(dtype), half);
            UNROLL for (int r = 0; r < rows; r++)
                sums[r][i] = fma_(query[r], key, sums[r][i]);
        }
    }
}

/* Computes scores [rows, BLOCK] of `rows` rows against the keys [from, to) of a block; from and to are multiples of 4.
 * q [rows, vectors * W] floats in vector order; keys [BLOCK] addresses, to which `offset` is added. */
INLINE void score_rows(const int dtype, const int rows, int64_t vectors, float scaling, const float *q,
                       const char *const *keys, int64_t offset, int64_t from, int64_t to, Ahead *ahead, float *scores)
{
    const int step = dtype == BFLOAT16 ? 2 : 1;
    for (int64_t t = from; t < to; t += 4) {
        const char *k[4] = {keys[t] + offset, keys[t + 1] + offset, keys[t + 2] + offset, keys[t + 3] + offset};
        if (ahead)
            prefetch(ahead, 4);
        vf sums[ROWS][4];
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int i = 0; i < 4; i++)
                sums[r][i] = (vf){0};
        UNROLL_BY_2 for (int64_t j = 0; j < vectors; j += step)
            multiply_keys(dtype, rows, vectors, j, q, k, sums);
        UNROLL for (int r = 0; r < rows; r++)
            store_sums(scores + r * BLOCK + t, scaling, sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
    }
}

/* sums = sums * factors + weights @ values[from:to], for `count` vectors of each of `rows` rows.
 * weights [rows, BLOCK]; sums [rows, stride], already at its first vector; `first` is that vector's number. */
INLINE void add_values(const int dtype, const int rows, const int count, const float *weights,
                       const char *const *values, int64_t offset, int64_t first, int64_t from, int64_t to,
                       const float *factors, Ahead *ahead, float *sums, int64_t stride)
{
    vf total[ROWS][4];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int i = 0; i < count; i++)
            total[r][i] = load(sums + r * stride + i * W) * splat(factors[r]);
    offset += first * W * size_of(dtype);
    for (int64_t t = from; t < to; t++) {
        const char *row = values[t] + offset;
        if (ahead)
            prefetch(ahead, 1);
        vf weight[ROWS];
        UNROLL for (int r = 0; r < rows; r++)
            weight[r] = splat(weights[r * BLOCK + t]);
        UNROLL for (int i = 0; i < count; i++) {
            vf value = row_vector(dtype, row, i);
            UNROLL for (int r = 0; r < rows; r++)
                total[r][i] = fma_(weight[r], value, total[r][i]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int i = 0; i < count; i++)
            store(sums + r * stride + i * W, total[r][i]);
}

/* Calls add_values for all vectors of the rows. */
INLINE void add_all_values(const int dtype, const int rows, int64_t vectors, const float *weights,
                           const char *const *values, int64_t offset, int64_t from, int64_t to, const float *factors,
                           Ahead *ahead, float *sums)
{
    int64_t j = 0;
    for (; j + 4 <= vectors; j += 4, ahead = NULL)
        add_values(dtype, rows, 4, weights, values, offset, j, from, to, factors, ahead, sums + j * W, vectors * W);
    if (j + 2 <= vectors) {
        add_values(dtype, rows, 2, weights, values, offset, j, from, to, factors, ahead, sums + j * W, vectors * W);
        j += 2, ahead = NULL;
    }
    if (dtype != BFLOAT16 && j < vectors) /* bfloat16 comes in pairs */
        add_values(dtype, rows, 1, weights, values, offset, j, from, to, factors, ahead, sums + j * W, vectors * W);
}

/* `score_rows` and `add_all_values` for each dtype and number of rows. One function with all of them takes a compiler
 * several times as long. Where products compute bfloat16, nothing here does. */
typedef void Score(int64_t vectors, float scaling, const float *q, const char *const *keys, int64_t offset,
                   int64_t from, int64_t to, Ahead *ahead, float *scores);
typedef void WeighValues(int64_t vectors, const float *weights, const char *const *values, int64_t offset, int64_t from,
                         int64_t to, const float *factors, Ahead *ahead, float *sums);

#define LOOPS_OF(dtype, rows)                                                                                          \
    static __attribute__((noinline)) void score_##dtype##_##rows(                                                      \
        int64_t vectors, float scaling, const float *q, const char *const *keys, int64_t offset, int64_t from,         \
        int64_t to, Ahead *ahead, float *scores)                                                                       \
    {                                                                                                                  \
        score_rows(dtype, rows, vectors, scaling, q, keys, offset, from, to, ahead, scores);                           \
    }                                                                                                                  \
    static __attribute__((noinline)) void weigh_##dtype##_##rows(                                                      \
        int64_t vectors, const float *weights, const char *const *values, int64_t offset, int64_t from, int64_t to,    \
        const float *factors, Ahead *ahead, float *sums)                                                               \
    {                                                                                                                  \
        add_all_values(dtype, rows, vectors, weights, values, offset, from, to, factors, ahead, sums);                 \
    }
#if ROWS == 6
#define LOOPS(dtype)                                                                                                   \
    LOOPS_OF(dtype, 1) LOOPS_OF(dtype, 2) LOOPS_OF(dtype, 3) LOOPS_OF(dtype, 4) LOOPS_OF(dtype, 5) LOOPS_OF(dtype, 6)
#define NAMES(name) {name##_1, name##_2, name##_3, name##_4, name##_5, name##_6}
#else
#define LOOPS(dtype) LOOPS_OF(dtype, 1) LOOPS_OF(dtype, 2) LOOPS_OF(dtype, 3)
#define NAMES(name) {name##_1, name##_2, name##_3}
#endif

LOOPS(FLOAT32)
#if !HAS_BFLOAT16_PRODUCTS
LOOPS(BFLOAT16)
#endif
#if HAS_FLOAT16
LOOPS(FLOAT16)
#endif

/* By dtype, and number of rows - 1. */
static Score *const score[][ROWS] = {
    [FLOAT32] = NAMES(score_FLOAT32),
#if !HAS_BFLOAT16_PRODUCTS
    [BFLOAT16] = NAMES(score_BFLOAT16),
#endif
#if HAS_FLOAT16
    [FLOAT16] = NAMES(score_FLOAT16),
#endif
};
static WeighValues *const weigh_values[][ROWS] = {
    [FLOAT32] = NAMES(weigh_FLOAT32),
#if !HAS_BFLOAT16_PRODUCTS
    [BFLOAT16] = NAMES(weigh_BFLOAT16),
#endif
#if HAS_FLOAT16
    [FLOAT16] = NAMES(weigh_FLOAT16),
#endif
};

/* Turns scores [from, to) of a block into weights relative to the running maximum; the rest of their vectors becomes 0.
 * Returns the factor that rescales the sums so far. */
static float weigh(float *scores, int64_t from, int64_t to, float softcap, float *maximum, float *total)
{
    int64_t low = from / W * W, high = (to + W - 1) / W * W;
    for (int64_t t = low; t < from; t++)
        scores[t] = MINUS_INFINITY;
    for (int64_t t = to; t < high; t++)
        scores[t] = MINUS_INFINITY;
    if (softcap > 0) {
        vf cap = splat(softcap);
        for (int64_t t = low; t < high; t += W) {
            vf x = load(scores + t);
            vf capped = cap * hyperbolic_tangent(x / cap);
            store(scores + t, capped);
        }
        for (int64_t t = low; t < from; t++)
            scores[t] = MINUS_INFINITY;
        for (int64_t t = to; t < high; t++)
            scores[t] = MINUS_INFINITY;
    }
    vf most = splat(*maximum);
    for (int64_t t = low; t < high; t += W)
        most = larger(load(scores + t), most);
    float before = *maximum, now = largest(most);
    /* If all scores are -infinity, a finite reference gives weights of 0; -infinity as reference would give NaN. */
    float reference = now == MINUS_INFINITY ? 0 : now;
    vf added = {0}, by = splat(reference);
    for (int64_t t = low; t < high; t += W) {
        vf weight = exponential(load(scores + t) - by);
        store(scores + t, weight);
        added += weight;
    }
    float factor = before == now ? 1.0f : scale_from(before, reference);
    *maximum = now;
    store(total, fma_(load(total), splat(factor), added));
    return factor;
}

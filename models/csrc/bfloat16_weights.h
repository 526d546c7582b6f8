/* Softmax weights of a chunk of scores, rounded to bfloat16, and the sums that fold chunks into a result. */
#pragma once
#include "attention_pages.h"
#include "bfloat16_products.h"

#if HAS_BFLOAT16_PRODUCTS

/* 2^x for x <= 1, to 3e-6 of it (bfloat16 rounds at 2e-3); 0 below -125 and for -infinity; NaN stays NaN. The polynomial
 * of 2^r, |r| <= 1/2, has the least largest relative error of its degree, found by Lawson's algorithm. */
INLINE vf rough_power_of_two(vf x)
{
    const vf magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer, in the low bits */
    __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(-125.0f), _CMP_NLE_UQ);
    vf shifted = x + magic;
    vf r = x - (shifted - magic);
    vf p = splat(0.009570101276040077f);
    p = fma_(p, r, splat(0.05591785907745361f));
    p = fma_(p, r, splat(0.240247443318367f));
    p = fma_(p, r, splat(0.6931217908859253f));
    p = fma_(p, r, splat(0.9999992847442627f));
    return (vf)_mm512_maskz_add_epi32(counts, (__m512i)p, _mm512_slli_epi32((__m512i)shifted, 23));
}

/* Turns one row's scores of a chunk into weights relative to their maximum.
 *
 * own: the positions in the chunk that the row sees; all: those computed, whose bounds are multiples of 32. Weights
 * [all] that the row does not see are 0. Sets the maximum (times scale, with softcap) and the sum of weights.
 */
static void weigh_row(float *scores, char *weights, Range own, Range all, float scale, float softcap, float *maximum,
                      float *total)
{
    if (own.begin >= own.end) {
        memset(weights + 2 * all.begin, 0, (size_t)(2 * (all.end - all.begin)));
        *maximum = MINUS_INFINITY, *total = 0;
        return;
    }
    int64_t low = own.begin / 32 * 32, high = (own.end + 31) / 32 * 32;
    memset(weights + 2 * all.begin, 0, (size_t)(2 * (low - all.begin)));
    memset(weights + 2 * high, 0, (size_t)(2 * (all.end - high)));
    if (softcap > 0 || !(scale > 0)) {
        vf cap = splat(softcap);
        for (int64_t t = low; t < high; t += W) {
            vf x = load(scores + t) * splat(scale);
            store(scores + t, softcap > 0 ? cap * hyperbolic_tangent(x / cap) : x);
        }
        scale = 1;
    }
    for (int64_t t = low; t < own.begin; t++)
        scores[t] = MINUS_INFINITY;
    for (int64_t t = own.end; t < high; t++)
        scores[t] = MINUS_INFINITY;
    __m512 most = _mm512_set1_ps(MINUS_INFINITY), also = most; /* the second operand where the first is NaN */
    for (int64_t t = low; t < high; t += 32) {
        most = _mm512_max_ps(_mm512_loadu_ps(scores + t), most);
        also = _mm512_max_ps(_mm512_loadu_ps(scores + t + W), also);
    }
    float now = largest((vf)_mm512_max_ps(most, also));
    /* If all scores are -infinity, a finite reference gives weights of 0; -infinity as reference would give NaN. */
    float factor = scale * 1.44269504088896341f, reference = now == MINUS_INFINITY ? 0 : now * factor;
    vf by = splat(factor), minus = splat(-reference), even = {0}, odd = {0};
    for (int64_t t = low; t < high; t += 32) {
        vf a = rough_power_of_two(fma_(load(scores + t), by, minus));
        vf b = rough_power_of_two(fma_(load(scores + t + W), by, minus));
        even += a, odd += b;
        _mm512_storeu_si512(weights + 2 * t, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
    }
    *maximum = now * scale;
    *total = sum(even + odd);
}

/* The result so far of some rows, by row. */
typedef struct {
    float *maximum, *weight; /* [rows] */
    float *totals;           /* [rows, stride] weighted values */
    int64_t stride;
} Folded;

/* Adds one chunk to the result so far of up to 16 rows from `row` on; the order of chunks matters, so callers keep it.
 * maximum and weight [count], sums [count, stride] of the chunk. A chunk without weight changes nothing. */
static void fold_rows(int64_t count, const float *maximum, const float *weight, const float *sums, int64_t stride,
                      const Folded *so_far, int64_t row)
{
    float before[W], new_maximum[W], weights[W], new_weight[W], old[W], new[W];
    for (int64_t i = 0; i < W; i++) {
        before[i] = i < count ? so_far->maximum[row + i] : 0, new_maximum[i] = i < count ? maximum[i] : 0;
        weights[i] = i < count ? so_far->weight[row + i] : 0, new_weight[i] = i < count ? weight[i] : 0;
    }
    vf now = larger(load(new_maximum), load(before));
    vf reference = choose(now == splat(MINUS_INFINITY), (vf){0}, now);
    vf keep = exponential(load(before) - reference), take = exponential(load(new_maximum) - reference);
    store(old, keep), store(new, take);
    store(weights, load(weights) * keep + load(new_weight) * take);
    for (int64_t i = 0; i < count; i++) {
        if (maximum[i] == MINUS_INFINITY && weight[i] == 0)
            continue;
        so_far->maximum[row + i] = now[i], so_far->weight[row + i] = weights[i];
        float *total = so_far->totals + (row + i) * so_far->stride;
        for (int64_t j = 0; j < so_far->stride; j += W)
            store(total + j, fma_(load(total + j), splat(old[i]), load(sums + i * stride + j) * splat(new[i])));
    }
}

#endif

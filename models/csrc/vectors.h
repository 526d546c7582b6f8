/* Float vectors on a CPU, and conversion from and to the three supported dtypes. Shared by the sources in this folder.
 *
 * Vectors use the GCC and Clang extension `vector_size` and are as wide as the target's registers. bfloat16 is loaded
 * in pairs: 2 W elements as W words, whose low halves become one vector (by a shift) and whose high halves another (by
 * a mask). Element-wise computations keep that order, and the final store undoes it.
 */
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* ---- vectors ------------------------------------------------------------------------------------------------- */

#if defined(__AVX512F__)
#define W 16
#elif defined(__AVX__)
#define W 8
#else
#define W 4
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef float vf_memory __attribute__((vector_size(4 * W), aligned(2), may_alias));
typedef uint32_t vu_memory __attribute__((vector_size(4 * W), aligned(2), may_alias));

#define INLINE static inline __attribute__((always_inline))

/* Loops over registers must be unrolled. Clang does so by itself; with a pragma it unrolls too late. */
#if defined(__clang__)
#define UNROLL
#define UNROLL_BY_2
#else
#define UNROLL _Pragma("GCC unroll 16")
#define UNROLL_BY_2 _Pragma("GCC unroll 2")
#endif

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

INLINE vf splat(float x) { return x - (vf){0}; } /* x + 0 would turn -0 into 0 */
INLINE vf load(const float *p) { return *(const vf_memory *)p; }
INLINE void store(float *p, vf x) { *(vf_memory *)p = x; }
INLINE vf choose(vi condition, vf yes, vf no) { return (vf)((condition & (vi)yes) | (~condition & (vi)no)); }
INLINE vf larger(vf a, vf b) { return choose(a > b, a, b); } /* b where a is NaN */

/* a * b + c */
INLINE vf fma_(vf a, vf b, vf c)
{
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX__) && defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

#if W == 16
#define PAIRS_LOW 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define PAIRS_HIGH 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
#define FOURS_LOW 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define FOURS_HIGH 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define SWAP_1 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14
#define SWAP_2 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13
#define SWAP_4 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11
#define SWAP_8 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7
#elif W == 8
#define PAIRS_LOW 0, 8, 1, 9, 4, 12, 5, 13
#define PAIRS_HIGH 2, 10, 3, 11, 6, 14, 7, 15
#define FOURS_LOW 0, 1, 8, 9, 4, 5, 12, 13
#define FOURS_HIGH 2, 3, 10, 11, 6, 7, 14, 15
#define SWAP_1 1, 0, 3, 2, 5, 4, 7, 6
#define SWAP_2 2, 3, 0, 1, 6, 7, 4, 5
#define SWAP_4 4, 5, 6, 7, 0, 1, 2, 3
#else
#define PAIRS_LOW 0, 4, 1, 5
#define PAIRS_HIGH 2, 6, 3, 7
#define FOURS_LOW 0, 1, 4, 5
#define FOURS_HIGH 2, 3, 6, 7
#define SWAP_1 1, 0, 3, 2
#define SWAP_2 2, 3, 0, 1
#endif

/* Stores the sums of four vectors, times a factor, as four floats. */
INLINE void store_sums(float *out, float factor, vf a, vf b, vf c, vf d)
{
    vf ab = SHUFFLE(a, b, PAIRS_LOW) + SHUFFLE(a, b, PAIRS_HIGH);
    vf cd = SHUFFLE(c, d, PAIRS_LOW) + SHUFFLE(c, d, PAIRS_HIGH);
    vf sums = SHUFFLE(ab, cd, FOURS_LOW) + SHUFFLE(ab, cd, FOURS_HIGH);
#if W >= 8
    sums += SHUFFLE(sums, sums, SWAP_4);
#endif
#if W >= 16
    sums += SHUFFLE(sums, sums, SWAP_8);
#endif
    sums *= factor;
    memcpy(out, &sums, 4 * sizeof(float));
}

INLINE float largest(vf x)
{
#if W >= 16
    x = larger(x, SHUFFLE(x, x, SWAP_8));
#endif
#if W >= 8
    x = larger(x, SHUFFLE(x, x, SWAP_4));
#endif
    x = larger(x, SHUFFLE(x, x, SWAP_2));
    x = larger(x, SHUFFLE(x, x, SWAP_1));
    return x[0];
}

INLINE float sum(vf x)
{
#if W >= 16
    x += SHUFFLE(x, x, SWAP_8);
#endif
#if W >= 8
    x += SHUFFLE(x, x, SWAP_4);
#endif
    x += SHUFFLE(x, x, SWAP_2);
    x += SHUFFLE(x, x, SWAP_1);
    return x[0];
}

/* e^x for x <= 88, to about 1 ulp; 0 below -87.3, where the result would be subnormal; NaN stays NaN. The reduction
 * (ln 2 in two parts) and the polynomial are those of expf in S. Moshier's Cephes library. */
INLINE vf exponential(vf x)
{
    const vf magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer, in the low bits */
    vi vanishes = x < splat(-87.3365f);
    vf shifted = fma_(x, splat(1.44269504088896341f), magic);
    vf n = shifted - magic;
    vf r = fma_(n, splat(-0.693359375f), x);
    r = fma_(n, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = fma_(p, r, splat(1.3981999507e-3f));
    p = fma_(p, r, splat(8.3334519073e-3f));
    p = fma_(p, r, splat(4.1665795894e-2f));
    p = fma_(p, r, splat(1.6666665459e-1f));
    p = fma_(p, r, splat(5.0000001201e-1f));
    p = fma_(p, r * r, r) + 1.0f;
    vf power = (vf)(((vu)shifted << 23) + 0x3f800000u);
    return (vf)(~vanishes & (vi)(p * power));
}

/* e^(x - reference), where both may be -infinity: that is a weight of 0. */
INLINE float scale_from(float x, float reference) { return exponential(splat(x - reference))[0]; }

/* tanh, by Cephes' tanhf: a polynomial below 0.625, above it 1 - 2 / (e^2x + 1). NaN stays NaN. */
INLINE vf hyperbolic_tangent(vf x)
{
    vf size = (vf)((vu)x & 0x7fffffffu);
    vf z = x * x;
    vf p = splat(-5.70498872745e-3f);
    p = fma_(p, z, splat(2.06390887954e-2f));
    p = fma_(p, z, splat(-5.37397155531e-2f));
    p = fma_(p, z, splat(1.33314422036e-1f));
    p = fma_(p, z, splat(-3.33332819422e-1f));
    vf small = fma_(p * z, x, x);
    vf bounded = choose(size > splat(10.0f), splat(10.0f), size);
    vf large = 1.0f - 2.0f / (exponential(bounded + bounded) + 1.0f);
    large = (vf)((vu)large | ((vu)x & 0x80000000u));
    return choose(size < splat(0.625f), small, large);
}

/* ---- dtypes -------------------------------------------------------------------------------------------------- */

enum { FLOAT32, BFLOAT16, FLOAT16 };

#if defined(__F16C__)
#define HAS_FLOAT16 1
INLINE float half_to_float(uint16_t x) { return _cvtsh_ss(x); }
INLINE uint16_t float_to_half(float x) { return _cvtss_sh(x, 0); }
#if W == 16
INLINE vf load_halves(const char *p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
#else
INLINE vf load_halves(const char *p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
#endif
#elif defined(__aarch64__)
#define HAS_FLOAT16 1
INLINE float half_to_float(uint16_t x) { __fp16 h; memcpy(&h, &x, 2); return h; }
INLINE uint16_t float_to_half(float x) { __fp16 h = x; uint16_t u; memcpy(&u, &h, 2); return u; }
INLINE vf load_halves(const char *p) { return (vf)vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8((const uint8_t *)p))); }
#else
#define HAS_FLOAT16 0 /* models/attention/compiled_library.py then refuses float16 */
INLINE float half_to_float(uint16_t x) { (void)x; return NAN; }
INLINE uint16_t float_to_half(float x) { (void)x; return 0x7e00; }
INLINE vf load_halves(const char *p) { (void)p; return splat(NAN); }
#endif

INLINE int64_t size_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

/* Rounds to nearest even, in the high half of each word; NaN stays NaN. */
INLINE vu round_to_bfloat16(vf x)
{
    vu bits = (vu)x;
    vu rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    vu unordered = (vu)(x != x);
    return (unordered & (bits | 0x00400000u)) | (~unordered & rounded);
}

INLINE float get(int dtype, const char *row, int64_t i)
{
    if (dtype == FLOAT32) {
        float x;
        memcpy(&x, row + 4 * i, 4);
        return x;
    }
    uint16_t bits;
    memcpy(&bits, row + 2 * i, 2);
    if (dtype == FLOAT16)
        return half_to_float(bits);
    uint32_t word = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &word, 4);
    return x;
}

INLINE void put(int dtype, char *row, int64_t i, float x)
{
    if (dtype == FLOAT32) {
        memcpy(row + 4 * i, &x, 4);
        return;
    }
    uint16_t bits = dtype == FLOAT16 ? float_to_half(x) : (uint16_t)(round_to_bfloat16(splat(x))[0] >> 16);
    memcpy(row + 2 * i, &bits, 2);
}

/* How the elements of one head are laid out in vectors. */
typedef struct {
    int dtype;
    int direct;      /* whole vectors only, which can be read in place */
    int64_t dim;
    int64_t vectors; /* dim / W, rounded up */
} Row;

static Row row_of(int dtype, int64_t dim)
{
    int64_t unit = dtype == BFLOAT16 ? 2 * W : W;
    return (Row){dtype, dim % unit == 0, dim, (dim + W - 1) / W};
}

/* Returns vector j of a row; in bfloat16, even j are the low halves of words and odd j the high halves. */
INLINE vf row_vector(const int dtype, const char *row, int64_t j)
{
    if (dtype == FLOAT32)
        return load((const float *)(row + j * 4 * W));
    if (dtype == FLOAT16)
        return load_halves(row + j * 2 * W);
    vu words = *(const vu_memory *)(row + j / 2 * 4 * W);
    return (vf)(j % 2 ? words & 0xffff0000u : words << 16);
}

/* Converts a row to floats in vector order, with zeros past its end. */
static void unpack(Row row, const char *from, float *to)
{
    if (row.direct && row.dtype == BFLOAT16) {
        for (int64_t j = 0; j < row.vectors; j += 2) {
            store(to + j * W, row_vector(BFLOAT16, from, j));
            store(to + (j + 1) * W, row_vector(BFLOAT16, from, j + 1));
        }
    } else if (row.direct && row.dtype == FLOAT16) {
        for (int64_t j = 0; j < row.vectors; j++)
            store(to + j * W, row_vector(FLOAT16, from, j));
    } else if (row.direct) {
        memcpy(to, from, (size_t)row.dim * 4);
    } else {
        for (int64_t i = 0; i < row.dim; i++)
            to[i] = get(row.dtype, from, i);
        for (int64_t i = row.dim; i < row.vectors * W; i++)
            to[i] = 0;
    }
}

/* Converts floats in vector order, times `factor`, to a row. */
static void pack(Row row, const float *from, float factor, char *to)
{
    vf by = splat(factor);
    if (row.direct && row.dtype == BFLOAT16) {
        for (int64_t j = 0; j < row.vectors; j += 2) {
            vu low = round_to_bfloat16(load(from + j * W) * by), high = round_to_bfloat16(load(from + j * W + W) * by);
            *(vu_memory *)(to + j * 2 * W) = (low >> 16) | (high & 0xffff0000u);
        }
    } else if (row.direct && row.dtype == FLOAT32) {
        for (int64_t j = 0; j < row.vectors; j++)
            store((float *)(to + j * 4 * W), load(from + j * W) * by);
    } else {
        for (int64_t i = 0; i < row.dim; i++)
            put(row.dtype, to, i, from[i] * factor);
    }
}

/* Packs rows of bfloat16 keys and values into the tiles of bfloat16_products.h.
 *
 * A tile of keys has 16 keys as columns and 32 dims as terms. A tile of values has 16 dims as columns and 32 positions
 * as terms; of 32 dims the even ones are the columns of one tile and the odd ones those of the next, which is the
 * element order of `vectors.h`.
 */
#pragma once
#include "bfloat16_products.h"

#if HAS_BFLOAT16_PRODUCTS

/* Loads up to 32 elements; the rest are 0. */
INLINE __m512i load_some(const char *from, int64_t count)
{
    __mmask32 some = count >= 32 ? 0xffffffffu : count > 0 ? (1u << count) - 1 : 0;
    return _mm512_maskz_loadu_epi16(some, from);
}

/* Software prefetch of rows that are read next, one for each row that is read now: pages are scattered in memory, so
 * the hardware cannot predict them. */
typedef struct {
    const char *const *rows; /* as many as are read now; NULL: none */
    int64_t offset;
} Fetch;

/* Into the second cache: in the first it would displace what is read now. */
INLINE void fetch(const Fetch *next, int64_t row, int64_t byte)
{
    __builtin_prefetch(next->rows[row] + next->offset + byte, 0, 2);
}

/* Transposes 16 rows of words: `to` [columns, 16], `stride` bytes from one column to the next; whole fours of columns
 * are read, and no more than `columns` written. */
INLINE void transpose(const char *const from[16], int64_t columns, char *to, int64_t stride)
{
    for (int64_t c = 0; c < columns; c += 4, to += 4 * stride) {
        __m512i q[4], r[4]; /* q[j]: the four columns of rows j, j + 4, j + 8 and j + 12 */
        UNROLL for (int j = 0; j < 4; j++) {
            q[j] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(from[j] + 4 * c)));
            q[j] = _mm512_inserti32x4(q[j], _mm_loadu_si128((const __m128i *)(from[j + 4] + 4 * c)), 1);
            q[j] = _mm512_inserti32x4(q[j], _mm_loadu_si128((const __m128i *)(from[j + 8] + 4 * c)), 2);
            q[j] = _mm512_inserti32x4(q[j], _mm_loadu_si128((const __m128i *)(from[j + 12] + 4 * c)), 3);
        }
        __m512i ab_low = _mm512_unpacklo_epi32(q[0], q[1]), ab_high = _mm512_unpackhi_epi32(q[0], q[1]);
        __m512i cd_low = _mm512_unpacklo_epi32(q[2], q[3]), cd_high = _mm512_unpackhi_epi32(q[2], q[3]);
        r[0] = _mm512_unpacklo_epi64(ab_low, cd_low), r[1] = _mm512_unpackhi_epi64(ab_low, cd_low);
        r[2] = _mm512_unpacklo_epi64(ab_high, cd_high), r[3] = _mm512_unpackhi_epi64(ab_high, cd_high);
        UNROLL for (int i = 0; i < 4; i++)
            if (c + i < columns)
                _mm512_storeu_si512(to + i * stride, r[i]);
    }
}

/* Packs 16 keys at rows[0..16) + offset, of `dim` dims, into tiles [steps of 32 dims]. */
static void pack_keys(const char *const *rows, int64_t offset, int64_t dim, char *to, Fetch next)
{
    const char *from[16];
    char copies[16][64];
    for (int64_t first = 0; first < dim; first += 32, to += TILE_BYTES) {
        for (int i = 0; i < 16; i++) {
            from[i] = rows[i] + offset + 2 * first;
            if (dim - first < 32) {
                _mm512_storeu_si512(copies[i], load_some(from[i], dim - first));
                from[i] = copies[i];
            }
        }
        for (int i = 0; i < 16 && next.rows; i++)
            fetch(&next, i, 2 * first);
        transpose(from, 16, to, 64);
    }
}

/* Packs 32 values of 32 * steps dims; see `pack_values`. */
INLINE void pack_whole_values(const int64_t steps, const char *const *rows, int64_t offset, char *out, const Fetch *next)
{
    const __mmask32 odd = 0xaaaaaaaau;
    for (int64_t pair = 0; pair < 16; pair++, out += 64) {
        const char *a = rows[2 * pair] + offset, *b = rows[2 * pair + 1] + offset;
        UNROLL for (int64_t step = 0; step < steps; step++) {
            __m512i low = _mm512_loadu_si512(a + step * 64), high = _mm512_loadu_si512(b + step * 64);
            char *tile = out + 2 * step * TILE_BYTES;
            _mm512_storeu_si512(tile, _mm512_mask_blend_epi16(odd, low, _mm512_slli_epi32(high, 16)));
            _mm512_storeu_si512(tile + TILE_BYTES, _mm512_mask_blend_epi16(odd, _mm512_srli_epi32(low, 16), high));
        }
        for (int64_t step = 0; step < steps && next->rows; step++) {
            fetch(next, 2 * pair, step * 64);
            fetch(next, 2 * pair + 1, step * 64);
        }
    }
}

/* Packs the values at rows[0..32) + offset, of `dim` dims, into tiles [dims / 32, even or odd]. Rows outside
 * [from, to) become 0, whatever they hold. */
static void pack_values(const char *const *rows, int64_t offset, int64_t dim, int64_t from, int64_t to, char *out,
                        Fetch next)
{
    const __mmask32 odd = 0xaaaaaaaau;
    int64_t steps = (dim + 31) / 32;
    if (from <= 0 && to >= 32 && (dim == 64 || dim == 128)) { /* the most common sizes */
        if (dim == 64)
            pack_whole_values(2, rows, offset, out, &next);
        else
            pack_whole_values(4, rows, offset, out, &next);
        return;
    }
    __mmask32 rest = dim % 32 ? (1u << dim % 32) - 1 : 0xffffffffu; /* of the last step */
    for (int64_t pair = 0; pair < 16; pair++) {
        const char *a = rows[2 * pair] + offset, *b = rows[2 * pair + 1] + offset;
        __mmask32 has_a = 2 * pair >= from && 2 * pair < to ? 0xffffffffu : 0;
        __mmask32 has_b = 2 * pair + 1 >= from && 2 * pair + 1 < to ? 0xffffffffu : 0;
        char *tile = out + pair * 64;
        for (int64_t step = 0; step < steps; step++, tile += 2 * TILE_BYTES) {
            __mmask32 some = step + 1 < steps ? 0xffffffffu : rest;
            __m512i low = _mm512_maskz_loadu_epi16(has_a & some, a + step * 64);
            __m512i high = _mm512_maskz_loadu_epi16(has_b & some, b + step * 64);
            _mm512_storeu_si512(tile, _mm512_mask_blend_epi16(odd, low, _mm512_slli_epi32(high, 16)));
            _mm512_storeu_si512(tile + TILE_BYTES, _mm512_mask_blend_epi16(odd, _mm512_srli_epi32(low, 16), high));
            if (next.rows) {
                fetch(&next, 2 * pair, step * 64);
                fetch(&next, 2 * pair + 1, step * 64);
            }
        }
    }
}

/* Writes `dim` elements, times a factor, from the order of the tiles of values. */
static void unpack_sums(const float *from, float factor, int64_t dim, char *to)
{
    vf by = splat(factor);
    for (int64_t first = 0; first < dim; first += 32, from += 32, to += 64) {
        vu low = round_to_bfloat16(load(from) * by), high = round_to_bfloat16(load(from + 16) * by);
        __m512i words = (__m512i)((low >> 16) | (high & 0xffff0000u));
        int64_t count = dim - first;
        __mmask32 some = count >= 32 ? 0xffffffffu : (1u << count) - 1;
        _mm512_mask_storeu_epi16(to, some, words);
    }
}

#endif

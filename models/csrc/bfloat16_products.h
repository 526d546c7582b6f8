/* Products of small bfloat16 matrices with float sums: scores of queries and keys, weighted sums of values.
 *
 * The right-hand matrix is packed into tiles of 16 columns and 32 terms of the sum: [16 pairs, 16 columns, 2], 1 KiB,
 * which is what both AMX and `vdpbf16ps` multiply. A sum's terms are added in one order, whichever rows and columns are
 * computed together, so that its bits do not depend on them. AMX and `vdpbf16ps` have different orders.
 */
#pragma once
#include "tile_permission.h"
#include "vectors.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_BFLOAT16_PRODUCTS 1

#define TILE_BYTES 1024
#define TERMS 32         /* of a sum, in a tile */
#define COLUMNS 16       /* of a tile */
#define STRIP 32         /* most rows of a product */

#if HAS_TILES
/* Begins a thread's use of tiles for products of `rows` rows: 0 to 3 are sums and 4 and 5 left-hand rows, 6 and 7 are
 * packed. Below 16 rows, tiles 0 to 4 have that many rows, and the others 16. */
static void begin_products(int64_t rows)
{
    if (!tiles_permitted())
        return;
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int tile = 0; tile < 8; tile++)
        shape.bytes[tile] = 64, shape.rows[tile] = tile < 5 && rows < 16 ? (uint8_t)rows : 16;
    __asm__ volatile("" : : "m"(shape));
    _tile_loadconfig(&shape);
}

static void end_products(void)
{
    if (tiles_permitted())
        _tile_release();
}

/* The compiler does not know which memory tile loads read. */
#define MEMORY_IS_WRITTEN __asm__ volatile("" ::: "memory")

/* See `score_keys`; `two`: more than 16 rows. */
INLINE void score_tiles(const int two, int64_t steps, const char *q, int64_t row_bytes, const char *keys,
                        int64_t tiles, float *out, int64_t stride)
{
    for (int64_t t = 0; t < tiles; t += 2) {
        _tile_zero(0);
        _tile_zero(1);
        if (two) {
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int64_t step = 0; step < steps; step++) {
            _tile_loadd(4, q + step * 64, row_bytes);
            _tile_loadd(6, keys + (t * steps + step) * TILE_BYTES, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, keys + ((t + 1) * steps + step) * TILE_BYTES, 64);
            _tile_dpbf16ps(1, 4, 7);
            if (two) {
                _tile_loadd(5, q + 16 * row_bytes + step * 64, row_bytes);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, out + t * COLUMNS, stride * 4);
        _tile_stored(1, out + (t + 1) * COLUMNS, stride * 4);
        if (two) {
            _tile_stored(2, out + 16 * stride + t * COLUMNS, stride * 4);
            _tile_stored(3, out + 16 * stride + (t + 1) * COLUMNS, stride * 4);
        }
    }
}

/* See `add_values_of`. */
INLINE void value_tiles(const int two, int64_t steps, const char *weights, int64_t row_bytes, const char *values,
                        int64_t tiles, float *out, int64_t stride, int add)
{
    for (int64_t t = 0; t < tiles; t += 2) {
        float *low = out + t * COLUMNS, *high = low + 16 * stride;
        if (add) {
            _tile_loadd(0, low, stride * 4);
            _tile_loadd(1, low + COLUMNS, stride * 4);
        } else {
            _tile_zero(0);
            _tile_zero(1);
        }
        if (two && add) {
            _tile_loadd(2, high, stride * 4);
            _tile_loadd(3, high + COLUMNS, stride * 4);
        } else if (two) {
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int64_t step = 0; step < steps; step++) {
            _tile_loadd(4, weights + step * 64, row_bytes);
            _tile_loadd(6, values + (step * tiles + t) * TILE_BYTES, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, values + (step * tiles + t + 1) * TILE_BYTES, 64);
            _tile_dpbf16ps(1, 4, 7);
            if (two) {
                _tile_loadd(5, weights + 16 * row_bytes + step * 64, row_bytes);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, low, stride * 4);
        _tile_stored(1, low + COLUMNS, stride * 4);
        if (two) {
            _tile_stored(2, high, stride * 4);
            _tile_stored(3, high + COLUMNS, stride * 4);
        }
    }
}
#else
INLINE void begin_products(int64_t rows) { (void)rows; }
INLINE void end_products(void) {}
#endif

#define DOT_ROWS 6 /* rows x 4 sums, a vector of each packed tile and one of a row fit into 32 registers */

/* sums[r][i] += the products of a tile's terms, for `rows` rows and `count` tiles that lie `apart` bytes apart. */
INLINE void dot_tile(const int rows, const int count, const char *left, int64_t row_bytes, const char *right,
                     int64_t apart, vf sums[DOT_ROWS][4])
{
    for (int pair = 0; pair < 16; pair++) {
        __m512bh column[4];
        UNROLL for (int i = 0; i < count; i++)
            column[i] = (__m512bh)_mm512_loadu_si512(right + i * apart + pair * 64);
        UNROLL for (int r = 0; r < rows; r++) {
            int32_t two;
            memcpy(&two, left + r * row_bytes + pair * 4, 4);
            __m512bh row = (__m512bh)_mm512_set1_epi32(two);
            UNROLL for (int i = 0; i < count; i++)
                sums[r][i] = (vf)_mm512_dpbf16_ps((__m512)sums[r][i], row, column[i]);
        }
    }
}

/* out [rows, 16 * count] = or += left [rows, 32 * steps] times the tiles. */
INLINE void dot_block(const int rows, const int count, int64_t steps, const char *left, int64_t row_bytes,
                      const char *right, int64_t apart, int64_t step_bytes, float *out, int64_t stride, int add)
{
    vf sums[DOT_ROWS][4];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int i = 0; i < count; i++)
            sums[r][i] = add ? load(out + r * stride + i * COLUMNS) : (vf){0};
    for (int64_t step = 0; step < steps; step++)
        dot_tile(rows, count, left + step * 64, row_bytes, right + step * step_bytes, apart, sums);
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int i = 0; i < count; i++)
            store(out + r * stride + i * COLUMNS, sums[r][i]);
}

/* Each number of rows has a function of its own: one with all of them takes a compiler several times as long. */
#define DOT_ROWS_OF(rows)                                                                                              \
    static __attribute__((noinline)) void dot_rows_##rows(                                                             \
        int64_t steps, const char *left, int64_t row_bytes, const char *right, int64_t apart, int64_t step_bytes,      \
        int64_t tiles, float *out, int64_t stride, int add)                                                            \
    {                                                                                                                  \
        int64_t t = 0;                                                                                                 \
        for (; t + 4 <= tiles; t += 4)                                                                                 \
            dot_block(rows, 4, steps, left, row_bytes, right + t * apart, apart, step_bytes, out + t * COLUMNS, stride, \
                      add);                                                                                            \
        for (; t < tiles; t += 2)                                                                                      \
            dot_block(rows, 2, steps, left, row_bytes, right + t * apart, apart, step_bytes, out + t * COLUMNS, stride, \
                      add);                                                                                            \
    }
DOT_ROWS_OF(1) DOT_ROWS_OF(2) DOT_ROWS_OF(3) DOT_ROWS_OF(4) DOT_ROWS_OF(5) DOT_ROWS_OF(6)

static void dot_products(int64_t rows, int64_t steps, const char *left, int64_t row_bytes, const char *right,
                         int64_t apart, int64_t step_bytes, int64_t tiles, float *out, int64_t stride, int add)
{
    int64_t blocks = (rows + DOT_ROWS - 1) / DOT_ROWS;
    for (int64_t block = 0; block < blocks; block++) {
        int64_t row = rows * block / blocks, count = rows * (block + 1) / blocks - row;
        const char *from = left + row * row_bytes;
        float *to = out + row * stride;
#define DOT_CASE(n) case n: dot_rows_##n(steps, from, row_bytes, right, apart, step_bytes, tiles, to, stride, add); break;
        switch (count) { DOT_CASE(1) DOT_CASE(2) DOT_CASE(3) DOT_CASE(4) DOT_CASE(5) DOT_CASE(6) }
#undef DOT_CASE
    }
}

/* out [rows, tiles * 16] = queries [rows, steps * 32] times keys.
 *
 * `keys` are tiles [tiles, steps], `tiles` is even, `rows` at most STRIP; `stride` counts floats. With AMX, as many rows
 * are read and written as `begin_products` was told, or twice as many for more than 16 rows. */
static __attribute__((noinline)) void score_keys(int64_t rows, int64_t steps, const char *q, int64_t row_bytes,
                                                 const char *keys, int64_t tiles, float *out, int64_t stride)
{
#if HAS_TILES
    if (tiles_permitted()) {
        MEMORY_IS_WRITTEN;
        if (rows > 16)
            score_tiles(1, steps, q, row_bytes, keys, tiles, out, stride);
        else
            score_tiles(0, steps, q, row_bytes, keys, tiles, out, stride);
        return;
    }
#endif
    dot_products(rows, steps, q, row_bytes, keys, steps * TILE_BYTES, TILE_BYTES, tiles, out, stride, 0);
}

/* out [rows, tiles * 16] = weights [rows, steps * 32] times values, or += with `add`.
 *
 * `values` are tiles [steps, tiles]; the rest as for `score_keys`. */
static __attribute__((noinline)) void add_values_of(int64_t rows, int64_t steps, const char *weights, int64_t row_bytes,
                                                    const char *values, int64_t tiles, float *out, int64_t stride,
                                                    int add)
{
#if HAS_TILES
    if (tiles_permitted()) {
        MEMORY_IS_WRITTEN;
        if (rows > 16)
            value_tiles(1, steps, weights, row_bytes, values, tiles, out, stride, add);
        else
            value_tiles(0, steps, weights, row_bytes, values, tiles, out, stride, add);
        return;
    }
#endif
    dot_products(rows, steps, weights, row_bytes, values, TILE_BYTES, tiles * TILE_BYTES, tiles, out, stride, add);
}

#else
#define HAS_BFLOAT16_PRODUCTS 0
#endif

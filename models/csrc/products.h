/* Products with packed weights: out = x weight^T + bias, of float32 or bfloat16.
 *
 * The order of the sum over the inputs of an output is one and the same for every number of rows, every place of a row
 * among them and every cut into tasks, so a row's bits depend on none of these. Sums are float32, rounded once.
 *
 * Packed weights. Inputs are taken in words of 4 bytes: one float32, or two neighbours in bfloat16. W outputs x DEPTH
 * words form a block: DEPTH vectors of one word of each output. A panel is two blocks wide; its blocks are in the order
 * in which kernels read them: [words / DEPTH][2][DEPTH][W]. The last panel is one block wide if that suffices. What is
 * past the last output or input is zero. With 16 lanes, a bfloat16 block is a B tile of AMX.
 */
#pragma once
#include "products_call.h"
#include "vectors.h"

#define DEPTH 16                           /* words */
#define BLOCK_BYTES (DEPTH * 4 * W)
#define PANEL (2 * W)                      /* outputs */

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
INLINE int64_t words_of(int64_t dtype, int64_t inputs) { return dtype == FLOAT32 ? inputs : (inputs + 1) / 2; }
/* Bytes of a panel's half. */
INLINE int64_t half_bytes(int64_t dtype, int64_t inputs)
{
    return parts_of(words_of(dtype, inputs), DEPTH) * BLOCK_BYTES;
}

/* ---- packing ------------------------------------------------------------------------------------------------- */

static int64_t packed_bytes(int64_t dtype, int64_t outputs, int64_t inputs)
{
    return parts_of(outputs, W) * half_bytes(dtype, inputs);
}

#if W == 16
/* Transposes 16 x 16 words, by exchanging halves, quarters and so on of pairs of rows. */
static void transpose_block(const char *rows, int64_t row_bytes, char *to)
{
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i second = _mm512_set1_epi32(16); /* lanes of the second operand */
    __m512i r[16];
    UNROLL
    for (int i = 0; i < 16; i++)
        r[i] = _mm512_loadu_si512(rows + i * row_bytes);
    UNROLL
    for (int d = 1; d < 16; d *= 2) {
        __mmask16 odd = _mm512_test_epi32_mask(lanes, _mm512_set1_epi32(d));
        __m512i swapped = _mm512_xor_si512(lanes, _mm512_set1_epi32(d));
        __m512i low = _mm512_mask_or_epi32(lanes, odd, swapped, second);
        __m512i high = _mm512_mask_or_epi32(swapped, odd, lanes, second);
        UNROLL
        for (int i = 0; i < 16; i++) {
            if (i & d)
                continue;
            __m512i a = r[i], b = r[i + d];
            r[i] = _mm512_permutex2var_epi32(a, low, b);
            r[i + d] = _mm512_permutex2var_epi32(a, high, b);
        }
    }
    UNROLL
    for (int i = 0; i < 16; i++)
        _mm512_storeu_si512(to + 64 * i, r[i]);
}
#endif

/* Packs one panel of a weight [outputs, inputs], whose rows are `row_bytes` apart and contiguous. */
static void pack_panel(int64_t dtype, int64_t outputs, int64_t inputs, const char *weight, int64_t row_bytes,
                       char *packed, int64_t panel)
{
    int64_t first = panel * PANEL, row_size = inputs * (dtype == FLOAT32 ? 4 : 2), words = words_of(dtype, inputs);
    int64_t halves = outputs - first > W ? 2 : 1;
    packed += panel * 2 * half_bytes(dtype, inputs);
    for (int64_t word = 0; word < words; word += DEPTH) {
        for (int64_t half = 0; half < halves; half++) {
            uint32_t block[DEPTH][W] = {{0}};
            int64_t size = least(row_size - 4 * word, 4 * DEPTH), lanes = least(outputs - first - half * W, W);
#if W == 16
            if (size == 4 * DEPTH && lanes == W) {
                transpose_block(weight + (first + half * W) * row_bytes + 4 * word, row_bytes, packed);
                packed += sizeof block;
                continue;
            }
#endif
            for (int64_t i = 0; i < lanes; i++) {
                uint32_t row[DEPTH] = {0};
                memcpy(row, weight + (first + half * W + i) * row_bytes + 4 * word, (size_t)size);
                for (int64_t j = 0; j < DEPTH; j++)
                    block[j][i] = row[j];
            }
            memcpy(packed, block, sizeof block);
            packed += sizeof block;
        }
    }
}

/* ---- tasks --------------------------------------------------------------------------------------------------- */

#include "products_part.h"
#include "products_tiles.h"
#include "products_vectors.h"

/* Part of a core's cache for what a task reads again: rows of x in tiles, the weight's panels in vectors. */
#define KEPT_BYTES (768 << 10)
/* Limits to the rows of a task. */
#define LEAST_ROWS 128
#define MOST_ROWS 512
/* Threads take tasks as they come, so the last ones to end differ by one task. */
#define TASKS_OF_A_THREAD 6

INLINE int by_tiles(const Product *p)
{
    return p->dtype == BFLOAT16 && tiles_permitted();
}

/* How a product is cut: each task computes the outputs of some panels for some rows. */
typedef struct {
    int64_t rows, panels; /* of a task */
    int64_t row_parts, panel_parts;
} Cut;

static Cut cut_product(const Product *p, int64_t rows, int64_t threads)
{
    int64_t panels = parts_of(p->outputs, PANEL), row_bytes = p->inputs * size_of((int)p->dtype) + 1;
    int64_t most_rows = MOST_ROWS, most_panels = panels;
    if (by_tiles(p)) {
        most_rows = least(KEPT_BYTES / row_bytes / 32 * 32, MOST_ROWS);
        most_rows = most_rows < LEAST_ROWS ? LEAST_ROWS : most_rows;
    } else {
        most_panels = KEPT_BYTES / (PANEL * row_bytes);
    }
    int64_t row_parts = parts_of(rows, most_rows), wanted = threads > 1 ? TASKS_OF_A_THREAD * threads : 1;
    if (!row_parts)
        return (Cut){0, panels, 0, 1};
    int64_t part_rows = parts_of(parts_of(rows, row_parts), 32) * 32;
    int64_t part_panels = least(most_panels, parts_of(panels * row_parts, wanted));
    part_panels = part_panels < 1 ? 1 : part_panels;
    return (Cut){part_rows, part_panels, parts_of(rows, part_rows), parts_of(panels, part_panels)};
}

/* Returns the number of independent tasks that compute `rows` rows; any thread may run any, in any order. */
static int64_t product_tasks(const Product *p, int64_t rows, int64_t threads)
{
    Cut cut = cut_product(p, rows, threads);
    return cut.row_parts * cut.panel_parts;
}

/* Returns the bytes of working memory of a thread. */
static int64_t product_scratch_bytes(const Product *p, int64_t rows)
{
    (void)rows;
#if HAS_TILES
    if (by_tiles(p))
        return tiles_scratch_bytes(p, least(rows, MOST_ROWS));
#endif
    return vectors_scratch_bytes(p);
}

/* Runs one of `product_tasks`: writes some outputs of some rows. Rows of x and out are contiguous, and any number of
 * bytes apart. `scratch`: at least `product_scratch_bytes`, aligned to 64, of this thread. */
static void product_task(const Product *p, int64_t rows, const char *x, int64_t x_row_bytes, char *out,
                         int64_t out_row_bytes, int64_t task, int64_t threads, char *scratch)
{
    Cut cut = cut_product(p, rows, threads);
    int64_t row = task / cut.panel_parts * cut.rows, panel = task % cut.panel_parts * cut.panels;
    Part part = {
        .product = p,
        .first = panel,
        .last = least(panel + cut.panels, parts_of(p->outputs, PANEL)),
        .rows = least(rows - row, cut.rows),
        .x = x + row * x_row_bytes,
        .x_row_bytes = x_row_bytes,
        .out = out + row * out_row_bytes,
        .out_row_bytes = out_row_bytes,
        .scratch = scratch,
    };
#if HAS_TILES
    if (by_tiles(p)) {
        tiles_part(&part);
        return;
    }
#endif
    vectors_part(&part);
}

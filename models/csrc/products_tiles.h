/* Products in bfloat16 by AMX tiles: 16 rows x 32 inputs of x times a block of the weight, summed in 16 x 16 tiles.
 *
 * Two by two tiles of sums share what is loaded. Tiles have 16 rows each, or as many as there are in all. Where the
 * number of rows is no multiple, the last tile overlaps with the one before: some rows are computed twice, alike.
 */
#include "tile_permission.h"

#if HAS_TILES
#define TILE_HEIGHT 16
#define TILE_INPUTS (2 * DEPTH)
/* Most bytes of the weight that are fetched before their use. */
#define TILES_FETCHED_AHEAD 4096
#define SUMS_BYTES (2 * TILE_HEIGHT * PANEL * 4)

static void configure_tiles(int64_t rows)
{
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config __attribute__((aligned(64)));
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; i++) {
        config.bytes[i] = 64;
        config.rows[i] = i < 6 ? (uint8_t)rows : TILE_HEIGHT;
    }
    _tile_loadconfig(&config);
}

static int64_t tiles_scratch_bytes(const Product *p, int64_t rows)
{
    return SUMS_BYTES + (p->inputs % TILE_INPUTS ? rows * 64 : 0);
}

/* Multiplies one or two tiles of rows, at x and `second` bytes behind it, with one or two blocks per 32 inputs. */
INLINE void multiply_tiles(const int tall, const int wide, const char *weight, const char *x, int64_t second,
                           int64_t x_row_bytes, int64_t tiles, const char *ahead, int64_t lines)
{
    for (int64_t tile = 0; tile < tiles; tile++) {
        _tile_loadd(4, x, x_row_bytes);
        _tile_loadd(6, weight, 64);
        if (wide)
            _tile_loadd(7, weight + BLOCK_BYTES, 64);
        if (tall)
            _tile_loadd(5, x + second, x_row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if (wide)
            _tile_dpbf16ps(1, 4, 7);
        if (tall)
            _tile_dpbf16ps(2, 5, 6);
        if (tall && wide)
            _tile_dpbf16ps(3, 5, 7);
        for (int64_t line = 0; line < lines; line++)
            _mm_prefetch(ahead + 64 * line, _MM_HINT_T0);
        ahead += 64 * lines;
        weight += wide ? 2 * BLOCK_BYTES : BLOCK_BYTES;
        x += 64;
    }
}

/* Computes the outputs of a panel for one or two tiles of rows. */
INLINE void tiles_block(const int tall, const int wide, const Part *part, int64_t panel, int64_t rows, int64_t row,
                        int64_t second, const char *ahead, int64_t lines)
{
    const Product *p = part->product;
    const char *weight = p->weight + panel * 2 * half_bytes(BFLOAT16, p->inputs);
    const char *x = part->x + row * part->x_row_bytes, *tails = part->scratch + SUMS_BYTES + row * 64;
    int64_t tiles = p->inputs / TILE_INPUTS;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    multiply_tiles(tall, wide, weight, x, second * part->x_row_bytes, part->x_row_bytes, tiles, ahead, lines);
    if (p->inputs % TILE_INPUTS)
        multiply_tiles(tall, wide, weight + tiles * (wide ? 2 : 1) * BLOCK_BYTES, tails, second * 64, 64, 1, ahead, 0);
    float *sums = (float *)part->scratch;
    _tile_stored(0, sums, PANEL * 4);
    if (wide)
        _tile_stored(1, sums + W, PANEL * 4);
    if (tall) {
        _tile_stored(2, sums + TILE_HEIGHT * PANEL, PANEL * 4);
        if (wide)
            _tile_stored(3, sums + TILE_HEIGHT * PANEL + W, PANEL * 4);
    }
    Outputs outputs = outputs_of(p, panel);
    for (int t = 0; t <= tall; t++) {
        char *out = part->out + (row + t * second) * part->out_row_bytes;
        for (int64_t r = 0; r < rows; r++, out += part->out_row_bytes, sums += PANEL)
            store_outputs(BFLOAT16, &outputs, out, load(sums), wide ? load(sums + W) : splat(0));
    }
}

/* Computes the outputs of a panel for up to two tiles of rows, from `row` on. */
static void tiles_rows(const Part *part, int64_t panel, int64_t rows, int64_t row, const char *ahead, int64_t lines)
{
    int wide = part->product->outputs - panel * PANEL > W;
    int64_t left = part->rows - row, second = least(TILE_HEIGHT, left - TILE_HEIGHT);
    if (left > TILE_HEIGHT && wide) {
        tiles_block(1, 1, part, panel, rows, row, second, ahead, lines);
    } else if (left > TILE_HEIGHT) {
        tiles_block(1, 0, part, panel, rows, row, second, ahead, lines);
    } else {
        row -= rows - left; /* none, or rows of the tile before */
        if (wide)
            tiles_block(0, 1, part, panel, rows, row, 0, ahead, lines);
        else
            tiles_block(0, 0, part, panel, rows, row, 0, ahead, lines);
    }
}

static void tiles_part(const Part *part)
{
    const Product *p = part->product;
    int64_t rows = least(part->rows, TILE_HEIGHT), tail = p->inputs % TILE_INPUTS;
    int64_t tiles = p->inputs / TILE_INPUTS, blocks = parts_of(part->rows, 2 * TILE_HEIGHT);
    for (int64_t r = 0; tail && r < part->rows; r++) {
        char row[64] = {0};
        memcpy(row, part->x + r * part->x_row_bytes + tiles * 64, (size_t)tail * 2);
        memcpy(part->scratch + SUMS_BYTES + r * 64, row, 64);
    }
    __asm__ volatile("" ::: "memory"); /* compilers do not know that tiles are loaded from memory */
    configure_tiles(rows);
    for (int64_t panel = part->first; panel < part->last; panel++) {
        /* Each block of rows fetches its share of the next panel. */
        int64_t lines = parts_of(2 * BLOCK_BYTES / 64, blocks), bytes = 2 * half_bytes(BFLOAT16, p->inputs);
        const char *ahead = p->weight + panel * bytes + (blocks > 1 ? bytes : least(bytes, TILES_FETCHED_AHEAD));
        for (int64_t row = 0; row < part->rows; row += 2 * TILE_HEIGHT) {
            tiles_rows(part, panel, rows, row, ahead, lines);
            ahead += tiles * lines * 64;
        }
    }
    _tile_release();
}
#endif

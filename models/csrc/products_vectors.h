/* Products by vectors: each number of x is multiplied with two vectors of the weight, one output a lane.
 *
 * float32 takes fused multiply-adds; bfloat16 takes dot products of pairs (AVX512_BF16), or is widened to floats. */

/* Rows whose sums are in registers together: two vectors each, besides two of the weight and one of x. */
#if W == 16 || defined(__aarch64__)
#define ROWS_AT_ONCE 14
#else
#define ROWS_AT_ONCE 6
#endif

/* How far ahead of its use the weight is fetched, in bytes. */
#define FETCHED_AHEAD 8192

/* How words are multiplied. Of pairs that are widened, x is floats in memory. */
enum { FLOATS, PAIRS, WIDENED_PAIRS };

#if defined(__AVX512BF16__) && W == 16
#define PAIRS_KIND PAIRS
#else
#define PAIRS_KIND WIDENED_PAIRS
#endif

/* a.low * b.low + a.high * b.high + c in each lane */
INLINE vf dot_pairs(vu a, vu b, vf c)
{
#if defined(__AVX512BF16__) && W == 16
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
    (void)a, (void)b;
    return c;
#endif
}

/* Bytes of a row of x in working memory, which is a whole number of vectors and does not repeat cache sets. */
INLINE int64_t copied_row_bytes(const Product *p)
{
    return words_of(p->dtype, p->inputs) * (p->dtype == BFLOAT16 && PAIRS_KIND == WIDENED_PAIRS ? 8 : 4) / 64 * 64 + 192;
}

static int64_t vectors_scratch_bytes(const Product *p) { return ROWS_AT_ONCE * copied_row_bytes(p); }

/* Computes the outputs of a panel for `rows` rows of x. */
INLINE void multiply_panel(const int kind, const int rows, const Product *p, int64_t panel, const char *x,
                           int64_t x_row_bytes, char *out, int64_t out_row_bytes)
{
    const int dtype = kind == FLOATS ? FLOAT32 : BFLOAT16, word_bytes = kind == WIDENED_PAIRS ? 8 : 4;
    const char *weight = p->weight + panel * 2 * half_bytes(dtype, p->inputs);
    const char *groups[4] = {x, x + 4 * x_row_bytes, x + 8 * x_row_bytes, x + 12 * x_row_bytes};
    int64_t words = words_of(dtype, p->inputs), halves = p->outputs - panel * PANEL > W ? 2 : 1;
    int64_t second = halves > 1 ? BLOCK_BYTES : 0; /* a single half is computed twice, and stored once */
    vf sums[ROWS_AT_ONCE][2];
    UNROLL
    for (int r = 0; r < rows; r++)
        sums[r][0] = sums[r][1] = splat(0);
    for (int64_t word = 0; word < words; word += DEPTH) {
        int64_t depth = least(words - word, DEPTH);
        for (int64_t k = 0; k < depth; k++) {
            vu a = *(const vu_memory *)(weight + k * 4 * W), b = *(const vu_memory *)(weight + k * 4 * W + second);
            /* Into the second cache: the first has too few misses under way at a time. */
            __builtin_prefetch(weight + k * 4 * W + FETCHED_AHEAD, 0, 2);
            __builtin_prefetch(weight + k * 4 * W + FETCHED_AHEAD + second, 0, 2);
            for (int odd = 0; odd < (kind == WIDENED_PAIRS ? 2 : 1); odd++) {
                vf low = (vf)(kind == FLOATS ? a : odd ? a & 0xffff0000u : a << 16);
                vf high = (vf)(kind == FLOATS ? b : odd ? b & 0xffff0000u : b << 16);
                UNROLL
                for (int r = 0; r < rows; r++) {
                    const char *at = groups[r / 4] + r % 4 * x_row_bytes + word_bytes * k + 4 * odd;
                    if (kind == PAIRS) {
                        uint32_t pair;
                        memcpy(&pair, at, 4);
                        sums[r][0] = dot_pairs(pair - (vu){0}, a, sums[r][0]);
                        sums[r][1] = dot_pairs(pair - (vu){0}, b, sums[r][1]);
                    } else {
                        float number;
                        memcpy(&number, at, 4);
                        sums[r][0] = fma_(splat(number), low, sums[r][0]);
                        sums[r][1] = fma_(splat(number), high, sums[r][1]);
                    }
                }
            }
        }
        weight += halves * BLOCK_BYTES;
        UNROLL
        for (int g = 0; g < 4; g++)
            groups[g] += word_bytes * DEPTH;
    }
    Outputs outputs = outputs_of(p, panel);
    UNROLL
    for (int r = 0; r < rows; r++)
        store_outputs(dtype, &outputs, out + r * out_row_bytes, sums[r][0], sums[r][1]);
}

/* `multiply_panel` for each number of rows. One function with all of them takes a compiler several times as long. */
typedef void Panel(const Product *p, int64_t panel, const char *x, int64_t x_row_bytes, char *out,
                   int64_t out_row_bytes);

#define PANEL_OF(name, kind, rows)                                                                                     \
    static __attribute__((noinline)) void name##_##rows(const Product *p, int64_t panel, const char *x,                \
                                                        int64_t x_row_bytes, char *out, int64_t out_row_bytes)         \
    {                                                                                                                  \
        multiply_panel(kind, rows, p, panel, x, x_row_bytes, out, out_row_bytes);                                      \
    }
#if ROWS_AT_ONCE == 14
#define MORE_PANELS(name, kind)                                                                                        \
    PANEL_OF(name, kind, 7) PANEL_OF(name, kind, 8) PANEL_OF(name, kind, 9) PANEL_OF(name, kind, 10)                   \
    PANEL_OF(name, kind, 11) PANEL_OF(name, kind, 12) PANEL_OF(name, kind, 13) PANEL_OF(name, kind, 14)
#define MORE_NAMES(name) , name##_7, name##_8, name##_9, name##_10, name##_11, name##_12, name##_13, name##_14
#else
#define MORE_PANELS(name, kind)
#define MORE_NAMES(name)
#endif
#define PANELS(name, kind)                                                                                             \
    PANEL_OF(name, kind, 1) PANEL_OF(name, kind, 2) PANEL_OF(name, kind, 3)                                            \
    PANEL_OF(name, kind, 4) PANEL_OF(name, kind, 5) PANEL_OF(name, kind, 6) MORE_PANELS(name, kind)                    \
    static Panel *const name[] = {name##_1, name##_2, name##_3, name##_4, name##_5, name##_6 MORE_NAMES(name)};

PANELS(multiply_floats, FLOATS)
PANELS(multiply_pairs, PAIRS_KIND)

/* Copies a row of x to working memory: widened if need be, and with zeros up to the end of its last word. */
static void copy_row(const Product *p, const char *row, char *to)
{
    if (p->dtype == FLOAT32 || PAIRS_KIND == PAIRS) {
        memset(to + words_of(p->dtype, p->inputs) * 4 - 4, 0, 4);
        memcpy(to, row, (size_t)(p->inputs * size_of((int)p->dtype)));
        return;
    }
    float *floats = (float *)to;
    floats[2 * words_of(BFLOAT16, p->inputs) - 1] = 0;
    for (int64_t i = 0; i < p->inputs; i++)
        floats[i] = get(BFLOAT16, row, i);
}

static void vectors_part(const Part *part)
{
    const Product *p = part->product;
    int widened = p->dtype == BFLOAT16 && PAIRS_KIND == WIDENED_PAIRS, odd = p->dtype == BFLOAT16 && p->inputs % 2;
    /* Rows that are a large power of two apart would evict each other from the cache. */
    int copied = p->inputs && (widened || odd || (part->rows > 4 && part->x_row_bytes % 1024 == 0));
    /* Equal strips: a few rows take nearly as long as some more, since they wait for their own sums. */
    int64_t strips = parts_of(part->rows, ROWS_AT_ONCE);
    for (int64_t strip = 0; strip < strips; strip++) {
        int64_t row = part->rows * strip / strips, rows = part->rows * (strip + 1) / strips - row;
        int64_t stride = part->x_row_bytes;
        const char *x = part->x + row * stride;
        char *out = part->out + row * part->out_row_bytes;
        if (copied) {
            for (int64_t r = 0; r < rows; r++)
                copy_row(p, x + r * stride, part->scratch + r * copied_row_bytes(p));
            x = part->scratch, stride = copied_row_bytes(p);
        }
        Panel *multiply = (p->dtype == FLOAT32 ? multiply_floats : multiply_pairs)[rows - 1];
        for (int64_t panel = part->first; panel < part->last; panel++)
            multiply(p, panel, x, stride, out, part->out_row_bytes);
    }
}

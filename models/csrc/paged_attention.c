/* Attention over paged keys and values on a CPU: what models/attention/compiled.py builds, loads and calls.
 *
 * One call serves one attention site of one forward: it writes the new keys and values into their pages, and lets
 * every new token attend to what its sequence holds, itself included.
 *
 * The result of a token is the same to the bit whatever else is computed with it, because each query goes through a
 * sequence of operations that its position and its span alone decide:
 *   - keys are taken in blocks of BLOCK positions, counted from position 0 of the sequence: scores, running maximum,
 *     weights, weighted sum of values (an online softmax);
 *   - blocks make up chunks of CHUNK positions, each summed on its own and folded into the result in order, so that
 *     different threads may compute the chunks of one long sequence;
 *   - all arithmetic is spelled out: fused multiply-adds are written as such, and the compiler is told to make none of
 *     its own and to reorder nothing.
 * Tiles of queries and heads share loaded keys and values; which rows share a tile changes nothing for any of them.
 * Keys, queries, values and sums stay in the order of `vectors.h`, and only the final store undoes it.
 */
#include "vectors.h"

/* Rows (a query's heads, or several queries' heads) that share one load of a key or value. A tile of ROWS x 4 sums, a
 * vector of each row and one of a key fit the registers: 32 with AVX-512 and on Arm, 16 elsewhere. */
#if defined(__AVX512F__) || defined(__aarch64__)
#define ROWS 6
#else
#define ROWS 3
#endif

/* ---- what is called with ------------------------------------------------------------------------------------- */

enum { FULL, WINDOW, CHUNKED };

/* One forward: `sequences` sequences, each with `starts` tokens in pages already and `lengths` new ones. */
typedef struct {
    int64_t sequences, width, page_size, slab_pages, slabs, tokens;
    const int64_t *tables;  /* [sequences, width] page ids: slab * slab_pages + page in slab */
    const int64_t *starts;  /* [sequences] */
    const int64_t *lengths; /* [sequences] */
    int64_t *offsets;       /* [sequences] each one's first token in the packed forward; made by rollout_prepare */
    int64_t *slots;         /* [tokens] page id * page_size + place in page; made by rollout_prepare */
} Step;

/* One attention site: what it stores and where. */
typedef struct {
    int64_t dtype, kv_heads, group, key_dim, value_dim, span, span_size;
    const int64_t *keys;   /* [slabs] addresses of [slab_pages, page_size, kv_heads, key_dim]; 0: dropped */
    const int64_t *values; /* [slabs] likewise with value_dim */
} Site;

/* Some queries of one sequence, some of its key heads, some of the chunks that they see. */
typedef struct {
    int64_t sequence, query, queries, head, heads, chunk, chunks;
    int64_t split;   /* which split tile this is a part of; -1: none, the task sees all of the chunks */
    int64_t partial; /* where the parts of that tile lie in `partials` */
    int64_t cost;
} Task;

typedef struct {
    int64_t tasks, splits, partial_floats, scratch_floats;
} Sizes;

typedef struct {
    Task *tasks;
    int64_t *pending; /* [splits] parts that are not computed yet */
    float *partials;
    float *scratch;   /* [threads, scratch_floats] */
    Sizes sizes;
} Plan;

/* Strides count bytes. */
typedef struct {
    const Step *step;
    const Site *site;
    const Plan *plan;
    const char *query;  /* [tokens, kv_heads * group, key_dim] */
    const char *key;    /* [tokens, kv_heads, key_dim] */
    const char *value;  /* [tokens, kv_heads, value_dim] */
    char *out;          /* [tokens, kv_heads * group, value_dim], contiguous */
    int64_t query_token, query_head, key_token, key_head, value_token, value_head;
    const float *sinks; /* [kv_heads * group], or NULL */
    double scaling, softcap; /* softcap 0: none */
    int64_t threads;
    /* GOMP_parallel of the OpenMP runtime that torch uses, or NULL: one thread. */
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
} Call;

#define BLOCK 32                         /* keys and values of this block and the next one fit the first cache */
#define CHUNK 512
#define TILE_ROWS 24                     /* rows of a tile with several queries, unless one query has more */
#define STATE_FLOATS (32 * 1024)         /* a task takes no more heads than keep its state below this, or one */
#define TASKS_PER_THREAD 4               /* tiles are split while there are fewer */
#define ALONE_BYTES (16 * 1024)          /* fewer new bytes than this are written without other threads */
#define MINUS_INFINITY (-__builtin_inff())

INLINE int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }

/* The earliest position that a query at `position` sees. */
INLINE int64_t first_key(const Site *site, int64_t position)
{
    if (site->span == WINDOW)
        return larger_of(position - site->span_size + 1, 0);
    if (site->span == CHUNKED)
        return position / site->span_size * site->span_size;
    return 0;
}

/* ---- inner loops --------------------------------------------------------------------------------------------- */

/* Memory that is read soon, fetched while something else is computed: the rows of a block's keys or values, one after
 * another, all heads of the task. Pages lie anywhere, so the processor cannot guess them. */
typedef struct {
    const char *const *rows; /* [BLOCK] addresses */
    int64_t row, offset, bytes;
    int64_t heads, due; /* fetched are as many rows, a head at a time, as are computed meanwhile */
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
#if defined(__AVX512BF16__)
    if (dtype == BFLOAT16) { /* queries as they came: pairs are multiplied and added in one instruction */
        __m512i query[ROWS];
        UNROLL for (int r = 0; r < rows; r++)
            query[r] = _mm512_loadu_si512(q + r * vectors * W + j / 2 * W);
        UNROLL for (int i = 0; i < 4; i++) {
            __m512i key = _mm512_loadu_si512(k[i] + j * W * 2);
            UNROLL for (int r = 0; r < rows; r++)
                sums[r][i] = (vf)_mm512_dpbf16_ps((__m512)sums[r][i], (__m512bh)query[r], (__m512bh)key);
        }
        return;
    }
#endif
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

/* Scores of `rows` queries and the keys [from, to) of a block; from and to are multiples of 4.
 * q [rows, vectors * W], see `load_query`; keys [BLOCK] addresses, to which `offset` is added; scores [rows, BLOCK]. */
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

/* The same for all vectors of the rows. */
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

/* Calls `f` with constants, so that each combination becomes a loop of its own. */
#if ROWS == 6
#define MORE_ROWS(f, dtype, ...)                                                                                       \
    case 4: f(dtype, 4, __VA_ARGS__); break;                                                                           \
    case 5: f(dtype, 5, __VA_ARGS__); break;                                                                           \
    case 6: f(dtype, 6, __VA_ARGS__); break;
#else
#define MORE_ROWS(f, dtype, ...)
#endif
#define FOR_ROWS(f, dtype, rows, ...)                                                                                  \
    switch (rows) {                                                                                                    \
    case 1: f(dtype, 1, __VA_ARGS__); break;                                                                           \
    case 2: f(dtype, 2, __VA_ARGS__); break;                                                                           \
    case 3: f(dtype, 3, __VA_ARGS__); break;                                                                           \
    MORE_ROWS(f, dtype, __VA_ARGS__)                                                                                   \
    }
#define FOR_DTYPE_AND_ROWS(f, dtype, rows, ...)                                                                        \
    if ((dtype) == FLOAT32) {                                                                                          \
        FOR_ROWS(f, FLOAT32, rows, __VA_ARGS__)                                                                        \
    } else if ((dtype) == BFLOAT16) {                                                                                  \
        FOR_ROWS(f, BFLOAT16, rows, __VA_ARGS__)                                                                       \
    } else {                                                                                                           \
        FOR_ROWS(f, FLOAT16, rows, __VA_ARGS__)                                                                        \
    }

static __attribute__((noinline)) void score(int dtype, int rows, int64_t vectors, float scaling, const float *q,
                                            const char *const *keys, int64_t offset, int64_t from, int64_t to,
                                            Ahead *ahead, float *scores)
{
    FOR_DTYPE_AND_ROWS(score_rows, dtype, rows, vectors, scaling, q, keys, offset, from, to, ahead, scores)
}

static __attribute__((noinline)) void weigh_values(int dtype, int rows, int64_t vectors, const float *weights,
                                                   const char *const *values, int64_t offset, int64_t from,
                                                   int64_t to, const float *factors, Ahead *ahead, float *sums)
{
    FOR_DTYPE_AND_ROWS(add_all_values, dtype, rows, vectors, weights, values, offset, from, to, factors, ahead, sums)
}

/* Scores [from, to) of a block become weights relative to the maximum so far; what stands around them in their
 * vectors becomes 0. Returns by how much sums so far are to be multiplied. */
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
    /* Where all scores are -infinity, any finite reference gives weights of 0, and -infinity itself NaN. */
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

/* ---- tiles --------------------------------------------------------------------------------------------------- */

/* Where a task keeps what it works with. Rows are ordered by head, query, head within the group. */
typedef struct {
    float *q;              /* [rows, key vectors * W], see `load_query` */
    float *sums;           /* [rows, value vectors * W] of the chunk */
    float *totals;         /* [rows, value vectors * W] of all chunks so far */
    float *weight;         /* [rows, W] of the chunk, not yet summed over lanes */
    float *maximum;        /* [rows] of the chunk */
    float *total_weight;   /* [rows] */
    float *total_maximum;  /* [rows] */
    float *scores;         /* [rows of a head, BLOCK] */
    float *factors;        /* [rows of a head] by which a block multiplies sums so far */
    float *keys, *values;  /* [BLOCK, vectors * W] unpacked */
} Scratch;

static int64_t scratch_floats(int64_t rows, int64_t head_rows, int64_t key_floats, int64_t value_floats)
{
    int64_t floats = rows * (key_floats + 2 * value_floats + W + 3) + head_rows * (BLOCK + 1);
    floats += BLOCK * (key_floats + value_floats);
    return (floats + 16 + 63) / 64 * 64; /* threads do not share lines of cache */
}

static Scratch scratch_at(float *p, int64_t rows, int64_t head_rows, int64_t key_floats, int64_t value_floats)
{
    Scratch s;
    s.q = p, p += rows * key_floats;
    s.sums = p, p += rows * value_floats;
    s.totals = p, p += rows * value_floats;
    s.weight = p, p += rows * W;
    s.scores = p, p += head_rows * BLOCK;
    s.keys = p, p += BLOCK * key_floats;
    s.values = p, p += BLOCK * value_floats;
    s.maximum = p, p += rows;
    s.total_weight = p, p += rows;
    s.total_maximum = p, p += rows;
    s.factors = p;
    return s;
}

/* Adds what one chunk gave to the result so far; the order of chunks is part of the result. */
static void fold(int64_t vectors, float maximum, float weight, const float *sums, float *total_maximum,
                 float *total_weight, float *totals)
{
    float now = maximum > *total_maximum ? maximum : *total_maximum;
    float reference = now == MINUS_INFINITY ? 0 : now;
    float old = scale_from(*total_maximum, reference), new = scale_from(maximum, reference);
    for (int64_t j = 0; j < vectors; j++)
        store(totals + j * W, fma_(load(totals + j * W), splat(old), load(sums + j * W) * splat(new)));
    *total_weight = *total_weight * old + weight * new;
    *total_maximum = now;
}

/* The result of one row: its sums over its weights, the sink's included. */
static void finish(const Call *call, Row row, int64_t token, int64_t head, float maximum, float weight,
                   const float *totals)
{
    const Site *site = call->site;
    float factor = 1;
    if (call->sinks) {
        float sink = call->sinks[head], now = sink > maximum ? sink : maximum;
        float reference = now == MINUS_INFINITY ? 0 : now;
        factor = scale_from(maximum, reference);
        weight = weight * factor + scale_from(sink, reference);
    }
    int64_t index = token * site->kv_heads * site->group + head;
    pack(row, totals, factor / weight, call->out + index * site->value_dim * size_of(row.dtype));
}

typedef struct {
    int64_t begin, end;
} Range;

/* The positions that some query of a task sees, in the task's chunks. */
static Range range_of(const Call *call, const Task *task)
{
    int64_t start = call->step->starts[task->sequence] + task->query;
    return (Range){larger_of(task->chunk * CHUNK, first_key(call->site, start)),
                   smaller_of((task->chunk + task->chunks) * CHUNK, start + task->queries)};
}

/* Addresses of a block's keys and values, as far as they are in the range, for the first head of a sequence. The
 * places around them hold the nearest of them: keys are read by fours, and scores of no use are not used. */
static void locate(const Call *call, int64_t sequence, int64_t block, Range range, const char **keys,
                   const char **values)
{
    int64_t from = larger_of(range.begin - block, 0), to = smaller_of(range.end - block, BLOCK);
    const Step *step = call->step;
    const Site *site = call->site;
    int64_t key_bytes = site->kv_heads * site->key_dim * size_of((int)site->dtype);
    int64_t value_bytes = site->kv_heads * site->value_dim * size_of((int)site->dtype);
    const int64_t *table = step->tables + sequence * step->width;
    for (int64_t t = from; t < to;) {
        int64_t page = (block + t) / step->page_size, place = (block + t) % step->page_size;
        int64_t slab = table[page] / step->slab_pages, inside = table[page] % step->slab_pages;
        const char *key = (const char *)(intptr_t)site->keys[slab];
        const char *value = (const char *)(intptr_t)site->values[slab];
        key += (inside * step->page_size + place) * key_bytes;
        value += (inside * step->page_size + place) * value_bytes;
        int64_t end = smaller_of(to, t + step->page_size - place);
        for (; t < end; t++, key += key_bytes, value += value_bytes)
            keys[t] = key, values[t] = value;
    }
    for (int64_t t = 0; t < from; t++)
        keys[t] = keys[from], values[t] = values[from];
    for (int64_t t = to; t < BLOCK; t++)
        keys[t] = keys[to - 1], values[t] = values[to - 1];
}

/* What the query at a position sees of a block, counted from its start; begin == end where that is nothing. */
INLINE Range seen_of_block(const Site *site, int64_t position, int64_t block)
{
    int64_t end = larger_of(smaller_of(position + 1 - block, BLOCK), 0);
    return (Range){smaller_of(larger_of(first_key(site, position) - block, 0), end), end};
}

/* Whether queries and keys are multiplied in the dtype that they are stored in. */
INLINE int as_it_is(Row row)
{
#if defined(__AVX512BF16__)
    return row.dtype == BFLOAT16 && row.direct;
#else
    (void)row;
    return 0;
#endif
}

/* A query as `score` takes it: as it is, or as floats in vector order. */
static void load_query(Row row, const char *from, float *to)
{
    if (as_it_is(row))
        memcpy(to, from, (size_t)row.dim * 2);
    else
        unpack(row, from, to);
}

/* One block of keys and values of one head, for all rows of the task of that head. Meanwhile some of the next keys and
 * values are fetched. */
static void attend_block(const Call *call, const Task *task, const Scratch *s, Row key_row, Row value_row,
                         const char *const *keys, const char *const *values, Ahead *next_keys, Ahead *next_values,
                         int64_t head, int64_t block, int64_t from, int64_t to)
{
    const Site *site = call->site;
    int64_t count = task->queries * site->group, base = (head - task->head) * count;
    int64_t key_floats = key_row.vectors * W, value_floats = value_row.vectors * W;
    int64_t key_offset = head * key_row.dim * size_of(key_row.dtype);
    int64_t value_offset = head * value_row.dim * size_of(value_row.dtype);
    const char *key_copies[BLOCK], *value_copies[BLOCK];
    int key_dtype = key_row.dtype, value_dtype = value_row.dtype;
    int shared = count > ROWS && key_row.dtype != FLOAT32; /* converted once for all row tiles */
    if ((shared && !as_it_is(key_row)) || !key_row.direct) {
        for (int64_t t = from; t < to; t++) {
            unpack(key_row, keys[t] + key_offset, s->keys + t * key_floats);
            key_copies[t] = (const char *)(s->keys + t * key_floats);
        }
        for (int64_t t = from / 4 * 4; t < from; t++)
            key_copies[t] = key_copies[from];
        for (int64_t t = to; t % 4; t++)
            key_copies[t] = key_copies[to - 1];
        keys = key_copies, key_offset = 0, key_dtype = FLOAT32;
    }
    if (shared || !value_row.direct) {
        for (int64_t t = from; t < to; t++) {
            unpack(value_row, values[t] + value_offset, s->values + t * value_floats);
            value_copies[t] = (const char *)(s->values + t * value_floats);
        }
        values = value_copies, value_offset = 0, value_dtype = FLOAT32;
    }
    int64_t start = call->step->starts[task->sequence] + task->query;
    int64_t tiles = (count + ROWS - 1) / ROWS; /* of rows; their sizes differ by one at most */
    Range seen[count];
    for (int64_t query = 0, row = 0; query < task->queries; query++) {
        Range own = seen_of_block(site, start + query, block);
        for (int64_t i = 0; i < site->group; i++)
            seen[row++] = own;
    }
    /* First all scores, then all sums: keys and values need not be in the first cache together. */
    for (int64_t tile = 0; tile < tiles; tile++) {
        int64_t row = count * tile / tiles, rows = count * (tile + 1) / tiles - row;
        Range any = {BLOCK, 0};
        for (int64_t r = row; r < row + rows; r++)
            if (seen[r].begin < seen[r].end)
                any = (Range){smaller_of(any.begin, seen[r].begin), larger_of(any.end, seen[r].end)};
        if (any.begin < any.end)
            score(key_dtype, (int)rows, key_row.vectors, (float)call->scaling, s->q + (base + row) * key_floats, keys,
                  key_offset, any.begin / 4 * 4, (any.end + 3) / 4 * 4, next_keys, s->scores + row * BLOCK);
        next_keys = NULL; /* the first rows have fetched them for all */
    }
    for (int64_t row = 0; row < count; row++) {
        s->factors[row] = 1;
        if (seen[row].begin < seen[row].end)
            s->factors[row] = weigh(s->scores + row * BLOCK, seen[row].begin, seen[row].end, (float)call->softcap,
                                    &s->maximum[base + row], s->weight + (base + row) * W);
    }
    /* A row takes no value that it does not see, not even with a weight of 0: it could be NaN. Its values come in
     * order, first what it sees before the others of its tile, then what all see, then the rest. */
    for (int64_t tile = 0; tile < tiles; tile++) {
        int64_t row = count * tile / tiles, rows = count * (tile + 1) / tiles - row;
        Range common = {0, BLOCK};
        for (int64_t r = row; r < row + rows; r++)
            common = (Range){larger_of(common.begin, seen[r].begin), smaller_of(common.end, seen[r].end)};
        if (common.begin >= common.end)
            common = (Range){BLOCK, BLOCK};
        for (int part = 0; part < 3; part++) {
            if (part == 1 && common.begin < common.end) {
                weigh_values(value_dtype, (int)rows, value_row.vectors, s->scores + row * BLOCK, values, value_offset,
                             common.begin, common.end, s->factors + row, next_values,
                             s->sums + (base + row) * value_floats);
                for (int64_t r = row; r < row + rows; r++)
                    s->factors[r] = 1;
            }
            for (int64_t r = row; part != 1 && r < row + rows; r++) {
                Range own = seen[r];
                if (part == 0)
                    own.end = smaller_of(own.end, common.begin);
                else
                    own.begin = larger_of(own.begin, common.end);
                if (own.begin < own.end) {
                    weigh_values(value_dtype, 1, value_row.vectors, s->scores + r * BLOCK, values, value_offset,
                                 own.begin, own.end, &s->factors[r], NULL, s->sums + (base + r) * value_floats);
                    s->factors[r] = 1;
                }
            }
        }
        next_values = NULL;
    }
}

/* `next` is the task that this thread does then, or NULL: its first keys and values are fetched. */
static void run_task(const Call *call, const Task *task, const Task *next, float *memory)
{
    const Step *step = call->step;
    const Site *site = call->site;
    Row key_row = row_of((int)site->dtype, site->key_dim), value_row = row_of((int)site->dtype, site->value_dim);
    int64_t key_floats = key_row.vectors * W, value_floats = value_row.vectors * W;
    int64_t per_head = task->queries * site->group, rows = task->heads * per_head;
    int64_t token = step->offsets[task->sequence] + task->query;
    int64_t start = step->starts[task->sequence] + task->query, last = start + task->queries - 1;
    Scratch s = scratch_at(memory, rows, per_head, key_floats, value_floats);

    for (int64_t row = 0; row < rows; row++) {
        int64_t head = (task->head + row / per_head) * site->group + row % site->group;
        int64_t query = token + row % per_head / site->group;
        float *q = s.q + row * key_floats;
        load_query(key_row, call->query + query * call->query_token + head * call->query_head, q);
        s.total_maximum[row] = MINUS_INFINITY;
        s.total_weight[row] = 0;
    }
    memset(s.totals, 0, (size_t)(rows * value_floats) * sizeof(float));

    int64_t first = first_key(site, start), chunk_floats = value_floats + 2;
    int64_t key_bytes = site->key_dim * size_of(key_row.dtype), value_bytes = site->value_dim * size_of(key_row.dtype);
    Range seen = range_of(call, task), then = next ? range_of(call, next) : (Range){0, 0};
    const char *keys[2][BLOCK], *values[2][BLOCK]; /* of this block, and of the next one */
    int now = 0;
    locate(call, task->sequence, seen.begin / BLOCK * BLOCK, seen, keys[now], values[now]);
    for (int64_t block = seen.begin / BLOCK * BLOCK; block < seen.end; block += BLOCK, now = 1 - now) {
        int64_t chunk = block / CHUNK;
        if (block % CHUNK == 0 || block <= seen.begin) {
            memset(s.sums, 0, (size_t)(rows * value_floats) * sizeof(float));
            memset(s.weight, 0, (size_t)(rows * W) * sizeof(float));
            for (int64_t row = 0; row < rows; row++)
                s.maximum[row] = MINUS_INFINITY;
        }
        const Task *following = block + BLOCK < seen.end ? task : next;
        int fetch = following && task->queries == 1; /* with more queries there is more to compute than to read */
        Ahead next_keys = {keys[1 - now], 0, 0, 0, task->heads, 0};
        Ahead next_values = {values[1 - now], 0, 0, 0, task->heads, 0};
        if (following) {
            locate(call, following->sequence, following == task ? block + BLOCK : then.begin / BLOCK * BLOCK,
                   following == task ? seen : then, keys[1 - now], values[1 - now]);
            next_keys.offset = following->head * key_bytes, next_keys.bytes = following->heads * key_bytes;
            next_values.offset = following->head * value_bytes, next_values.bytes = following->heads * value_bytes;
        }
        for (int64_t head = task->head; head < task->head + task->heads; head++)
            attend_block(call, task, &s, key_row, value_row, keys[now], values[now], fetch ? &next_keys : NULL,
                         fetch ? &next_values : NULL, head, block, larger_of(seen.begin - block, 0),
                         smaller_of(seen.end - block, BLOCK));
        if (fetch) { /* what is left of a whole block */
            prefetch(&next_keys, BLOCK * task->heads);
            prefetch(&next_values, BLOCK * task->heads);
        }
        if (block + BLOCK < smaller_of((chunk + 1) * CHUNK, seen.end))
            continue;
        for (int64_t row = 0; row < rows; row++) { /* the chunk is complete */
            int64_t position = start + row % per_head / site->group;
            float weight = sum(load(s.weight + row * W));
            if (task->split >= 0) {
                float *part = call->plan->partials + task->partial
                              + ((chunk - first / CHUNK) * rows + row) * chunk_floats;
                memcpy(part, s.sums + row * value_floats, (size_t)value_floats * sizeof(float));
                part[value_floats] = s.maximum[row], part[value_floats + 1] = weight;
            } else if (first_key(site, position) < (chunk + 1) * CHUNK && position >= chunk * CHUNK) {
                fold(value_row.vectors, s.maximum[row], weight, s.sums + row * value_floats, &s.total_maximum[row],
                     &s.total_weight[row], s.totals + row * value_floats);
            }
        }
    }
    if (task->split >= 0) {
        /* Who computes the last part puts the tile together, from the first chunk to the last. */
        int64_t *pending = call->plan->pending + task->split;
        int64_t left = __atomic_sub_fetch(pending, task->chunks, __ATOMIC_ACQ_REL);
        if (left)
            return;
        int64_t chunks = last / CHUNK - first / CHUNK + 1;
        __atomic_store_n(pending, chunks, __ATOMIC_RELAXED); /* for the next call with this plan */
        for (int64_t chunk = 0; chunk < chunks; chunk++)
            for (int64_t row = 0; row < rows; row++) {
                int64_t position = start + row % per_head / site->group, from = (chunk + first / CHUNK) * CHUNK;
                const float *part = call->plan->partials + task->partial + (chunk * rows + row) * chunk_floats;
                if (first_key(site, position) < from + CHUNK && position >= from)
                    fold(value_row.vectors, part[value_floats], part[value_floats + 1], part, &s.total_maximum[row],
                         &s.total_weight[row], s.totals + row * value_floats);
            }
    }
    for (int64_t row = 0; row < rows; row++)
        finish(call, value_row, token + row % per_head / site->group,
               (task->head + row / per_head) * site->group + row % site->group, s.total_maximum[row],
               s.total_weight[row], s.totals + row * value_floats);
}

/* ---- threads ------------------------------------------------------------------------------------------------- */

typedef struct {
    const Call *call;
    int64_t next, worker;
} Team;

#define WRITTEN_AT_ONCE 16

static void write_tokens(void *data)
{
    Team *team = data;
    const Call *call = team->call;
    const Step *step = call->step;
    const Site *site = call->site;
    int64_t slab_slots = step->slab_pages * step->page_size, item = size_of((int)site->dtype);
    int64_t key_bytes = site->key_dim * item, value_bytes = site->value_dim * item;
    for (;;) {
        int64_t from = __atomic_fetch_add(&team->next, WRITTEN_AT_ONCE, __ATOMIC_RELAXED);
        if (from >= step->tokens)
            return;
        for (int64_t token = from; token < smaller_of(from + WRITTEN_AT_ONCE, step->tokens); token++) {
            int64_t slab = step->slots[token] / slab_slots, inside = step->slots[token] % slab_slots;
            char *key = (char *)(intptr_t)site->keys[slab] + inside * site->kv_heads * key_bytes;
            char *value = (char *)(intptr_t)site->values[slab] + inside * site->kv_heads * value_bytes;
            for (int64_t head = 0; head < site->kv_heads; head++) {
                const char *from_key = call->key + token * call->key_token + head * call->key_head;
                const char *from_value = call->value + token * call->value_token + head * call->value_head;
                memcpy(key + head * key_bytes, from_key, (size_t)key_bytes);
                memcpy(value + head * value_bytes, from_value, (size_t)value_bytes);
            }
        }
    }
}

static void run_tasks(void *data)
{
    Team *team = data;
    const Plan *plan = team->call->plan;
    int64_t worker = __atomic_fetch_add(&team->worker, 1, __ATOMIC_RELAXED);
    float *memory = plan->scratch + worker * plan->sizes.scratch_floats;
    int64_t tasks = plan->sizes.tasks, index = __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED);
    while (index < tasks) {
        /* To know the next task is to fetch its memory early; towards the end none is taken that another thread, with
         * nothing left to do, could begin now. */
        int64_t next = tasks;
        int early = index + 2 * team->call->threads < tasks || team->call->threads == 1;
        if (early)
            next = __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED);
        run_task(team->call, &plan->tasks[index], next < tasks ? &plan->tasks[next] : NULL, memory);
        index = early ? next : __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED);
    }
}

static void run_team(const Call *call, void (*work)(void *), int alone)
{
    Team team = {call, 0, 0};
    if (alone || call->threads <= 1 || !call->parallel)
        work(&team);
    else
        call->parallel(work, &team, (unsigned)call->threads, 0);
}

/* ---- entry points -------------------------------------------------------------------------------------------- */

int64_t rollout_has_float16(void) { return HAS_FLOAT16; }

/* Fills the step's offsets and slots. Every page that is written to must be in the table. */
void rollout_prepare(const Step *step)
{
    int64_t token = 0;
    for (int64_t s = 0; s < step->sequences; s++) {
        step->offsets[s] = token;
        for (int64_t i = 0; i < step->lengths[s]; i++) {
            int64_t position = step->starts[s] + i;
            int64_t page = step->tables[s * step->width + position / step->page_size];
            step->slots[token++] = page * step->page_size + position % step->page_size;
        }
    }
}

static int by_cost(const void *a, const void *b)
{
    int64_t x = ((const Task *)a)->cost, y = ((const Task *)b)->cost;
    return x < y ? 1 : x > y ? -1 : 0;
}

/* What the queries from `query` on that make a tile are, and what they cost. */
static Task tile_at(const Step *step, const Site *site, int64_t sequence, int64_t query)
{
    int64_t most = larger_of(TILE_ROWS / site->group, 1);
    int64_t queries = smaller_of(step->lengths[sequence] - query, most);
    int64_t start = step->starts[sequence] + query, last = start + queries - 1, first = first_key(site, start);
    int64_t keys = last + 1 - first;
    int64_t cost = (keys * queries + 16) * site->group * (site->key_dim + site->value_dim) * site->kv_heads;
    return (Task){sequence, query, queries, 0, site->kv_heads, first / CHUNK, last / CHUNK - first / CHUNK + 1, -1, 0, cost};
}

/* Divides the work of a site (of any site with its span and shape) among tasks.
 *
 * Called twice: without `tasks` it only fills `sizes`; then with the memory that those ask for. Returns 0, or
 * 1 + the index of a sequence with a page among those it needs that no slab holds. */
int64_t rollout_plan(const Step *step, const Site *site, int64_t threads, Sizes *sizes, Task *tasks, int64_t *pending)
{
    Row key_row = row_of((int)site->dtype, site->key_dim), value_row = row_of((int)site->dtype, site->value_dim);
    int64_t key_floats = key_row.vectors * W, value_floats = value_row.vectors * W;
    int64_t row_floats = key_floats + 2 * value_floats + W;
    int64_t total = 0;
    for (int64_t s = 0; s < step->sequences; s++) {
        if (!step->lengths[s])
            continue;
        int64_t from = first_key(site, step->starts[s]) / step->page_size;
        int64_t to = (step->starts[s] + step->lengths[s] - 1) / step->page_size;
        for (int64_t page = from; page <= to; page++) {
            int64_t id = page < step->width ? step->tables[s * step->width + page] : -1;
            if (id < 0 || id >= step->slabs * step->slab_pages || !site->keys[id / step->slab_pages])
                return 1 + s;
        }
        for (int64_t query = 0; query < step->lengths[s];) {
            Task tile = tile_at(step, site, s, query);
            total += tile.cost, query += tile.queries;
        }
    }
    int64_t fair = threads > 1 ? total / (threads * TASKS_PER_THREAD) : total;
    *sizes = (Sizes){0, 0, 0, 0};
    for (int64_t s = 0; s < step->sequences; s++)
        for (int64_t query = 0; query < step->lengths[s];) {
            Task tile = tile_at(step, site, s, query);
            query += tile.queries;
            /* One query goes through its heads block by block: pages are read from end to end. Several go head by
             * head: their keys stay in cache. */
            int64_t rows = tile.queries * site->group;
            int64_t heads = tile.queries > 1 || tile.cost > fair ? 1 : larger_of(STATE_FLOATS / (rows * row_floats), 1);
            int split = tile.cost / site->kv_heads > fair && tile.chunks > 1;
            for (int64_t head = 0; head < site->kv_heads; head += heads) {
                Task part = tile;
                part.head = head, part.heads = smaller_of(heads, site->kv_heads - head);
                part.cost = tile.cost * part.heads / site->kv_heads;
                int64_t floats = scratch_floats(rows * part.heads, rows, key_floats, value_floats);
                sizes->scratch_floats = larger_of(sizes->scratch_floats, floats);
                if (!split) {
                    if (tasks)
                        tasks[sizes->tasks] = part;
                    sizes->tasks++;
                    continue;
                }
                part.split = sizes->splits++, part.partial = sizes->partial_floats, part.cost /= tile.chunks;
                sizes->partial_floats += tile.chunks * rows * part.heads * (value_floats + 2);
                for (int64_t chunk = 0; chunk < tile.chunks; chunk++, sizes->tasks++)
                    if (tasks) {
                        part.chunk = tile.chunk + chunk, part.chunks = 1;
                        tasks[sizes->tasks] = part;
                        pending[part.split] = tile.chunks;
                    }
            }
        }
    if (tasks && threads > 1)
        qsort(tasks, (size_t)sizes->tasks, sizeof(Task), by_cost); /* the longest first: threads end together */
    return 0;
}

/* Writes the new keys and values of a site, then attends. */
void rollout_attend(const Call *call)
{
    const Site *site = call->site;
    int64_t bytes = call->step->tokens * site->kv_heads * (site->key_dim + site->value_dim) * size_of((int)site->dtype);
    run_team(call, write_tokens, bytes < ALONE_BYTES);
    run_team(call, run_tasks, call->plan->sizes.tasks <= 1);
}

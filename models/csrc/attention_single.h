/* One query of a sequence in bfloat16, all its heads: bound by reading keys and values, which it fetches ahead. */
#pragma once
#include "attention_tasks.h"

#if HAS_BFLOAT16_PRODUCTS

/* What is read after a span: rows of all heads of a task. */
typedef struct {
    const char *const *rows; /* [count] */
    int64_t count, offset, bytes, heads; /* bytes of a head */
} Upcoming;

/* Returns what is fetched while `rows` rows of a head are read; what is shorter is fetched at once, with the first. */
static Fetch fetch_with(const Upcoming *next, int64_t head, int64_t rows)
{
    if (next->count >= rows && head < next->heads)
        return (Fetch){next->rows, next->offset + head * next->bytes};
    for (int64_t row = 0; row < next->count && next->count < rows && head == 0; row++)
        for (int64_t byte = 0; byte < next->bytes * next->heads; byte += 64)
            __builtin_prefetch(next->rows[row] + next->offset + byte);
    return (Fetch){NULL, 0};
}

/* Where a span of positions lies: all of one head's keys or values. */
typedef struct {
    const char *const *rows; /* [positions of the chunk] addresses */
    int64_t from, to;        /* positions in the chunk; multiples of 32 */
    Range own;               /* positions that the query sees */
} Span;

#if HAS_TILES
/* Returns 16 keys from position t of the chunk on, as they lie if they lie in one page, else copied to `copies`. */
static const char *adjacent_keys(const Call *call, const Span *span, int64_t base, int64_t t, int64_t offset,
                                 const Shape *shape, char *copies, int64_t *stride)
{
    const Layer *layer = call->layer;
    *stride = layer->kv_heads * layer->key_dim * 2;
    int64_t page_size = call->batch->page_size;
    if (layer->key_dim % 32 == 0 && (page_size % 16 == 0 || (base + t) % page_size + 16 <= page_size)) {
        int64_t seen = larger_of(smaller_of(span->own.end - 1, t), span->own.begin); /* others have no address */
        if (seen >= t && seen < t + 16)
            return span->rows[seen] + offset - (seen - t) * *stride;
    }
    for (int64_t i = 0; i < 16; i++)
        for (int64_t dim = 0; dim < layer->key_dim; dim += 32)
            _mm512_storeu_si512(copies + i * shape->q_bytes + 2 * dim,
                                load_some(span->rows[t + i] + offset + 2 * dim, layer->key_dim - dim));
    *stride = shape->q_bytes;
    return copies;
}

INLINE void fetch_keys(const Fetch *next, int64_t key, int64_t step)
{
    for (int i = 0; i < 16 && next->rows; i++)
        fetch(next, key + i, step * 64);
}

/* Scores of 16 * count keys from position t of the chunk on; `out` [16 * count keys, 16 queries]. */
INLINE void score_tiles_in_place(const int count, const Call *call, const Span *span, int64_t base, int64_t t,
                                 int64_t offset, const Shape *shape, const char *queries, char *copies, char *out,
                                 const Fetch *next)
{
    int64_t strides[4], fetched = t - span->from;
    const char *keys[4];
    UNROLL for (int i = 0; i < count; i++)
        keys[i] = adjacent_keys(call, span, base, t + 16 * i, offset, shape, copies + i * 16 * shape->q_bytes,
                                &strides[i]);
    MEMORY_IS_WRITTEN;
    _tile_zero(0);
    _tile_zero(1);
    if (count > 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < shape->key_steps; step++) {
        _tile_loadd(6, queries + step * TILE_BYTES, 64);
        _tile_loadd(4, keys[0] + step * 64, strides[0]);
        _tile_dpbf16ps(0, 4, 6);
        fetch_keys(next, fetched, step);
        _tile_loadd(5, keys[1] + step * 64, strides[1]);
        _tile_dpbf16ps(1, 5, 6);
        fetch_keys(next, fetched + 16, step);
        if (count > 2) {
            _tile_loadd(4, keys[2] + step * 64, strides[2]);
            _tile_dpbf16ps(2, 4, 6);
            fetch_keys(next, fetched + 32, step);
            _tile_loadd(5, keys[3] + step * 64, strides[3]);
            _tile_dpbf16ps(3, 5, 6);
            fetch_keys(next, fetched + 48, step);
        }
    }
    _tile_stored(0, out, 64);
    _tile_stored(1, out + TILE_BYTES, 64);
    if (count > 2) {
        _tile_stored(2, out + 2 * TILE_BYTES, 64);
        _tile_stored(3, out + 3 * TILE_BYTES, 64);
    }
}

/* Scores of a span by tiles of 16 keys times 16 queries, transposed afterwards. A sum of products does not depend on
 * which factor is left, so the bits are those of `score_keys`. */
static void score_in_place(const Call *call, const Span *span, int64_t base, int64_t offset, const Shape *shape,
                           const char *queries, char *memory, float *scores, Fetch next)
{
    char *copies = memory + (span->to - span->from) * 64;
    int64_t t = span->from; /* several tiles at a time, for their sums do not wait for one another */
    for (; t + 64 <= span->to; t += 64)
        score_tiles_in_place(4, call, span, base, t, offset, shape, queries, copies, memory + (t - span->from) * 64,
                             &next);
    if (t < span->to)
        score_tiles_in_place(2, call, span, base, t, offset, shape, queries, copies, memory + (t - span->from) * 64,
                             &next);
    for (t = span->from; t < span->to; t += 16) {
        const char *from[16];
        for (int i = 0; i < 16; i++)
            from[i] = memory + (t - span->from + i) * 64;
        transpose(from, shape->per_head, (char *)(scores + t), SCORE_STRIDE * 4);
    }
}
#endif

/* Computes scores [rows of a head] of a span. */
static void score_span(const Call *call, const Span *span, int64_t base, int64_t head, int64_t first_head,
                       const Shape *shape, const Tiles *s, Fetch next)
{
    int64_t offset = head * call->layer->key_dim * 2, row = (head - first_head) * shape->per_head;
    float *scores = s->scores + row * SCORE_STRIDE;
#if HAS_TILES
    if (tiles_permitted()) {
        const char *queries = s->packed_q + (head - first_head) * shape->key_steps * TILE_BYTES;
        score_in_place(call, span, base, offset, shape, queries, s->keys, scores, next);
        return;
    }
#endif
    (void)base;
    for (int64_t t = span->from; t < span->to; t += 16, next.rows += next.rows ? 16 : 0)
        pack_keys(span->rows + t, offset, call->layer->key_dim,
                  s->keys + (t - span->from) / 16 * shape->key_steps * TILE_BYTES, next);
    score_keys(shape->per_head, shape->key_steps, s->q + row * shape->q_bytes, shape->q_bytes, s->keys,
               (span->to - span->from) / 16, scores + span->from, SCORE_STRIDE);
}

/* Adds the values of a span, weighted, to the sums of a head. */
static void add_span(const Call *call, const Span *span, int64_t head, int64_t first_head, const Shape *shape,
                     const Tiles *s, int add, Fetch next)
{
    const Layer *layer = call->layer;
    int64_t row = (head - first_head) * shape->per_head;
    for (int64_t t = span->from; t < span->to; t += 32, next.rows += next.rows ? 32 : 0)
        pack_values(span->rows + t, head * layer->value_dim * 2, layer->value_dim, span->own.begin - t,
                    span->own.end - t, s->values + (t - span->from) / 32 * shape->value_tiles * TILE_BYTES, next);
    add_values_of(shape->per_head, (span->to - span->from) / 32, s->weights + row * WEIGHT_BYTES + 2 * span->from,
                  WEIGHT_BYTES, s->values, shape->value_tiles, s->sums + row * shape->value_floats,
                  shape->value_floats, add);
}

/* Attends to a chunk, or part of it, with all key heads of the task, for its only query. Fetches each span while the
 * one before is computed, and at last `after`, the keys that the thread needs next. */
static void attend_query(const Call *call, const Task *task, const Shape *shape, const Tiles *s, Range seen,
                         const char *const *keys, const char *const *values, Upcoming after)
{
    const Layer *layer = call->layer;
    int64_t base = seen.begin / CHUNK * CHUNK, last = task->head + task->heads;
    int64_t key_bytes = layer->key_dim * 2, value_bytes = layer->value_dim * 2;
    begin_products(16); /* keys are left-hand rows */
    Range own = {seen.begin - base, seen.end - base}, all = {own.begin / 32 * 32, (own.end + 31) / 32 * 32};
    for (int64_t from = all.begin; from < all.end; from += shape->span) {
        Span span = {keys, from, smaller_of(from + shape->span, all.end), own};
        Upcoming next = {values + all.begin, smaller_of(shape->span, all.end - all.begin), task->head * value_bytes,
                      value_bytes, task->heads};
        if (span.to < all.end)
            next = (Upcoming){keys + span.to, smaller_of(shape->span, all.end - span.to), task->head * key_bytes,
                           key_bytes, task->heads};
        for (int64_t head = task->head; head < last; head++)
            score_span(call, &span, base, head, task->head, shape, s,
                       fetch_with(&next, head - task->head, span.to - span.from));
    }
    begin_products(shape->per_head);
    for (int64_t row = 0; row < shape->rows; row++)
        weigh_row(s->scores + row * SCORE_STRIDE, s->weights + row * WEIGHT_BYTES, own, all, (float)call->scale,
                  (float)call->softcap, &s->maximum[row], &s->weight[row]);
    for (int64_t from = all.begin; from < all.end; from += shape->span) {
        Span span = {values, from, smaller_of(from + shape->span, all.end), own};
        Upcoming next = after;
        if (span.to < all.end)
            next = (Upcoming){values + span.to, smaller_of(shape->span, all.end - span.to), task->head * value_bytes,
                           value_bytes, task->heads};
        for (int64_t head = task->head; head < last; head++)
            add_span(call, &span, head, task->head, shape, s, from > all.begin,
                     fetch_with(&next, head - task->head, span.to - span.from));
    }
    keep_chunk(call, task, shape, s, base / CHUNK, 0, shape->rows);
}

/* Packs the queries of each head like keys, for `score_in_place`. */
static void pack_queries(const Shape *shape, const Task *task, const Tiles *s)
{
    for (int64_t head = 0; head < task->heads; head++) {
        const char *rows[16];
        const Fetch nothing = {NULL, 0};
        for (int64_t i = 0; i < 16; i++)
            rows[i] = s->q + (head * shape->per_head + smaller_of(i, shape->per_head - 1)) * shape->q_bytes;
        pack_keys(rows, 0, shape->key_steps * 32, s->packed_q + head * shape->key_steps * TILE_BYTES, nothing);
    }
}

/* Attends to all chunks of a task with one query; see `run_bfloat16_task`. */
static void attend_single(const Call *call, const Task *task, const Task *following, const Shape *shape,
                          const Tiles *s)
{
    const Layer *layer = call->layer;
    Range seen = range_of(call, task);
    const char *keys[2][CHUNK], *values[2][CHUNK];   /* of this chunk, and of the next one */
    if (tiles_permitted())
        pack_queries(shape, task, s);
    int now = 0;
    for (int64_t begin = seen.begin; begin < seen.end; now = 1 - now) {
        Range part = {begin, smaller_of(seen.end, (begin / CHUNK + 1) * CHUNK)};
        if (begin == seen.begin)
            locate_chunk(call, task->sequence, part, keys[now], values[now]);
        begin = part.end;
        const Task *next = begin < seen.end ? task : following;
        Upcoming after = {NULL, 0, 0, 0, 0};
        if (next && is_single(layer, next->queries)) {
            Range then = next == task ? (Range){begin, seen.end} : range_of(call, next);
            then.end = smaller_of(then.end, (then.begin / CHUNK + 1) * CHUNK);
            locate_chunk(call, next->sequence, then, keys[1 - now], values[1 - now]);
            int64_t key_bytes = layer->key_dim * 2;
            after = (Upcoming){keys[1 - now] + then.begin % CHUNK, smaller_of(shape->span, then.end - then.begin),
                            next->head * key_bytes, key_bytes, next->heads};
        }
        attend_query(call, task, shape, s, part, keys[now], values[now], after);
    }
}

#endif

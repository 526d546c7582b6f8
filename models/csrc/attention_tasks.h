/* Shapes, working memory and results of tasks in bfloat16, whichever number of queries they have. */
#pragma once
#include "attention_pages.h"
#include "bfloat16_packing.h"
#include "bfloat16_weights.h"

#if HAS_BFLOAT16_PRODUCTS

#define SCORE_STRIDE (CHUNK + 16) /* a power of two would put all rows into few sets of a cache */
#define WEIGHT_BYTES (2 * CHUNK + 64)
#define ROWS_WANTED 192           /* of a tile with several queries, about: they share packed keys and values */
/* A single query reads about so much of all its heads' keys, or values, at a time: together with what is packed of it,
 * it stays in the first cache. */
#define SPAN_BYTES (16 * 1024)

/* Working memory of a task. Rows are ordered by key head, query, head within the group. */
typedef struct {
    char *q;               /* [rows, key steps * 32] bfloat16, zeros past the end of a row */
    char *packed_q;        /* [heads, key steps] tiles, of a single query */
    char *keys, *values;   /* packed */
    float *scores;         /* [rows of a product, SCORE_STRIDE] of a chunk */
    char *weights;         /* [rows of a product, WEIGHT_BYTES] */
    float *sums;           /* [rows of a product, value floats] weighted values of a chunk */
    float *maximum;        /* [rows of a product] */
    float *weight;         /* [rows of a product] */
    Folded total;          /* [rows] */
} Tiles;

/* Shapes of a task. */
typedef struct {
    int64_t heads;
    int64_t per_head, rows, products;   /* rows of a head, of the task, and those whose scores are held at once */
    int64_t key_steps, value_tiles;     /* in steps of 32 dims, and in tiles of 16 */
    int64_t q_bytes, value_floats;      /* of a row */
    int64_t span;                       /* positions whose keys or values are packed at once */
} Shape;

/* Returns whether a task is one query of few heads, which is bound by reading; else it takes one key head. */
INLINE int is_single(const Layer *layer, int64_t queries) { return queries == 1 && layer->group <= 16; }

static Shape shape_of(const Layer *layer, int64_t queries, int64_t heads)
{
    Shape s = {.heads = heads, .per_head = queries * layer->group};
    s.rows = s.per_head * heads;
    s.key_steps = (layer->key_dim + 31) / 32, s.value_tiles = (layer->value_dim + 31) / 32 * 2;
    s.q_bytes = s.key_steps * 64, s.value_floats = s.value_tiles * COLUMNS;
    s.products = STRIP, s.span = CHUNK;
    if (is_single(layer, queries)) {
        int64_t bytes = heads * larger_of(layer->key_dim, layer->value_dim) * 2;
        s.products = s.rows;
        s.span = smaller_of(larger_of(SPAN_BYTES / bytes / 32 * 32, 32), CHUNK);
    }
    return s;
}

INLINE int64_t whole_lines(int64_t floats) { return (floats + 15) / 16 * 16; }

/* Fills `s`, if given, with parts of memory that is aligned to cache lines; returns how many floats they take. */
static int64_t divide_memory(const Shape *shape, float *memory, Tiles *s)
{
    float *p = memory;
    int64_t rows = (shape->rows + STRIP - 1) / STRIP * STRIP; /* whole strips are multiplied */
    Tiles t;
    t.q = (char *)p, p += rows * shape->q_bytes / 4;
    t.packed_q = (char *)p, p += shape->heads * shape->key_steps * TILE_BYTES / 4;
    /* or the scores of a span and 64 keys */
    t.keys = (char *)p, p += larger_of(shape->span, 16) * larger_of(shape->q_bytes, 64) / 4 + 64 * shape->q_bytes / 4;
    t.values = (char *)p, p += shape->span * shape->value_floats / 2;
    t.scores = p, p += shape->products * SCORE_STRIDE;
    t.weights = (char *)p, p += shape->products * WEIGHT_BYTES / 4;
    t.sums = p, p += whole_lines(shape->products * shape->value_floats);
    t.maximum = p, p += whole_lines(shape->products);
    t.weight = p, p += whole_lines(shape->products);
    t.total.totals = p, p += whole_lines(shape->rows * shape->value_floats);
    t.total.maximum = p, p += whole_lines(shape->rows);
    t.total.weight = p, p += whole_lines(shape->rows);
    t.total.stride = shape->value_floats;
    if (s)
        *s = t;
    return p - memory;
}

static int64_t bfloat16_value_floats(const Layer *layer) { return shape_of(layer, 1, 1).value_floats; }

/* Returns the floats of working memory that a row of a single query takes. */
static int64_t bfloat16_row_floats(const Layer *layer)
{
    return SCORE_STRIDE + WEIGHT_BYTES / 4 + 2 * bfloat16_value_floats(layer) + shape_of(layer, 1, 1).q_bytes / 4;
}

static int64_t bfloat16_scratch_floats(const Layer *layer, int64_t queries, int64_t heads)
{
    Shape shape = shape_of(layer, queries, heads);
    return divide_memory(&shape, NULL, NULL) + 32; /* to align it, and for no false sharing */
}

/* Adds a chunk of rows [row, row + count) to the result, or keeps it as a part of a split task's. */
static void keep_chunk(const Call *call, const Task *task, const Shape *shape, const Tiles *s, int64_t chunk,
                       int64_t row, int64_t count)
{
    if (task->split < 0) {
        for (int64_t i = 0; i < count; i += W)
            fold_rows(smaller_of(W, count - i), s->maximum + i, s->weight + i, s->sums + i * shape->value_floats,
                      shape->value_floats, &s->total, row + i);
        return;
    }
    int64_t start = call->batch->prefix_lens[task->sequence] + task->query;
    int64_t number = chunk - first_key(call->layer, start) / CHUNK, floats = shape->value_floats;
    float *part = call->plan->partials + task->partial + (number * shape->rows + row) * (floats + 2);
    for (int64_t i = 0; i < count; i++, part += floats + 2) {
        memcpy(part, s->sums + i * floats, (size_t)floats * sizeof(float));
        part[floats] = s->maximum[i], part[floats + 1] = s->weight[i];
    }
}

/* Loads the queries of all rows, and empties their results. */
static void begin_rows(const Call *call, const Task *task, const Shape *shape, const Tiles *s)
{
    const Layer *layer = call->layer;
    int64_t token = call->batch->offsets[task->sequence] + task->query;
    for (int64_t row = 0; row < shape->rows; row++) {
        int64_t head = (task->head + row / shape->per_head) * layer->group + row % layer->group;
        int64_t query = token + row % shape->per_head / layer->group;
        const char *from = call->query + query * call->query_token + head * call->query_head;
        for (int64_t i = 0; i < layer->key_dim; i += 32)
            _mm512_storeu_si512(s->q + row * shape->q_bytes + 2 * i, load_some(from + 2 * i, layer->key_dim - i));
        s->total.maximum[row] = MINUS_INFINITY, s->total.weight[row] = 0;
    }
    memset(s->total.totals, 0, (size_t)(shape->rows * shape->value_floats) * sizeof(float));
}

/* Reduces a split tile, from the first chunk to the last. Returns 0 if other tasks still compute parts of it. */
static int reduce_parts(const Call *call, const Task *task, const Shape *shape, const Tiles *s)
{
    int64_t *pending = call->plan->pending + task->split, floats = shape->value_floats;
    if (__atomic_sub_fetch(pending, task->chunks, __ATOMIC_ACQ_REL))
        return 0;
    int64_t start = call->batch->prefix_lens[task->sequence] + task->query, last = start + task->queries - 1;
    int64_t chunks = last / CHUNK - first_key(call->layer, start) / CHUNK + 1;
    __atomic_store_n(pending, chunks, __ATOMIC_RELAXED); /* for the next call with this plan */
    const float *part = call->plan->partials + task->partial;
    for (int64_t chunk = 0; chunk < chunks; chunk++)
        for (int64_t row = 0; row < shape->rows; row += W) {
            int64_t count = smaller_of(W, shape->rows - row);
            float maximum[W], weight[W];
            for (int64_t i = 0; i < count; i++)
                maximum[i] = part[i * (floats + 2) + floats], weight[i] = part[i * (floats + 2) + floats + 1];
            fold_rows(count, maximum, weight, part, floats + 2, &s->total, row);
            part += count * (floats + 2);
        }
    return 1;
}

#endif

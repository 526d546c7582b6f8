/* Which arithmetic computes a layer, and how much of it one task takes. */
#pragma once
#include "attention_bfloat16.h"
#include "attention_tiles.h"

#if HAS_BFLOAT16_PRODUCTS
/* Returns whether bfloat16 products compute a layer; all else is computed in float. */
INLINE int by_products(const Layer *layer) { return layer->dtype == BFLOAT16; }
#else
#define by_products(layer) 0
#define ROWS_WANTED 0
#define bfloat16_value_floats(layer) 0
#define bfloat16_row_floats(layer) 1
#define bfloat16_scratch_floats(layer, queries, heads) 0
#define run_bfloat16_task(call, task, next, memory) (void)0
#endif

/* Returns the most queries that share a task. */
static int64_t most_queries(const Layer *layer)
{
    if (by_products(layer))
        return 16 * larger_of(ROWS_WANTED / 16 / layer->group, 1);
    return larger_of(SHARED_ROWS / layer->group, 1);
}

/* Returns the floats that hold the weighted values of a row. */
static int64_t value_floats_of(const Layer *layer)
{
    if (by_products(layer))
        return bfloat16_value_floats(layer);
    return row_of((int)layer->dtype, layer->value_dim).vectors * W;
}

/* Returns the most key heads that a task with one query takes. */
static int64_t most_heads(const Layer *layer)
{
    int64_t floats = row_of((int)layer->dtype, layer->key_dim).vectors * W + 2 * value_floats_of(layer) + W;
    if (by_products(layer))
        floats = bfloat16_row_floats(layer);
    return larger_of(STATE_FLOATS / (layer->group * floats), 1);
}

/* Returns the floats of working memory of a task. */
static int64_t task_floats(const Layer *layer, int64_t queries, int64_t heads)
{
    if (by_products(layer))
        return bfloat16_scratch_floats(layer, queries, heads);
    int64_t rows = queries * layer->group, key_floats = row_of((int)layer->dtype, layer->key_dim).vectors * W;
    return scratch_floats(rows * heads, rows, key_floats, value_floats_of(layer));
}

/* Runs a task. `next` is the thread's next task, whose first keys are prefetched, or NULL. */
static void run_task(const Call *call, const Task *task, const Task *next, float *memory)
{
    if (by_products(call->layer))
        run_bfloat16_task(call, task, next, memory);
    else
        run_float_task(call, task, next, memory);
}

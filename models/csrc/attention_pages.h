/* Which positions the queries of a task see, where their keys and values lie, and where results go. */
#pragma once
#include "attention_call.h"

typedef struct {
    int64_t begin, end;
} Range;

/* Returns the positions in the task's chunks that at least one of its queries sees. */
static Range range_of(const Call *call, const Task *task)
{
    int64_t start = call->batch->prefix_lens[task->sequence] + task->query;
    return (Range){larger_of(task->chunk * CHUNK, first_key(call->layer, start)),
                   smaller_of((task->chunk + task->chunks) * CHUNK, start + task->queries)};
}

/* Returns the positions in [base, base + count) that a query sees, relative to base; begin == end if it sees none. */
INLINE Range seen_of(const Layer *layer, int64_t position, int64_t base, int64_t count)
{
    int64_t end = larger_of(smaller_of(position + 1 - base, count), 0);
    return (Range){smaller_of(larger_of(first_key(layer, position) - base, 0), end), end};
}

/* Looks up the addresses of keys and values at [base, base + count) within the range, for the first head. Entries
 * outside of the range repeat the nearest address: several keys are read at a time, and extra scores are ignored. */
static void locate(const Call *call, int64_t sequence, int64_t base, int64_t count, Range range, const char **keys,
                   const char **values)
{
    int64_t from = larger_of(range.begin - base, 0), to = smaller_of(range.end - base, count);
    const Batch *batch = call->batch;
    const Layer *layer = call->layer;
    int64_t key_bytes = layer->kv_heads * layer->key_dim * size_of((int)layer->dtype);
    int64_t value_bytes = layer->kv_heads * layer->value_dim * size_of((int)layer->dtype);
    const int64_t *table = batch->page_tables + sequence * batch->width;
    for (int64_t t = from; t < to;) {
        int64_t page = (base + t) / batch->page_size, place = (base + t) % batch->page_size;
        int64_t slab = table[page] / batch->slab_pages, inside = table[page] % batch->slab_pages;
        const char *key = (const char *)(intptr_t)layer->keys[slab];
        const char *value = (const char *)(intptr_t)layer->values[slab];
        key += (inside * batch->page_size + place) * key_bytes;
        value += (inside * batch->page_size + place) * value_bytes;
        int64_t end = smaller_of(to, t + batch->page_size - place);
        for (; t < end; t++, key += key_bytes, value += value_bytes)
            keys[t] = key, values[t] = value;
    }
    for (int64_t t = 0; t < from; t++)
        keys[t] = keys[from], values[t] = values[from];
    for (int64_t t = to; t < count; t++)
        keys[t] = keys[to - 1], values[t] = values[to - 1];
}

/* Looks up the addresses of a chunk's keys and values within a range, which lies in one chunk. */
static __attribute__((unused)) void locate_chunk(const Call *call, int64_t sequence, Range range, const char **keys, const char **values)
{
    int64_t base = range.begin / CHUNK * CHUNK;
    locate(call, sequence, base, (range.end - base + 31) / 32 * 32, range, keys, values);
}

/* Returns what the weighted values of one row are multiplied by: one over the sum of weights, the sink's included. */
static float normalizer(const Call *call, int64_t head, float maximum, float weight)
{
    float factor = 1;
    if (call->sinks) {
        float sink = call->sinks[head], now = sink > maximum ? sink : maximum;
        float reference = now == MINUS_INFINITY ? 0 : now;
        factor = scale_from(maximum, reference);
        weight = weight * factor + scale_from(sink, reference);
    }
    return factor / weight;
}

INLINE char *out_at(const Call *call, int64_t token, int64_t head)
{
    const Layer *layer = call->layer;
    int64_t index = token * layer->kv_heads * layer->group + head;
    return call->out + index * layer->value_dim * size_of((int)layer->dtype);
}

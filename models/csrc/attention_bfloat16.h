/* Tasks of paged_attention.c in bfloat16: products of packed tiles, weights rounded to bfloat16.
 *
 * A chunk of positions has one maximum a row, found before any weight is computed, so that the weighted values of a
 * chunk are one product. Operations on a row depend on its own position alone: positions that it does not see have
 * weight 0, and adding 0 changes nothing.
 */
#pragma once
#include "attention_single.h"

#if HAS_BFLOAT16_PRODUCTS

/* Computes again the weighted values of rows that became NaN: 0 times a value that a row does not see may be NaN too.
 * Packs the values of each such row's own positions alone, then those of all rows again. */
static void mend_rows(const Layer *layer, const Shape *shape, const Tiles *s, const char *const *values,
                      int64_t offset, int64_t count, const Range *own, Range all, Range seen)
{
    int64_t floats = shape->value_floats, step_bytes = shape->value_tiles * TILE_BYTES;
    float kept[STRIP * floats];
    const Fetch nothing = {NULL, 0};
    int bad = 0;
    memcpy(kept, s->sums, sizeof kept);
    for (int64_t row = 0; row <= count; row++) {
        Range some = row < count ? own[row] : seen;
        int is_nan = 0;
        for (int64_t j = 0; row < count && j < floats; j++)
            is_nan |= kept[row * floats + j] != kept[row * floats + j];
        bad |= is_nan;
        if (!(row < count ? is_nan : bad))
            continue;
        for (int64_t t = all.begin; t < all.end; t += 32)
            pack_values(values + t, offset, layer->value_dim, some.begin - t, some.end - t,
                        s->values + t / 32 * step_bytes, nothing);
        if (row == count)
            continue;
        add_values_of(count, (all.end - all.begin) / 32, s->weights + 2 * all.begin, WEIGHT_BYTES,
                      s->values + all.begin / 32 * step_bytes, shape->value_tiles, s->sums, floats, 0);
        memcpy(kept + row * floats, s->sums + row * floats, (size_t)floats * sizeof(float));
    }
    memcpy(s->sums, kept, sizeof kept);
}

INLINE int has_nan(const float *numbers, int64_t count)
{
    __mmask16 found = 0;
    for (int64_t i = 0; i < count; i += W)
        found |= _mm512_cmp_ps_mask(_mm512_loadu_ps(numbers + i), _mm512_loadu_ps(numbers + i), _CMP_UNORD_Q);
    return found != 0;
}

/* Attends to a chunk of one key head, for all queries of the task. `seen`: positions in the chunk that any sees. */
static void attend_queries(const Call *call, const Task *task, const Shape *shape, const Tiles *s, int64_t chunk,
                           Range seen)
{
    const Layer *layer = call->layer;
    int64_t base = chunk * CHUNK, start = call->batch->prefix_lens[task->sequence] + task->query;
    int64_t key_offset = task->head * layer->key_dim * 2, value_offset = task->head * layer->value_dim * 2;
    int64_t key_bytes = shape->key_steps * TILE_BYTES, value_bytes = shape->value_tiles * TILE_BYTES;
    const char *keys[CHUNK], *values[CHUNK];
    const Fetch nothing = {NULL, 0};
    locate_chunk(call, task->sequence, seen, keys, values);
    seen.begin -= base, seen.end -= base;
    Range packed = {seen.begin / 32 * 32, (seen.end + 31) / 32 * 32};
    for (int64_t t = packed.begin; t < packed.end; t += 16)
        pack_keys(keys + t, key_offset, layer->key_dim, s->keys + t / 16 * key_bytes, nothing);
    for (int64_t t = packed.begin; t < packed.end; t += 32)
        pack_values(values + t, value_offset, layer->value_dim, seen.begin - t, seen.end - t,
                    s->values + t / 32 * value_bytes, nothing);
    for (int64_t row = 0; row < shape->rows; row += STRIP) {
        int64_t count = smaller_of(STRIP, shape->rows - row);
        Range own[STRIP], all = {CHUNK, 0};
        for (int64_t i = 0; i < count; i++) {
            own[i] = seen_of(layer, start + (row + i) / layer->group, base, CHUNK);
            if (own[i].begin < own[i].end)
                all = (Range){smaller_of(all.begin, own[i].begin), larger_of(all.end, own[i].end)};
        }
        if (all.begin < all.end) {
            all = (Range){all.begin / 32 * 32, (all.end + 31) / 32 * 32};
            score_keys(count, shape->key_steps, s->q + row * shape->q_bytes, shape->q_bytes,
                       s->keys + all.begin / 16 * key_bytes, (all.end - all.begin) / 16, s->scores + all.begin,
                       SCORE_STRIDE);
        } else {
            all = (Range){0, 0};
        }
        for (int64_t i = 0; i < count; i++)
            weigh_row(s->scores + i * SCORE_STRIDE, s->weights + i * WEIGHT_BYTES, own[i], all, (float)call->scale,
                      (float)call->softcap, &s->maximum[i], &s->weight[i]);
        if (all.begin < all.end) {
            add_values_of(count, (all.end - all.begin) / 32, s->weights + 2 * all.begin, WEIGHT_BYTES,
                          s->values + all.begin / 32 * value_bytes, shape->value_tiles, s->sums, shape->value_floats,
                          0);
            if (has_nan(s->sums, count * shape->value_floats))
                mend_rows(layer, shape, s, values, value_offset, count, own, all, seen);
        }
        keep_chunk(call, task, shape, s, chunk, row, count);
    }
}

/* Runs a task. `next` is the thread's next task, whose first keys are prefetched, or NULL. */
static void run_bfloat16_task(const Call *call, const Task *task, const Task *next, float *memory)
{
    const Layer *layer = call->layer;
    Shape shape = shape_of(layer, task->queries, task->heads);
    Tiles s;
    divide_memory(&shape, (float *)(((uintptr_t)memory + 63) / 64 * 64), &s);
    begin_rows(call, task, &shape, &s);
    if (is_single(layer, task->queries)) {
        attend_single(call, task, next, &shape, &s);
    } else {
        memset(s.q + shape.rows * shape.q_bytes, 0, (size_t)((STRIP - shape.rows % STRIP) % STRIP * shape.q_bytes));
        begin_products(shape.rows);
        Range seen = range_of(call, task);
        for (int64_t chunk = seen.begin / CHUNK; chunk * CHUNK < seen.end; chunk++) {
            Range part = {larger_of(seen.begin, chunk * CHUNK), smaller_of(seen.end, (chunk + 1) * CHUNK)};
            attend_queries(call, task, &shape, &s, chunk, part);
        }
    }
    end_products();
    if (task->split >= 0 && !reduce_parts(call, task, &shape, &s))
        return;
    int64_t token = call->batch->offsets[task->sequence] + task->query;
    for (int64_t row = 0; row < shape.rows; row++) {
        int64_t head = (task->head + row / shape.per_head) * layer->group + row % layer->group;
        unpack_sums(s.total.totals + row * shape.value_floats,
                    normalizer(call, head, s.total.maximum[row], s.total.weight[row]), layer->value_dim,
                    out_at(call, token + row % shape.per_head / layer->group, head));
    }
}

#endif

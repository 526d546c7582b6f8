/* Tasks of paged_attention.c: queries of one sequence against the chunks of keys and values that they see. */
#pragma once
#include "attention_inner_loops.h"
#include "attention_pages.h"

/* Working memory of a task. Rows are ordered by key head, query, head within the group. */
typedef struct {
    float *q;              /* [rows, key vectors * W] in vector order */
    float *sums;           /* [rows, value vectors * W] weighted values of the chunk */
    float *totals;         /* [rows, value vectors * W] weighted values of all chunks so far */
    float *weight;         /* [rows, W] sum of weights of the chunk, not yet summed over lanes */
    float *maximum;        /* [rows] largest score of the chunk */
    float *total_weight;   /* [rows] */
    float *total_maximum;  /* [rows] */
    float *scores;         /* [rows of a head, BLOCK] */
    float *factors;        /* [rows of a head] factor by which a block rescales the sums so far */
    float *keys, *values;  /* [BLOCK, vectors * W] unpacked */
} Scratch;

static int64_t scratch_floats(int64_t rows, int64_t head_rows, int64_t key_floats, int64_t value_floats)
{
    int64_t floats = rows * (key_floats + 2 * value_floats + W + 3) + head_rows * (BLOCK + 1);
    floats += BLOCK * (key_floats + value_floats);
    return (floats + 16 + 63) / 64 * 64; /* no false sharing between threads */
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

/* Adds one chunk to the result so far; results depend on the order of chunks, so callers keep it. */
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

/* Attends to one block of one key head, for all rows of the task with that head, and prefetches the next block. */
static void attend_block(const Call *call, const Task *task, const Scratch *s, Row key_row, Row value_row,
                         const char *const *keys, const char *const *values, Ahead *next_keys, Ahead *next_values,
                         int64_t head, int64_t block, int64_t from, int64_t to)
{
    const Layer *layer = call->layer;
    int64_t count = task->queries * layer->group, base = (head - task->head) * count;
    int64_t key_floats = key_row.vectors * W, value_floats = value_row.vectors * W;
    int64_t key_offset = head * key_row.dim * size_of(key_row.dtype);
    int64_t value_offset = head * value_row.dim * size_of(value_row.dtype);
    const char *key_copies[BLOCK], *value_copies[BLOCK];
    int key_dtype = key_row.dtype, value_dtype = value_row.dtype;
    int shared = count > ROWS && key_row.dtype != FLOAT32; /* convert once for all row tiles */
    if (shared || !key_row.direct) {
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
    int64_t start = call->batch->prefix_lens[task->sequence] + task->query;
    int64_t tiles = (count + ROWS - 1) / ROWS; /* tiles of rows; their sizes differ by one at most */
    Range seen[count];
    for (int64_t query = 0, row = 0; query < task->queries; query++) {
        Range own = seen_of(layer, start + query, block, BLOCK);
        for (int64_t i = 0; i < layer->group; i++)
            seen[row++] = own;
    }
    /* All scores first, then all sums, so that keys and values need not be in the L1 cache together. */
    for (int64_t tile = 0; tile < tiles; tile++) {
        int64_t row = count * tile / tiles, rows = count * (tile + 1) / tiles - row;
        Range any = {BLOCK, 0};
        for (int64_t r = row; r < row + rows; r++)
            if (seen[r].begin < seen[r].end)
                any = (Range){smaller_of(any.begin, seen[r].begin), larger_of(any.end, seen[r].end)};
        if (any.begin < any.end)
            score[key_dtype][rows - 1](key_row.vectors, (float)call->scale, s->q + (base + row) * key_floats, keys,
                                       key_offset, any.begin / 4 * 4, (any.end + 3) / 4 * 4, next_keys,
                                       s->scores + row * BLOCK);
        next_keys = NULL; /* the first tile has prefetched them */
    }
    for (int64_t row = 0; row < count; row++) {
        s->factors[row] = 1;
        if (seen[row].begin < seen[row].end)
            s->factors[row] = weigh(s->scores + row * BLOCK, seen[row].begin, seen[row].end, (float)call->softcap,
                                    &s->maximum[base + row], s->weight + (base + row) * W);
    }
    /* A row skips values that it does not see rather than weighting them by 0, since they may be NaN. Values are added
     * in order: those before the range that all rows of the tile see, that range, then the rest. */
    for (int64_t tile = 0; tile < tiles; tile++) {
        int64_t row = count * tile / tiles, rows = count * (tile + 1) / tiles - row;
        Range common = {0, BLOCK};
        for (int64_t r = row; r < row + rows; r++)
            common = (Range){larger_of(common.begin, seen[r].begin), smaller_of(common.end, seen[r].end)};
        if (common.begin >= common.end)
            common = (Range){BLOCK, BLOCK};
        for (int part = 0; part < 3; part++) {
            if (part == 1 && common.begin < common.end) {
                weigh_values[value_dtype][rows - 1](value_row.vectors, s->scores + row * BLOCK, values, value_offset,
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
                    weigh_values[value_dtype][0](value_row.vectors, s->scores + r * BLOCK, values, value_offset,
                                                 own.begin, own.end, &s->factors[r], NULL,
                                                 s->sums + (base + r) * value_floats);
                    s->factors[r] = 1;
                }
            }
        }
        next_values = NULL;
    }
}

/* Runs a task. `next` is the thread's next task, whose first keys and values are prefetched, or NULL. */
static void run_float_task(const Call *call, const Task *task, const Task *next, float *memory)
{
    const Batch *batch = call->batch;
    const Layer *layer = call->layer;
    Row key_row = row_of((int)layer->dtype, layer->key_dim), value_row = row_of((int)layer->dtype, layer->value_dim);
    int64_t key_floats = key_row.vectors * W, value_floats = value_row.vectors * W;
    int64_t per_head = task->queries * layer->group, rows = task->heads * per_head;
    int64_t token = batch->offsets[task->sequence] + task->query;
    int64_t start = batch->prefix_lens[task->sequence] + task->query, last = start + task->queries - 1;
    Scratch s = scratch_at(memory, rows, per_head, key_floats, value_floats);

    for (int64_t row = 0; row < rows; row++) {
        int64_t head = (task->head + row / per_head) * layer->group + row % layer->group;
        int64_t query = token + row % per_head / layer->group;
        float *q = s.q + row * key_floats;
        unpack(key_row, call->query + query * call->query_token + head * call->query_head, q);
        s.total_maximum[row] = MINUS_INFINITY;
        s.total_weight[row] = 0;
    }
    memset(s.totals, 0, (size_t)(rows * value_floats) * sizeof(float));

    int64_t first = first_key(layer, start), chunk_floats = value_floats + 2;
    int64_t key_bytes = layer->key_dim * size_of(key_row.dtype);
    int64_t value_bytes = layer->value_dim * size_of(value_row.dtype);
    Range seen = range_of(call, task), then = next ? range_of(call, next) : (Range){0, 0};
    const char *keys[2][BLOCK], *values[2][BLOCK]; /* of this block, and of the next one */
    int now = 0;
    locate(call, task->sequence, seen.begin / BLOCK * BLOCK, BLOCK, seen, keys[now], values[now]);
    for (int64_t block = seen.begin / BLOCK * BLOCK; block < seen.end; block += BLOCK, now = 1 - now) {
        int64_t chunk = block / CHUNK;
        if (block % CHUNK == 0 || block <= seen.begin) {
            memset(s.sums, 0, (size_t)(rows * value_floats) * sizeof(float));
            memset(s.weight, 0, (size_t)(rows * W) * sizeof(float));
            for (int64_t row = 0; row < rows; row++)
                s.maximum[row] = MINUS_INFINITY;
        }
        const Task *following = block + BLOCK < seen.end ? task : next;
        int fetch = following && task->queries == 1; /* several queries are compute-bound */
        Ahead next_keys = {keys[1 - now], 0, 0, 0, task->heads, 0};
        Ahead next_values = {values[1 - now], 0, 0, 0, task->heads, 0};
        if (following) {
            locate(call, following->sequence, following == task ? block + BLOCK : then.begin / BLOCK * BLOCK, BLOCK,
                   following == task ? seen : then, keys[1 - now], values[1 - now]);
            next_keys.offset = following->head * key_bytes, next_keys.bytes = following->heads * key_bytes;
            next_values.offset = following->head * value_bytes, next_values.bytes = following->heads * value_bytes;
        }
        for (int64_t head = task->head; head < task->head + task->heads; head++)
            attend_block(call, task, &s, key_row, value_row, keys[now], values[now], fetch ? &next_keys : NULL,
                         fetch ? &next_values : NULL, head, block, larger_of(seen.begin - block, 0),
                         smaller_of(seen.end - block, BLOCK));
        if (fetch) { /* the rest of the block */
            prefetch(&next_keys, BLOCK * task->heads);
            prefetch(&next_values, BLOCK * task->heads);
        }
        if (block + BLOCK < smaller_of((chunk + 1) * CHUNK, seen.end))
            continue;
        for (int64_t row = 0; row < rows; row++) { /* the chunk is complete */
            int64_t position = start + row % per_head / layer->group;
            float weight = sum(load(s.weight + row * W));
            if (task->split >= 0) {
                float *part = call->plan->partials + task->partial
                              + ((chunk - first / CHUNK) * rows + row) * chunk_floats;
                memcpy(part, s.sums + row * value_floats, (size_t)value_floats * sizeof(float));
                part[value_floats] = s.maximum[row], part[value_floats + 1] = weight;
            } else if (first_key(layer, position) < (chunk + 1) * CHUNK && position >= chunk * CHUNK) {
                fold(value_row.vectors, s.maximum[row], weight, s.sums + row * value_floats, &s.total_maximum[row],
                     &s.total_weight[row], s.totals + row * value_floats);
            }
        }
    }
    if (task->split >= 0) {
        /* The thread that computes the last part reduces the tile, from the first chunk to the last. */
        int64_t *pending = call->plan->pending + task->split;
        int64_t left = __atomic_sub_fetch(pending, task->chunks, __ATOMIC_ACQ_REL);
        if (left)
            return;
        int64_t chunks = last / CHUNK - first / CHUNK + 1;
        __atomic_store_n(pending, chunks, __ATOMIC_RELAXED); /* for the next call with this plan */
        for (int64_t chunk = 0; chunk < chunks; chunk++)
            for (int64_t row = 0; row < rows; row++) {
                int64_t position = start + row % per_head / layer->group, from = (chunk + first / CHUNK) * CHUNK;
                const float *part = call->plan->partials + task->partial + (chunk * rows + row) * chunk_floats;
                if (first_key(layer, position) < from + CHUNK && position >= from)
                    fold(value_row.vectors, part[value_floats], part[value_floats + 1], part, &s.total_maximum[row],
                         &s.total_weight[row], s.totals + row * value_floats);
            }
    }
    for (int64_t row = 0; row < rows; row++) {
        int64_t head = (task->head + row / per_head) * layer->group + row % layer->group;
        pack(value_row, s.totals + row * value_floats,
             normalizer(call, head, s.total_maximum[row], s.total_weight[row]),
             out_at(call, token + row % per_head / layer->group, head));
    }
}

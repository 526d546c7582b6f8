/* Arguments of the entry points of paged_attention.c; models/attention/compiled_library.py mirrors these structures. */
#pragma once
#include "threads.h"
#include "vectors.h"

enum { FULL, WINDOW, CHUNKED };

/* The batch of one forward: each sequence has `prefix_lens` tokens in its pages and `query_lens` new ones. */
typedef struct {
    int64_t sequences, width, page_size, slab_pages, slabs, tokens;
    const int64_t *page_tables; /* [sequences, width] page ids: slab * slab_pages + page in slab */
    const int64_t *prefix_lens; /* [sequences] */
    const int64_t *query_lens;  /* [sequences] */
    int64_t *offsets;           /* [sequences] index of each sequence's first new token; set by rollout_prepare */
    int64_t *slot_mapping;      /* [tokens] page id * page_size + offset in page; set by rollout_prepare */
} Batch;

/* An attention layer: shapes, mask, and the addresses of its keys and values. */
typedef struct {
    int64_t dtype, kv_heads, group, key_dim, value_dim, mask_kind, mask_size;
    const int64_t *keys;   /* [slabs] addresses of [slab_pages, page_size, kv_heads, key_dim]; 0: dropped slab */
    const int64_t *values; /* [slabs] likewise with value_dim */
} Layer;

/* A unit of work: queries of one sequence, key heads, and chunks of the keys that the queries see. */
typedef struct {
    int64_t sequence, query, queries, head, heads, chunk, chunks;
    int64_t split;   /* index of the split tile this task is a part of; -1: not split, the task sees all chunks */
    int64_t partial; /* offset of that tile's parts in `partials` */
    int64_t cost;
} Task;

typedef struct {
    int64_t tasks, splits, partial_floats, scratch_floats;
} Sizes;

typedef struct {
    Task *tasks;
    int64_t *pending; /* [splits] parts of each split tile that are not computed yet */
    float *partials;
    float *scratch;   /* [threads, scratch_floats] */
    Sizes sizes;
} Plan;

/* One call of the kernel; strides are in bytes. */
typedef struct {
    const Batch *batch;
    const Layer *layer;
    const Plan *plan;
    const char *query;  /* [tokens, kv_heads * group, key_dim] */
    const char *key;    /* [tokens, kv_heads, key_dim] */
    const char *value;  /* [tokens, kv_heads, value_dim] */
    char *out;          /* [tokens, kv_heads * group, value_dim], contiguous */
    int64_t query_token, query_head, key_token, key_head, value_token, value_head;
    const float *sinks; /* [kv_heads * group], or NULL */
    double scale, softcap; /* softcap 0: no softcap */
    int64_t threads;
    Parallel *parallel; /* or NULL: one thread */
} Call;

/* What the workers of one call share. The caller sets `call`, and the rest to zero before any worker begins. */
typedef struct {
    const Call *call;
    int64_t written, next, workers; /* atomic counters: tokens and tasks taken, workers that have begun */
} AttendTeam;

/* The signatures of `write_token` and `run_tasks`, which other kernels call by their addresses in paged_attention.c. */
typedef void WriteToken(const Call *call, int64_t token);
typedef void RunTasks(AttendTeam *team);

#define BLOCK 32                 /* positions per block; keys and values of two blocks fit into the L1 cache */
#define CHUNK 512                /* positions per chunk */
#define SHARED_ROWS 24           /* most rows of a tile with several queries, unless one query has more */
#define STATE_FLOATS (32 * 1024) /* a task takes one head, or as many as keep its state below this */
#define TASKS_PER_THREAD 4       /* tiles are split to make at least this many tasks */
#define ALONE_BYTES (16 * 1024)  /* fewer new bytes than this are written by one thread */
#define MINUS_INFINITY (-__builtin_inff())

INLINE int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }

/* Returns the earliest position that a query at `position` sees. */
INLINE int64_t first_key(const Layer *layer, int64_t position)
{
    if (layer->mask_kind == WINDOW)
        return larger_of(position - layer->mask_size + 1, 0);
    if (layer->mask_kind == CHUNKED)
        return position / layer->mask_size * layer->mask_size;
    return 0;
}

/* What the entry points of paged_attention.c are called with; models/attention/compiled_library.py has the same
 * structures. */
#include "vectors.h"

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
    int64_t dtype, kv_heads, group, key_dim, value_dim, mask_kind, mask_size;
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
    double scale, softcap; /* softcap 0: none */
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
    if (site->mask_kind == WINDOW)
        return larger_of(position - site->mask_size + 1, 0);
    if (site->mask_kind == CHUNKED)
        return position / site->mask_size * site->mask_size;
    return 0;
}

/* Entry points of products with packed weights; models/patches/compiled_products.py builds, loads and calls them. */
#include "products.h"
#include "threads.h"

/* Bytes of weight below which one thread packs, and operations below which one thread multiplies. */
#define PACKED_ALONE (64 << 10)
#define MULTIPLIED_ALONE (256 << 10)

typedef struct {
    void (*run)(const void *call, int64_t task, char *scratch);
    const void *call;
    int64_t tasks, scratch_bytes;
    char *scratch;
    int64_t next, worker;
} Team;

static void run_tasks(void *data)
{
    Team *team = data;
    char *scratch = team->scratch + __atomic_fetch_add(&team->worker, 1, __ATOMIC_RELAXED) * team->scratch_bytes;
    for (;;) {
        int64_t task = __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED);
        if (task >= team->tasks)
            return;
        team->run(team->call, task, scratch);
    }
}

/* ---- packing ------------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t dtype, outputs, inputs, row_bytes;
    const char *weight;
    char *packed;
} Packing;

static void pack_task(const void *call, int64_t task, char *scratch)
{
    const Packing *c = call;
    (void)scratch;
    pack_panel(c->dtype, c->outputs, c->inputs, c->weight, c->row_bytes, c->packed, task);
}

int64_t rollout_packed_bytes(int64_t dtype, int64_t outputs, int64_t inputs)
{
    return packed_bytes(dtype, outputs, inputs);
}

/* Packs a weight [outputs, inputs], whose rows are `row_bytes` apart, by `threads` threads. */
void rollout_pack_weight(int64_t dtype, int64_t outputs, int64_t inputs, const char *weight, int64_t row_bytes,
                         char *packed, int64_t threads, Parallel *parallel)
{
    Packing call = {dtype, outputs, inputs, row_bytes, weight, packed};
    Team team = {pack_task, &call, parts_of(outputs, PANEL), 0, NULL, 0, 0};
    if (threads > 1 && parallel && packed_bytes(dtype, outputs, inputs) > PACKED_ALONE)
        parallel(run_tasks, &team, (unsigned)threads, 0);
    else
        run_tasks(&team);
}

/* ---- products ------------------------------------------------------------------------------------------------ */

typedef struct {
    const Product *product;
    int64_t rows, x_row_bytes, out_row_bytes, threads;
    const char *x;
    char *out;
} Multiplication;

static void multiply_task(const void *call, int64_t task, char *scratch)
{
    const Multiplication *c = call;
    product_task(c->product, c->rows, c->x, c->x_row_bytes, c->out, c->out_row_bytes, task, c->threads, scratch);
}

/* out = x weight^T + bias, for `rows` rows. Returns 0, or 1 if there is no memory to work in. */
int64_t rollout_multiply(const Product *product, int64_t rows, const char *x, int64_t x_row_bytes, char *out,
                         int64_t out_row_bytes, int64_t threads, Parallel *parallel)
{
    if (!parallel || rows * product->inputs * product->outputs < MULTIPLIED_ALONE)
        threads = 1;
    int64_t bytes = (product_scratch_bytes(product, rows) + 127) / 64 * 64; /* no false sharing */
    char *scratch = aligned_alloc(64, (size_t)(bytes * threads));
    if (!scratch)
        return 1;
    Multiplication call = {product, rows, x_row_bytes, out_row_bytes, threads, x, out};
    Team team = {multiply_task, &call, product_tasks(product, rows, threads), bytes, scratch, 0, 0};
    if (threads > 1)
        parallel(run_tasks, &team, (unsigned)threads, 0);
    else
        run_tasks(&team);
    free(scratch);
    return 0;
}

/* ---- parts of a product, for kernels whose threads run already ------------------------------------------------ */

int64_t rollout_product_tasks(const Product *p, int64_t rows, int64_t threads)
{
    return product_tasks(p, rows, threads);
}

int64_t rollout_product_scratch_bytes(const Product *p, int64_t rows) { return product_scratch_bytes(p, rows); }

void rollout_product_task(const Product *p, int64_t rows, const char *x, int64_t x_row_bytes, char *out,
                          int64_t out_row_bytes, int64_t task, int64_t threads, char *scratch)
{
    product_task(p, rows, x, x_row_bytes, out, out_row_bytes, task, threads, scratch);
}

/* Returns whether the CPU has fused multiply-adds of vectors: without, other libraries are as fast. */
int64_t rollout_products_are_fused(void)
{
#if defined(__AVX512F__) || (defined(__AVX__) && defined(__FMA__)) || defined(__aarch64__)
    return 1;
#else
    return 0;
#endif
}

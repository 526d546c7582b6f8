/* All decoder layers of a forward in one call, for models of Llama's form; models/patches/decoder_stack.py recognises
 * them, and models/patches/decoder_library.py builds, loads and calls this.
 *
 * A layer is: norm, product of query, key and value, norm of heads (if the family has one), rotary embedding, writing of
 * keys and values to their pages, attention, output product, residual sum, norm, product of gate and up, gated
 * activation, down product, residual sum. Results are rounded to the dtype exactly where the modules round, and a
 * token's result does not depend on the batch composition, bit for bit, since this holds for each part.
 *
 * One team of threads runs all layers. Each phase's work is taken from a counter of its own, with a barrier between
 * phases (the rules of `threads.h`). A phase of little work before a product (a norm, an activation) is not worth a
 * barrier: each thread then computes all of its rows for itself, when it has taken its first part of the product.
 */
#include "attention_call.h"
#include "pointwise_rows.h"
#include "products_call.h"
#include "threads.h"

typedef struct {
    const Product *heads; /* query, key and value, by rows */
    const Product *output;
    const Product *gate_up;
    const Product *down;
    const float *norm, *mlp_norm;         /* factors [hidden], see `norm_row` */
    const float *query_norm, *key_norm;   /* factors [dim], or NULL */
    const Layer *attention;
    int64_t plan;                         /* index of its attention's plan */
} DecoderLayer;

/* One forward. Matrices are contiguous. */
typedef struct {
    int64_t dtype, layers, tokens, hidden, inner, heads, kv_heads, dim;
    int64_t late, heads_late;        /* see `norm_row`: of the norms of hidden states, and of heads */
    double eps, heads_eps, scale;
    const DecoderLayer *layer;       /* [layers] */
    const float *last_norm;          /* factors [hidden] of the norm after the last layer */
    const Batch *batch;
    const Plan *const *plans;
    const char *embedded;            /* [tokens, hidden] */
    const char *cosines, *sines;     /* [tokens, dim] */
    char *out;                       /* [tokens, hidden] */
    char *memory;                    /* `rollout_stack_bytes`, aligned to 64 */
    int64_t threads;
    Parallel *parallel;              /* NULL: one thread */
    Barrier *barrier;
    ProductTasks *product_tasks;
    ProductScratchBytes *product_scratch_bytes;
    ProductTask *product_task;
    WriteToken *write_token;
    RunTasks *run_attention;
} Stack;

/* Phases of a layer that take work from a counter; attention has counters of its own. */
enum { NORM, HEADS, ROTATION, OUTPUT, MLP_NORM, GATE_UP, GATED, DOWN, PHASES };

#define LINE 64 /* bytes of a cache line */
/* Norms of at most so many numbers, and activations, are computed by each thread for itself. */
#define OWN_NORM 8192
#define OWN_GATED 2048
/* Numbers that a thread takes at once, where there are many. */
#define AT_ONCE 4096

typedef struct {
    _Alignas(LINE) int64_t next;
} Counter;

/* What the threads of a forward share. */
typedef struct {
    const Stack *stack;
    Counter *counters;    /* [layers, PHASES], and one for the last norm */
    Call *calls;          /* [layers] */
    AttendTeam *attends;  /* [layers] */
    char *sums[2];        /* [tokens, hidden] residual stream: before and after attention's sum, in turn */
    char *normed;         /* [tokens, hidden] */
    char *product;        /* [tokens, hidden] output of attention or MLP */
    char *heads;          /* [tokens, heads + 2 kv_heads, dim] */
    char *attended;       /* [tokens, heads, dim] */
    char *gate_up;        /* [tokens, 2, inner] */
    char *gated;          /* [tokens, inner] */
    char *own;            /* [threads, own_bytes] */
    int64_t own_bytes, scratch_bytes, members;
} Run;

/* What a thread has for itself. */
typedef struct {
    Run *run;
    char *scratch; /* of products */
    char *rows;    /* of norms and activations */
} Member;

/* ---- rows ------------------------------------------------------------------------------------------------------ */

static void norm_of(int64_t dtype, int64_t late, const Norm *norm, const char *x, char *out)
{
    if (dtype == FLOAT32)
        norm_row(FLOAT32, 1, norm, x, out);
    else if (late)
        norm_row(BFLOAT16, 1, norm, x, out);
    else
        norm_row(BFLOAT16, 0, norm, x, out);
}

static void sum_of(int64_t dtype, int64_t width, const char *x, const char *y, char *out)
{
    if (dtype == FLOAT32)
        add_row(FLOAT32, width, x, y, out);
    else
        add_row(BFLOAT16, width, x, y, out);
}

static void gated_of(int64_t dtype, int64_t width, const char *gate, const char *up, char *out)
{
    if (dtype == FLOAT32)
        gated_row(FLOAT32, width, gate, up, out);
    else
        gated_row(BFLOAT16, width, gate, up, out);
}

static void rotated_of(int64_t dtype, int64_t dim, const char *cosines, const char *sines, char *head)
{
    if (dtype == FLOAT32)
        rotate_head(FLOAT32, dim, cosines, sines, head, head);
    else
        rotate_head(BFLOAT16, dim, cosines, sines, head, head);
}

/* ---- parts of a layer ------------------------------------------------------------------------------------------ */

static int64_t take(Counter *counter, int64_t count)
{
    return __atomic_fetch_add(&counter->next, count, __ATOMIC_RELAXED);
}

static void wait_for_others(const Stack *s)
{
    if (s->barrier)
        s->barrier();
}

/* Returns how many rows of a width a thread takes at once. */
static int64_t rows_at_once(const Stack *s, int64_t width)
{
    int64_t fair = (s->tokens + 4 * s->threads - 1) / (4 * s->threads), most = (AT_ONCE + width - 1) / width;
    return smaller_of(larger_of(fair, 1), larger_of(most, 1));
}

/* The input of a norm: hidden states, and what is to be added to them first. */
typedef struct {
    const char *hidden;
    const char *added; /* or NULL */
    char *sums;        /* where the sums go */
    Norm norm;
} Normed;

/* Norms some rows; `keep`: stores the sums as well. */
static void norm_rows(const Stack *s, const Normed *n, int64_t from, int64_t to, int keep, char *out)
{
    int64_t bytes = s->hidden * size_of((int)s->dtype);
    for (int64_t row = from; row < to; row++) {
        const char *x = n->hidden + row * bytes;
        if (n->added) {
            char *summed = (keep ? n->sums : out) + row * bytes;
            sum_of(s->dtype, s->hidden, x, n->added + row * bytes, summed);
            x = summed;
        }
        norm_of(s->dtype, s->late, &n->norm, x, out + row * bytes);
    }
}

static void multiply(Member *m, const Product *p, const char *x, char *out, Counter *counter, int64_t task)
{
    const Stack *s = m->run->stack;
    int64_t size = size_of((int)s->dtype), tasks = s->product_tasks(p, s->tokens, s->threads);
    for (; task < tasks; task = take(counter, 1))
        s->product_task(p, s->tokens, x, p->inputs * size, out, p->outputs * size, task, s->threads, m->scratch);
}

/* out = norm(hidden + added) * weight^T */
static void norm_and_multiply(Member *m, const Normed *n, const Product *p, char *out, Counter *norms,
                              Counter *products)
{
    Run *run = m->run;
    const Stack *s = run->stack;
    if (s->tokens * s->hidden <= OWN_NORM) {
        int64_t task = take(products, 1);
        if (task >= s->product_tasks(p, s->tokens, s->threads))
            return;
        norm_rows(s, n, 0, s->tokens, task == 0, m->rows); /* only one thread has task 0 */
        multiply(m, p, m->rows, out, products, task);
        return;
    }
    int64_t count = rows_at_once(s, s->hidden);
    for (int64_t row = take(norms, count); row < s->tokens; row = take(norms, count))
        norm_rows(s, n, row, smaller_of(row + count, s->tokens), 1, run->normed);
    wait_for_others(s);
    multiply(m, p, run->normed, out, products, take(products, 1));
}

static void gate_rows(const Stack *s, const char *gate_up, int64_t from, int64_t to, char *out)
{
    int64_t bytes = s->inner * size_of((int)s->dtype);
    for (int64_t row = from; row < to; row++) {
        const char *gate = gate_up + row * 2 * bytes;
        gated_of(s->dtype, s->inner, gate, gate + bytes, out + row * bytes);
    }
}

/* product = (silu(gate) * up) * weight^T */
static void gate_and_multiply(Member *m, const Product *p, Counter *gates, Counter *products)
{
    Run *run = m->run;
    const Stack *s = run->stack;
    if (s->tokens * s->inner <= OWN_GATED) {
        int64_t task = take(products, 1);
        if (task >= s->product_tasks(p, s->tokens, s->threads))
            return;
        gate_rows(s, run->gate_up, 0, s->tokens, m->rows);
        multiply(m, p, m->rows, run->product, products, task);
        return;
    }
    int64_t count = rows_at_once(s, s->inner);
    for (int64_t row = take(gates, count); row < s->tokens; row = take(gates, count))
        gate_rows(s, run->gate_up, row, smaller_of(row + count, s->tokens), run->gated);
    wait_for_others(s);
    multiply(m, p, run->gated, run->product, products, take(products, 1));
}

/* Norms and rotates the heads of queries and keys in place, and writes keys and values to their pages. */
static void rotate_and_write(const Run *run, const DecoderLayer *layer, const Call *call, Counter *counter)
{
    const Stack *s = run->stack;
    int64_t head_bytes = s->dim * size_of((int)s->dtype), all = s->heads + 2 * s->kv_heads;
    int64_t count = rows_at_once(s, all * s->dim);
    Norm query_norm = {s->dim, layer->query_norm, (float)s->heads_eps};
    Norm key_norm = {s->dim, layer->key_norm, (float)s->heads_eps};
    for (int64_t from = take(counter, count); from < s->tokens; from = take(counter, count))
        for (int64_t token = from; token < smaller_of(from + count, s->tokens); token++) {
            const char *cosines = s->cosines + token * head_bytes, *sines = s->sines + token * head_bytes;
            for (int64_t i = 0; i < s->heads + s->kv_heads; i++) {
                const Norm *norm = i < s->heads ? &query_norm : &key_norm;
                char *head = run->heads + (token * all + i) * head_bytes;
                if (norm->factors)
                    norm_of(s->dtype, s->heads_late, norm, head, head);
                rotated_of(s->dtype, s->dim, cosines, sines, head);
            }
            s->write_token(call, token);
        }
}

/* ---- a thread -------------------------------------------------------------------------------------------------- */

static void last_norm(const Run *run, const Normed *n)
{
    const Stack *s = run->stack;
    Counter *counter = &run->counters[s->layers * PHASES];
    int64_t count = rows_at_once(s, s->hidden);
    for (int64_t row = take(counter, count); row < s->tokens; row = take(counter, count))
        norm_rows(s, n, row, smaller_of(row + count, s->tokens), 0, s->out);
}

static void work(void *data)
{
    Run *run = data;
    const Stack *s = run->stack;
    char *own = run->own + __atomic_fetch_add(&run->members, 1, __ATOMIC_RELAXED) * run->own_bytes;
    Member member = {run, own, own + run->scratch_bytes};
    const char *hidden = s->embedded, *added = NULL;
    for (int64_t i = 0; i < s->layers; i++) {
        const DecoderLayer *layer = &s->layer[i];
        Counter *counters = run->counters + i * PHASES;
        Normed n = {hidden, added, run->sums[0], {s->hidden, layer->norm, (float)s->eps}};
        norm_and_multiply(&member, &n, layer->heads, run->heads, &counters[NORM], &counters[HEADS]);
        hidden = added ? run->sums[0] : hidden;
        wait_for_others(s);
        rotate_and_write(run, layer, &run->calls[i], &counters[ROTATION]);
        wait_for_others(s);
        s->run_attention(&run->attends[i]);
        wait_for_others(s);
        multiply(&member, layer->output, run->attended, run->product, &counters[OUTPUT], take(&counters[OUTPUT], 1));
        wait_for_others(s);
        n = (Normed){hidden, run->product, run->sums[1], {s->hidden, layer->mlp_norm, (float)s->eps}};
        norm_and_multiply(&member, &n, layer->gate_up, run->gate_up, &counters[MLP_NORM], &counters[GATE_UP]);
        hidden = run->sums[1];
        wait_for_others(s);
        gate_and_multiply(&member, layer->down, &counters[GATED], &counters[DOWN]);
        added = run->product;
        wait_for_others(s);
    }
    last_norm(run, &(Normed){hidden, added, NULL, {s->hidden, s->last_norm, (float)s->eps}});
}

/* ---- memory and entry points ----------------------------------------------------------------------------------- */

static int64_t aligned(int64_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }

/* Returns memory at an offset, which it advances. */
static char *part(const Stack *s, int64_t *offset, int64_t bytes)
{
    char *memory = s->memory + *offset;
    *offset += aligned(bytes);
    return memory;
}

/* Lays out the memory; returns its size. */
static int64_t lay_out(const Stack *s, Run *run)
{
    int64_t row = s->tokens * size_of((int)s->dtype), scratch = 0, at = 0;
    int64_t own = larger_of(s->tokens * s->hidden <= OWN_NORM ? row * s->hidden : 0,
                            s->tokens * s->inner <= OWN_GATED ? row * s->inner : 0);
    for (int64_t i = 0; i < s->layers; i++) {
        const Product *products[] = {s->layer[i].heads, s->layer[i].output, s->layer[i].gate_up, s->layer[i].down};
        for (int64_t j = 0; j < 4; j++)
            scratch = larger_of(scratch, s->product_scratch_bytes(products[j], s->tokens));
    }
    *run = (Run){.stack = s, .own_bytes = aligned(own) + aligned(scratch), .scratch_bytes = aligned(scratch)};
    run->counters = (Counter *)part(s, &at, (s->layers * PHASES + 1) * (int64_t)sizeof(Counter));
    run->calls = (Call *)part(s, &at, s->layers * (int64_t)sizeof(Call));
    run->attends = (AttendTeam *)part(s, &at, s->layers * (int64_t)sizeof(AttendTeam));
    run->own = part(s, &at, larger_of(s->threads, 1) * run->own_bytes);
    run->sums[0] = part(s, &at, row * s->hidden);
    run->sums[1] = part(s, &at, row * s->hidden);
    run->normed = part(s, &at, row * s->hidden);
    run->product = part(s, &at, row * s->hidden);
    int64_t mlp = at; /* attention and MLP do not need their memory at the same time */
    run->heads = part(s, &at, row * (s->heads + 2 * s->kv_heads) * s->dim);
    run->attended = part(s, &at, row * s->heads * s->dim);
    run->gate_up = part(s, &mlp, row * 2 * s->inner);
    run->gated = part(s, &mlp, row * s->inner);
    return larger_of(at, mlp);
}

int64_t rollout_stack_bytes(const Stack *s)
{
    Run run;
    return lay_out(s, &run);
}

/* Runs all layers and the last norm. */
void rollout_run_stack(const Stack *s)
{
    Run run;
    lay_out(s, &run);
    memset(run.counters, 0, (size_t)(s->layers * PHASES + 1) * sizeof(Counter));
    int64_t head = s->dim * size_of((int)s->dtype), token = (s->heads + 2 * s->kv_heads) * head;
    for (int64_t i = 0; i < s->layers; i++) {
        const DecoderLayer *layer = &s->layer[i];
        run.calls[i] = (Call){
            .batch = s->batch, .layer = layer->attention, .plan = s->plans[layer->plan], .query = run.heads,
            .key = run.heads + s->heads * head, .value = run.heads + (s->heads + s->kv_heads) * head,
            .out = run.attended, .query_token = token, .query_head = head, .key_token = token, .key_head = head,
            .value_token = token, .value_head = head, .scale = s->scale, .threads = s->threads,
        };
        run.attends[i] = (AttendTeam){.call = &run.calls[i]};
    }
    if (s->parallel && s->barrier && s->threads > 1)
        s->parallel(work, &run, (unsigned)s->threads, 0);
    else
        work(&run);
}

/* Attention over paged keys and values on a CPU: what models/attention/compiled.py builds, loads and calls.
 *
 * One call serves one attention site of one forward: it writes the new keys and values into their pages, and lets
 * every new token attend to what its sequence holds, itself included.
 *
 * The result of a token is the same to the bit whatever else is computed with it, because each query goes through a
 * sequence of operations that its position and its span alone decide:
 *   - keys are taken in blocks of BLOCK positions, counted from position 0 of the sequence: scores, running maximum,
 *     weights, weighted sum of values (an online softmax);
 *   - blocks make up chunks of CHUNK positions, each summed on its own and folded into the result in order, so that
 *     different threads may compute the chunks of one long sequence;
 *   - all arithmetic is spelled out: fused multiply-adds are written as such, and the compiler is told to make none of
 *     its own and to reorder nothing.
 * Tiles of queries and heads share loaded keys and values; which rows share a tile changes nothing for any of them.
 * Keys, queries, values and sums stay in the order of `vectors.h`, and only the final store undoes it.
 */
#include "attention_call.h"
#include "attention_inner_loops.h"
#include "attention_tiles.h"

/* ---- threads ------------------------------------------------------------------------------------------------- */

typedef struct {
    const Call *call;
    int64_t next, worker;
} Team;

#define WRITTEN_AT_ONCE 16

static void write_tokens(void *data)
{
    Team *team = data;
    const Call *call = team->call;
    const Step *step = call->step;
    const Site *site = call->site;
    int64_t slab_slots = step->slab_pages * step->page_size, item = size_of((int)site->dtype);
    int64_t key_bytes = site->key_dim * item, value_bytes = site->value_dim * item;
    for (;;) {
        int64_t from = __atomic_fetch_add(&team->next, WRITTEN_AT_ONCE, __ATOMIC_RELAXED);
        if (from >= step->tokens)
            return;
        for (int64_t token = from; token < smaller_of(from + WRITTEN_AT_ONCE, step->tokens); token++) {
            int64_t slab = step->slots[token] / slab_slots, inside = step->slots[token] % slab_slots;
            char *key = (char *)(intptr_t)site->keys[slab] + inside * site->kv_heads * key_bytes;
            char *value = (char *)(intptr_t)site->values[slab] + inside * site->kv_heads * value_bytes;
            for (int64_t head = 0; head < site->kv_heads; head++) {
                const char *from_key = call->key + token * call->key_token + head * call->key_head;
                const char *from_value = call->value + token * call->value_token + head * call->value_head;
                memcpy(key + head * key_bytes, from_key, (size_t)key_bytes);
                memcpy(value + head * value_bytes, from_value, (size_t)value_bytes);
            }
        }
    }
}

static void run_tasks(void *data)
{
    Team *team = data;
    const Plan *plan = team->call->plan;
    int64_t worker = __atomic_fetch_add(&team->worker, 1, __ATOMIC_RELAXED);
    float *memory = plan->scratch + worker * plan->sizes.scratch_floats;
    int64_t tasks = plan->sizes.tasks, index = __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED);
    while (index < tasks) {
        /* To know the next task is to fetch its memory early; towards the end none is taken that another thread, with
         * nothing left to do, could begin now. */
        int64_t next = tasks;
        int early = index + 2 * team->call->threads < tasks || team->call->threads == 1;
        if (early)
            next = __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED);
        run_task(team->call, &plan->tasks[index], next < tasks ? &plan->tasks[next] : NULL, memory);
        index = early ? next : __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED);
    }
}

static void run_team(const Call *call, void (*work)(void *), int alone)
{
    Team team = {call, 0, 0};
    if (alone || call->threads <= 1 || !call->parallel)
        work(&team);
    else
        call->parallel(work, &team, (unsigned)call->threads, 0);
}

/* ---- entry points -------------------------------------------------------------------------------------------- */

int64_t rollout_has_float16(void) { return HAS_FLOAT16; }

/* Fills the step's offsets and slots. Every page that is written to must be in the table. */
void rollout_prepare(const Step *step)
{
    int64_t token = 0;
    for (int64_t s = 0; s < step->sequences; s++) {
        step->offsets[s] = token;
        for (int64_t i = 0; i < step->lengths[s]; i++) {
            int64_t position = step->starts[s] + i;
            int64_t page = step->tables[s * step->width + position / step->page_size];
            step->slots[token++] = page * step->page_size + position % step->page_size;
        }
    }
}

static int by_cost(const void *a, const void *b)
{
    int64_t x = ((const Task *)a)->cost, y = ((const Task *)b)->cost;
    return x < y ? 1 : x > y ? -1 : 0;
}

/* What the queries from `query` on that make a tile are, and what they cost. */
static Task tile_at(const Step *step, const Site *site, int64_t sequence, int64_t query)
{
    int64_t most = larger_of(TILE_ROWS / site->group, 1);
    int64_t queries = smaller_of(step->lengths[sequence] - query, most);
    int64_t start = step->starts[sequence] + query, last = start + queries - 1, first = first_key(site, start);
    int64_t keys = last + 1 - first;
    int64_t cost = (keys * queries + 16) * site->group * (site->key_dim + site->value_dim) * site->kv_heads;
    return (Task){sequence, query, queries, 0, site->kv_heads, first / CHUNK, last / CHUNK - first / CHUNK + 1, -1, 0, cost};
}

/* Divides the work of a site (of any site with its span and shape) among tasks.
 *
 * Called twice: without `tasks` it only fills `sizes`; then with the memory that those ask for. Returns 0, or
 * 1 + the index of a sequence with a page among those it needs that no slab holds. */
int64_t rollout_plan(const Step *step, const Site *site, int64_t threads, Sizes *sizes, Task *tasks, int64_t *pending)
{
    Row key_row = row_of((int)site->dtype, site->key_dim), value_row = row_of((int)site->dtype, site->value_dim);
    int64_t key_floats = key_row.vectors * W, value_floats = value_row.vectors * W;
    int64_t row_floats = key_floats + 2 * value_floats + W;
    int64_t total = 0;
    for (int64_t s = 0; s < step->sequences; s++) {
        if (!step->lengths[s])
            continue;
        int64_t from = first_key(site, step->starts[s]) / step->page_size;
        int64_t to = (step->starts[s] + step->lengths[s] - 1) / step->page_size;
        for (int64_t page = from; page <= to; page++) {
            int64_t id = page < step->width ? step->tables[s * step->width + page] : -1;
            if (id < 0 || id >= step->slabs * step->slab_pages || !site->keys[id / step->slab_pages])
                return 1 + s;
        }
        for (int64_t query = 0; query < step->lengths[s];) {
            Task tile = tile_at(step, site, s, query);
            total += tile.cost, query += tile.queries;
        }
    }
    int64_t fair = threads > 1 ? total / (threads * TASKS_PER_THREAD) : total;
    *sizes = (Sizes){0, 0, 0, 0};
    for (int64_t s = 0; s < step->sequences; s++)
        for (int64_t query = 0; query < step->lengths[s];) {
            Task tile = tile_at(step, site, s, query);
            query += tile.queries;
            /* One query goes through its heads block by block: pages are read from end to end. Several go head by
             * head: their keys stay in cache. */
            int64_t rows = tile.queries * site->group;
            int64_t heads = tile.queries > 1 || tile.cost > fair ? 1 : larger_of(STATE_FLOATS / (rows * row_floats), 1);
            int split = tile.cost / site->kv_heads > fair && tile.chunks > 1;
            for (int64_t head = 0; head < site->kv_heads; head += heads) {
                Task part = tile;
                part.head = head, part.heads = smaller_of(heads, site->kv_heads - head);
                part.cost = tile.cost * part.heads / site->kv_heads;
                int64_t floats = scratch_floats(rows * part.heads, rows, key_floats, value_floats);
                sizes->scratch_floats = larger_of(sizes->scratch_floats, floats);
                if (!split) {
                    if (tasks)
                        tasks[sizes->tasks] = part;
                    sizes->tasks++;
                    continue;
                }
                part.split = sizes->splits++, part.partial = sizes->partial_floats, part.cost /= tile.chunks;
                sizes->partial_floats += tile.chunks * rows * part.heads * (value_floats + 2);
                for (int64_t chunk = 0; chunk < tile.chunks; chunk++, sizes->tasks++)
                    if (tasks) {
                        part.chunk = tile.chunk + chunk, part.chunks = 1;
                        tasks[sizes->tasks] = part;
                        pending[part.split] = tile.chunks;
                    }
            }
        }
    if (tasks && threads > 1)
        qsort(tasks, (size_t)sizes->tasks, sizeof(Task), by_cost); /* the longest first: threads end together */
    return 0;
}

/* Writes the new keys and values of a site, then attends. */
void rollout_attend(const Call *call)
{
    const Site *site = call->site;
    int64_t bytes = call->step->tokens * site->kv_heads * (site->key_dim + site->value_dim) * size_of((int)site->dtype);
    run_team(call, write_tokens, bytes < ALONE_BYTES);
    run_team(call, run_tasks, call->plan->sizes.tasks <= 1);
}

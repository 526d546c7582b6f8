/* Attention over paged keys and values on a CPU; models/attention/compiled.py builds, loads and calls it.
 *
 * One call serves one attention layer of one forward: it writes the new keys and values to their pages, then lets every
 * new token attend to its sequence, itself included.
 *
 * The result of a token does not depend on the batch composition, bit for bit, because the operations on each query
 * depend only on its position and the layer's mask:
 *   - positions form chunks of CHUNK, counted from position 0 of the sequence; each is summed on its own and folded into
 *     the result in order, so that several threads can compute the chunks of one long sequence;
 *   - in bfloat16, where the CPU has instructions for it, a chunk is two products of packed tiles around a softmax
 *     (attention_bfloat16.h); one query and thousands go through the same sums in the same order;
 *   - else a chunk is processed in blocks of BLOCK positions by an online softmax in float: scores, running maximum,
 *     weights, weighted sum of values (attention_tiles.h);
 *   - fused multiply-adds are explicit, and compiler flags forbid further fusing and any reordering.
 * Rows of a tile share loaded keys and values; results do not depend on which rows share a tile. In float, keys,
 * queries, values and sums stay in the element order of `vectors.h`, which only the final store undoes.
 */
#include "attention_team.h"

/* ---- entry points -------------------------------------------------------------------------------------------- */

int64_t rollout_has_float16(void) { return HAS_FLOAT16; }

/* Fills the batch's offsets and slot_mapping. The page tables must name every page that is written. */
void rollout_prepare(const Batch *batch)
{
    int64_t token = 0;
    for (int64_t s = 0; s < batch->sequences; s++) {
        batch->offsets[s] = token;
        for (int64_t i = 0; i < batch->query_lens[s]; i++) {
            int64_t position = batch->prefix_lens[s] + i;
            int64_t page = batch->page_tables[s * batch->width + position / batch->page_size];
            batch->slot_mapping[token++] = page * batch->page_size + position % batch->page_size;
        }
    }
}

static int by_cost(const void *a, const void *b)
{
    int64_t x = ((const Task *)a)->cost, y = ((const Task *)b)->cost;
    return x < y ? 1 : x > y ? -1 : 0;
}

/* Returns the tile of queries that starts at `query`, and its cost. */
static Task tile_at(const Batch *batch, const Layer *layer, int64_t sequence, int64_t query)
{
    int64_t queries = smaller_of(batch->query_lens[sequence] - query, most_queries(layer));
    int64_t start = batch->prefix_lens[sequence] + query, last = start + queries - 1, first = first_key(layer, start);
    int64_t keys = last + 1 - first;
    int64_t cost = (keys * queries + 16) * layer->group * (layer->key_dim + layer->value_dim) * layer->kv_heads;
    return (Task){.sequence = sequence, .query = query, .queries = queries, .heads = layer->kv_heads,
                  .chunk = first / CHUNK, .chunks = last / CHUNK - first / CHUNK + 1, .split = -1, .cost = cost};
}

/* Divides the work of a layer into tasks; layers of the same mask and shape can share the plan.
 *
 * Called twice: without `tasks` it only fills `sizes`; then with memory of those sizes. Returns 0, or 1 + the index of
 * a sequence that needs a page which is in no slab. */
int64_t rollout_plan(const Batch *batch, const Layer *layer, int64_t threads, Sizes *sizes, Task *tasks,
                     int64_t *pending)
{
    int64_t value_floats = value_floats_of(layer), total = 0;
    for (int64_t s = 0; s < batch->sequences; s++) {
        if (!batch->query_lens[s])
            continue;
        int64_t from = first_key(layer, batch->prefix_lens[s]) / batch->page_size;
        int64_t to = (batch->prefix_lens[s] + batch->query_lens[s] - 1) / batch->page_size;
        for (int64_t page = from; page <= to; page++) {
            int64_t id = page < batch->width ? batch->page_tables[s * batch->width + page] : -1;
            if (id < 0 || id >= batch->slabs * batch->slab_pages || !layer->keys[id / batch->slab_pages])
                return 1 + s;
        }
        for (int64_t query = 0; query < batch->query_lens[s];) {
            Task tile = tile_at(batch, layer, s, query);
            total += tile.cost, query += tile.queries;
        }
    }
    int64_t fair = threads > 1 ? total / (threads * TASKS_PER_THREAD) : total;
    *sizes = (Sizes){0, 0, 0, 0};
    for (int64_t s = 0; s < batch->sequences; s++)
        for (int64_t query = 0; query < batch->query_lens[s];) {
            Task tile = tile_at(batch, layer, s, query);
            query += tile.queries;
            /* A single query takes all heads block by block, so that pages are read contiguously, if its chunks are
             * enough to share. Several queries take one head at a time, so that its keys stay in cache. */
            int64_t rows = tile.queries * layer->group;
            int single = tile.queries == 1 && tile.cost <= fair * tile.chunks;
            int64_t heads = single ? smaller_of(most_heads(layer), layer->kv_heads) : 1;
            int split = tile.cost * heads / layer->kv_heads > fair && tile.chunks > 1;
            for (int64_t head = 0; head < layer->kv_heads; head += heads) {
                Task part = tile;
                part.head = head, part.heads = smaller_of(heads, layer->kv_heads - head);
                part.cost = tile.cost * part.heads / layer->kv_heads;
                sizes->scratch_floats = larger_of(sizes->scratch_floats, task_floats(layer, tile.queries, part.heads));
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
        qsort(tasks, (size_t)sizes->tasks, sizeof(Task), by_cost); /* longest first, for balance */
    return 0;
}

static void write_alone(void *team) { write_tokens(team); }
static void attend_written(void *team) { run_tasks(team); }

static void run_team(AttendTeam *team, void (*work)(void *), int alone)
{
    const Call *call = team->call;
    if (alone || call->threads <= 1 || !call->parallel)
        work(team);
    else
        call->parallel(work, team, (unsigned)call->threads, 0);
}

/* Writes the new keys and values of a layer to their pages, then attends. */
void rollout_attend(const Call *call)
{
    const Layer *layer = call->layer;
    int64_t token_bytes = layer->kv_heads * (layer->key_dim + layer->value_dim) * size_of((int)layer->dtype);
    int64_t bytes = call->batch->tokens * token_bytes;
    AttendTeam team = {.call = call};
    run_team(&team, write_alone, bytes < ALONE_BYTES);
    run_team(&team, attend_written, call->plan->sizes.tasks <= 1);
}

/* ---- parts of a call, for kernels whose threads run already ---------------------------------------------------- */

void rollout_write_token(const Call *call, int64_t token) { write_token(call, token); }
void rollout_run_attention(AttendTeam *team) { run_tasks(team); }

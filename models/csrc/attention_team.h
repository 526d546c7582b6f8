/* Attention in a team of threads that runs already: every worker of the team takes tokens to write, then tasks. */
#pragma once
#include "attention_dispatch.h"

#define WRITTEN_AT_ONCE 16

/* Writes the new key and value of one token to their page. */
static void write_token(const Call *call, int64_t token)
{
    const Batch *batch = call->batch;
    const Layer *layer = call->layer;
    int64_t slab_slots = batch->slab_pages * batch->page_size, item = size_of((int)layer->dtype);
    int64_t slab = batch->slot_mapping[token] / slab_slots, inside = batch->slot_mapping[token] % slab_slots;
    int64_t key_bytes = layer->key_dim * item, value_bytes = layer->value_dim * item;
    char *key = (char *)(intptr_t)layer->keys[slab] + inside * layer->kv_heads * key_bytes;
    char *value = (char *)(intptr_t)layer->values[slab] + inside * layer->kv_heads * value_bytes;
    for (int64_t head = 0; head < layer->kv_heads; head++) {
        memcpy(key + head * key_bytes, call->key + token * call->key_token + head * call->key_head, (size_t)key_bytes);
        memcpy(value + head * value_bytes, call->value + token * call->value_token + head * call->value_head,
               (size_t)value_bytes);
    }
}

/* Writes new keys and values to their pages, a few tokens at a time, until all are taken. */
static void write_tokens(AttendTeam *team)
{
    int64_t tokens = team->call->batch->tokens;
    for (;;) {
        int64_t from = __atomic_fetch_add(&team->written, WRITTEN_AT_ONCE, __ATOMIC_RELAXED);
        if (from >= tokens)
            return;
        for (int64_t token = from; token < smaller_of(from + WRITTEN_AT_ONCE, tokens); token++)
            write_token(team->call, token);
    }
}

/* Runs tasks of the plan until all are taken; all keys and values must have been written. */
static void run_tasks(AttendTeam *team)
{
    const Plan *plan = team->call->plan;
    int64_t worker = __atomic_fetch_add(&team->workers, 1, __ATOMIC_RELAXED);
    float *memory = plan->scratch + worker * plan->sizes.scratch_floats;
    int64_t tasks = plan->sizes.tasks, index = __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED);
    while (index < tasks) {
        /* A thread takes its next task early to prefetch its memory, except towards the end, when an idle thread could
         * start that task now. */
        int64_t next = tasks;
        int early = index + 2 * team->call->threads < tasks || team->call->threads == 1;
        if (early)
            next = __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED);
        run_task(team->call, &plan->tasks[index], next < tasks ? &plan->tasks[next] : NULL, memory);
        index = early ? next : __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED);
    }
}

/* Work for test_threads.py: phases of tasks, each of which needs all tasks of the phase before. */
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

#include "threads.h"

typedef struct {
    int64_t phases, tasks, threads;
    Parallel *parallel;
    Barrier *barrier;
    int64_t *next;       /* [phases] next task of each phase that no member has taken */
    int64_t *done;       /* [phases] tasks that are done */
    int64_t *runs;       /* [phases, tasks] how often each task ran */
    int64_t early;       /* tasks that began before all tasks of the phase before were done */
    int64_t members;     /* members that ran the work */
    int64_t nested;      /* members of regions inside this one */
    int64_t sleep_us;    /* of each first task: as long as a member that has lost its core */
} Phases;

static void count(void *members) { __atomic_fetch_add((int64_t *)members, 1, __ATOMIC_SEQ_CST); }

static void work(void *data)
{
    Phases *p = data;
    __atomic_fetch_add(&p->members, 1, __ATOMIC_SEQ_CST);
    for (int64_t phase = 0; phase < p->phases; phase++) {
        for (;;) {
            int64_t task = __atomic_fetch_add(&p->next[phase], 1, __ATOMIC_RELAXED);
            if (task >= p->tasks)
                break;
            /* Neither access is atomic: the barrier alone must order them. */
            if (phase && p->runs[(phase - 1) * p->tasks + p->tasks - 1 - task] != 1)
                __atomic_fetch_add(&p->early, 1, __ATOMIC_SEQ_CST);
            if (!task && p->sleep_us)
                usleep((useconds_t)p->sleep_us);
            if (!task)
                p->parallel(count, &p->nested, (unsigned)p->threads, 0);
            p->runs[phase * p->tasks + task]++;
            __atomic_fetch_add(&p->done[phase], 1, __ATOMIC_SEQ_CST);
        }
        if (phase + 1 < p->phases)
            p->barrier();
    }
}

void run(Phases *p)
{
    p->parallel(work, p, (unsigned)p->threads, 0);
    p->barrier(); /* outside of a region: does nothing */
}

/* Runs `regions` regions, each with memory that is gone after it. Returns the number of regions with a fault. */
int64_t run_many(int64_t regions, int64_t most_phases, int64_t most_tasks, int64_t most_threads, unsigned seed,
                 Parallel *parallel, Barrier *barrier)
{
    int64_t faults = 0;
    for (int64_t region = 0; region < regions; region++) {
        Phases p = {1 + rand_r(&seed) % most_phases, 1 + rand_r(&seed) % most_tasks, 1 + rand_r(&seed) % most_threads,
                    parallel, barrier, NULL, NULL, NULL, 0, 0, 0, rand_r(&seed) % 64 ? 0 : 200};
        p.next = calloc((size_t)(p.phases * (p.tasks + 2)), sizeof(int64_t));
        p.done = p.next + p.phases, p.runs = p.done + p.phases;
        run(&p);
        int fault = p.early || p.members < 1 || p.members > p.threads || p.nested != p.phases;
        for (int64_t phase = 0; phase < p.phases; phase++) {
            fault |= p.done[phase] != p.tasks;
            for (int64_t task = 0; task < p.tasks; task++)
                fault |= p.runs[phase * p.tasks + task] != 1;
        }
        faults += fault;
        for (int64_t i = 0; i < p.phases * (p.tasks + 2); i++)
            p.next[i] = -1; /* a member that still ran would see it */
        free(p.next);
    }
    return faults;
}

/* Teams of threads that run the kernels; models/csrc/threads.py builds, loads and checks this. The contract is in
 * threads.h.
 *
 * A team is a calling thread and its workers. One word says where the team's region is: its epoch, which grows with
 * every phase; whether a region is open; and how many members are active, that is, run a kernel's code. A member that
 * comes to a barrier is no longer active. The last active member to come there has found no work left, and all work
 * that was taken is done: it starts the next epoch. The others become active again when they notice; whoever does not
 * run at that moment, since another program has its core, is not waited for. Likewise, the last active member to return
 * closes the region.
 *
 * Waiting: a member first spins, because a phase takes microseconds and waking a thread takes tens of them, and then
 * sleeps. A long wait for active members means that one of them has lost its core in the midst of a chunk, and the core
 * of whoever sleeps is where it can go on. So after a spin in vain, the team spins briefly for a while: the longer, the
 * more often it has found that spinning still does not pay.
 */
#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "threads.h"

#define LINE 64 /* bytes of a cache line */

/* Nanoseconds of a spin for active members, of one for the next region, and of either while spinning does not pay. */
#define SPIN 200000
#define SPIN_BETWEEN 300000
#define SPIN_BRIEFLY 5000
/* Nanoseconds without long spins after the first one in vain, and at most. */
#define SHORTEST_BREAK 10000000
#define LONGEST_BREAK 320000000
#define PAUSES 8 /* between looks at the clock */

/* ---- the state of a team: epoch in the high word; open and active in the low word ------------------------------ */

#define ACTIVE 0x7fffffffu
#define OPEN 0x80000000u
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define EPOCH_WORD 1
#else
#define EPOCH_WORD 0
#endif

static uint64_t state_of(uint32_t epoch, uint32_t open, uint32_t active)
{
    return (uint64_t)epoch << 32 | open | active;
}

static uint32_t epoch_of(uint64_t state) { return (uint32_t)(state >> 32); }
static uint32_t active_in(uint64_t state) { return (uint32_t)state & ACTIVE; }
static int is_open(uint64_t state) { return ((uint32_t)state & OPEN) != 0; }

/* A word that threads wait for, and how many of them sleep. */
typedef struct {
    uint32_t *word;
    uint32_t sleepers;
} Bell;

typedef struct Team Team;

typedef struct {
    _Alignas(LINE) Team *team;
    uint32_t start; /* first epoch of the region that the member is in, or was in last */
    uint32_t phase; /* barriers that it has passed there */
    jmp_buf leave;  /* to where it leaves a region that has ended */
} Member;

struct Team {
    _Alignas(LINE) uint64_t state;
    _Alignas(LINE) uint32_t regions; /* regions opened so far */
    _Alignas(LINE) Bell opened, passed;
    /* Of the open region, or the last one. */
    Work *work;
    void *data;
    uint32_t start; /* its first epoch */
    uint32_t float_mode;
    unsigned threads;
    int spins; /* false: the team has fewer cores than threads */
    int64_t break_end, break_length; /* until when spins are brief, and for how long they were so; nanoseconds */
    Team *next;       /* in `idle` */
    Member members[]; /* the first is the caller */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of `idle` */
static Team *idle;                                       /* teams without a caller */
static __thread Member *current;                         /* what this thread is in its region, NULL outside */
static __thread int inside;                              /* whether it is in a region, of one thread perhaps */

/* ---- waiting ---------------------------------------------------------------------------------------------------- */

static void pause_briefly(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("isb" ::: "memory");
#endif
}

static int64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static uint32_t value_of(const Bell *bell) { return __atomic_load_n(bell->word, __ATOMIC_SEQ_CST); }

/* Spins until the word is no longer `old`, for `spin` nanoseconds at most; returns whether it is. */
static int spun(Team *team, const Bell *bell, uint32_t old, int64_t spin)
{
    int64_t end = 0, now = 0;
    int brief = 0;
    do {
        for (int i = 0; i < PAUSES; i++) {
            if (__atomic_load_n(bell->word, __ATOMIC_ACQUIRE) != old)
                return 1;
            pause_briefly();
        }
        now = nanoseconds();
        if (!end) {
            brief = now < __atomic_load_n(&team->break_end, __ATOMIC_RELAXED);
            end = now + (brief ? SPIN_BRIEFLY : spin);
        }
    } while (now < end);
    if (!brief && bell == &team->passed) {
        int64_t length = __atomic_load_n(&team->break_length, __ATOMIC_RELAXED);
        int again = now - __atomic_load_n(&team->break_end, __ATOMIC_RELAXED) < length;
        length = !again ? SHORTEST_BREAK : 2 * length < LONGEST_BREAK ? 2 * length : LONGEST_BREAK;
        __atomic_store_n(&team->break_length, length, __ATOMIC_RELAXED);
        __atomic_store_n(&team->break_end, now + length, __ATOMIC_RELAXED);
    }
    return 0;
}

/* Returns once the word is no longer `old`. */
static void wait_while(Team *team, Bell *bell, uint32_t old, int64_t spin)
{
    if (team->spins && spun(team, bell, old, spin))
        return;
    __atomic_fetch_add(&bell->sleepers, 1, __ATOMIC_SEQ_CST);
    while (value_of(bell) == old)
        syscall(SYS_futex, bell->word, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
    __atomic_fetch_sub(&bell->sleepers, 1, __ATOMIC_RELAXED);
}

/* Wakes the sleepers, once the word has its new value. */
static void ring(Bell *bell)
{
    if (__atomic_load_n(&bell->sleepers, __ATOMIC_SEQ_CST))
        syscall(SYS_futex, bell->word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

/* ---- members ---------------------------------------------------------------------------------------------------- */

static uint64_t state_now(Team *team) { return __atomic_load_n(&team->state, __ATOMIC_SEQ_CST); }

static int changed(Team *team, uint64_t *from, uint64_t to)
{
    return __atomic_compare_exchange_n(&team->state, from, to, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

static uint32_t start_of(Team *team) { return __atomic_load_n(&team->start, __ATOMIC_RELAXED); }

/* How a thread rounds and treats denormals, so that members compute what the caller would. */
static uint32_t float_mode(void)
{
#if defined(__SSE__)
    return __builtin_ia32_stmxcsr();
#elif defined(__aarch64__)
    uint64_t mode;
    __asm__ __volatile__("mrs %0, fpcr" : "=r"(mode));
    return (uint32_t)mode;
#else
    return 0;
#endif
}

static void set_float_mode(uint32_t mode)
{
#if defined(__SSE__)
    __builtin_ia32_ldmxcsr(mode);
#elif defined(__aarch64__)
    __asm__ __volatile__("msr fpcr, %0" ::"r"((uint64_t)mode));
#else
    (void)mode;
#endif
}

/* Makes an active member inactive; the last one starts the next epoch, in which it alone is active if the region stays
 * open. Returns whether it was the last. */
static int rest(Member *member, uint32_t open)
{
    Team *team = member->team;
    uint64_t state = state_now(team);
    for (;;) {
        int last = active_in(state) == 1;
        uint64_t next = last ? state_of(epoch_of(state) + 1, open, open ? 1 : 0) : state - 1;
        if (changed(team, &state, next)) {
            if (last)
                ring(&team->passed);
            return last;
        }
    }
}

/* Runs the open region's work as a member that has just become active. */
static __attribute__((noinline)) void take_part(Member *member)
{
    Team *team = member->team;
    member->phase = 0;
    current = member, inside = 1;
    if (!_setjmp(member->leave)) {
        team->work(team->data);
        rest(member, 0);
    }
    current = NULL, inside = 0;
}

void rollout_barrier(void)
{
    Member *member = current;
    if (!member)
        return;
    Team *team = member->team;
    uint32_t epoch = member->start + member->phase++;
    if (epoch_of(state_now(team)) != epoch) /* the others have finished this phase before the member came */
        return;
    if (rest(member, OPEN))
        return;
    wait_while(team, &team->passed, epoch, SPIN);
    uint64_t state = state_now(team);
    while (is_open(state) && start_of(team) == member->start)
        if (changed(team, &state, state + 1))
            return;
    _longjmp(member->leave, 1);
}

static void *serve(void *argument)
{
    Member *member = argument;
    Team *team = member->team;
    uint32_t mode = float_mode();
    for (;;) {
        uint32_t regions = value_of(&team->opened);
        uint64_t state = state_now(team);
        uint32_t start = start_of(team);
        while (is_open(state) && start != member->start) {
            if (changed(team, &state, state + 1)) {
                member->start = start;
                if (team->float_mode != mode)
                    set_float_mode(mode = team->float_mode);
                take_part(member);
                break;
            }
            start = start_of(team);
        }
        wait_while(team, &team->opened, regions, SPIN_BETWEEN);
    }
    return NULL;
}

/* ---- teams ------------------------------------------------------------------------------------------------------ */

static void start_worker(Member *member)
{
    sigset_t all, before;
    pthread_t thread;
    sigfillset(&all); /* handlers run in the caller's threads; what an instruction raises cannot be put off */
    sigdelset(&all, SIGSEGV), sigdelset(&all, SIGBUS), sigdelset(&all, SIGFPE), sigdelset(&all, SIGILL);
    sigdelset(&all, SIGTRAP), sigdelset(&all, SIGPROF);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (!pthread_create(&thread, NULL, serve, member)) /* without it, the others do its work */
        pthread_detach(thread);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static Team *new_team(unsigned threads)
{
    size_t bytes = sizeof(Team) + threads * sizeof(Member);
    Team *team = aligned_alloc(LINE, (bytes + LINE - 1) / LINE * LINE);
    if (!team)
        return NULL;
    cpu_set_t cores;
    int spins = sched_getaffinity(0, sizeof cores, &cores) || (unsigned)CPU_COUNT(&cores) >= threads;
    *team = (Team){.threads = threads, .spins = spins};
    team->opened.word = &team->regions;
    team->passed.word = (uint32_t *)&team->state + EPOCH_WORD;
    for (unsigned i = 0; i < threads; i++)
        team->members[i] = (Member){.team = team};
    for (unsigned i = 1; i < threads; i++)
        start_worker(&team->members[i]);
    return team;
}

/* Takes an idle team of that many threads, or makes one; NULL if there is no memory. */
static Team *taken(unsigned threads)
{
    pthread_mutex_lock(&lock);
    Team **place = &idle;
    while (*place && (*place)->threads != threads)
        place = &(*place)->next;
    Team *team = *place;
    if (team)
        *place = team->next;
    pthread_mutex_unlock(&lock);
    return team ? team : new_team(threads);
}

static void give_back(Team *team)
{
    pthread_mutex_lock(&lock);
    team->next = idle;
    idle = team;
    pthread_mutex_unlock(&lock);
}

/* A child of a fork has none of the workers. */
static void forget(void)
{
    pthread_mutex_init(&lock, NULL);
    idle = NULL, current = NULL, inside = 0;
}

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, forget); }

static void run_alone(Work *work, void *data)
{
    Member *outer = current;
    int was_inside = inside;
    current = NULL, inside = 1;
    work(data);
    current = outer, inside = was_inside;
}

void rollout_parallel(Work *work, void *data, unsigned threads, unsigned flags)
{
    (void)flags;
    Team *team = inside || threads <= 1 ? NULL : taken(threads);
    if (!team) {
        run_alone(work, data);
        return;
    }
    Member *caller = &team->members[0];
    uint32_t epoch = epoch_of(state_now(team)) + 1;
    team->work = work, team->data = data, team->float_mode = float_mode();
    __atomic_store_n(&team->start, epoch, __ATOMIC_RELAXED);
    caller->start = epoch;
    __atomic_store_n(&team->state, state_of(epoch, OPEN, 1), __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&team->regions, 1, __ATOMIC_SEQ_CST);
    ring(&team->opened);
    take_part(caller);
    uint64_t state;
    while (is_open(state = state_now(team)))
        wait_while(team, &team->passed, epoch_of(state), SPIN);
    give_back(team);
}

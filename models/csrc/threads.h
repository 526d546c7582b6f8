/* How kernels run in several threads. threads.c has the threads; kernels get its entry points as arguments.
 *
 * A region is one call of `parallel(work, data, threads, 0)`: the calling thread and up to threads - 1 others run
 * `work(data)`, and the call returns once all of the work is done. Regions of one calling thread follow each other;
 * several threads may have a region each. A region inside a region runs in one thread.
 *
 * `barrier()` inside `work` divides a region into phases. It returns once all that members took before it is done.
 *
 * A member may come late, or not at all: other programs need the cores as well. So nobody waits for a thread, only for
 * work that a thread has begun:
 *   - members take their work in chunks from a counter of the phase, until there is none left, and only then come to
 *     the barrier; no work is meant for one member, and a chunk takes some tens of microseconds at most;
 *   - each phase of a region has its own counter, which nobody sets back before the region ends: a member that comes
 *     late runs through the phases that the others have finished, and must find nothing to do there;
 *   - what a member computes before a barrier and keeps in its own variables is of no use behind it;
 *   - `work` need not return: a member that is late at the end leaves from inside `barrier`. It holds nothing that must
 *     be freed.
 */
#pragma once

typedef void Work(void *data);
typedef void Parallel(Work *work, void *data, unsigned threads, unsigned flags); /* the signature of GOMP_parallel */
typedef void Barrier(void);

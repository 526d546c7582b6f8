"""Give the samples of a prompt pages and states of their own when its prefill ends."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rollout.batcher.types import IntArray
from rollout.engine.batch_row import BatchRow, Prefill
from rollout.engine.kv_memory import KVMemory
from rollout.engine.waiting_queue import WaitingQueue


class Fork(NamedTuple):
    """One row of a finished prefill, with pages and recurrent state of its own."""

    row: BatchRow
    pages: IntArray
    state: IntArray
    shared_pages: int
    """Leading pages that other sequences computed."""


def forks(prefill: Prefill, kv: KVMemory, queue: WaitingQueue) -> list[Fork]:
    """Return the rows of a finished prefill with their pages and states; rows without room return to the queue.

    Full pages are shared; a partial last page and the recurrent state are copied. If that fails for lack of memory,
    nothing has changed.

    Args:
        kv: the page pool, which may grow.
        queue: where rows return to.
    """
    if len(prefill.rows) == 1:
        return [Fork(prefill.rows[0], prefill.pages, prefill.states, prefill.taken_pages)]
    pool, states = kv.pool, kv.pool.states
    full = len(prefill.context) // pool.layout.page_size
    shared, partial = prefill.pages[:full], prefill.pages[full:]
    fitting = 1
    while fitting < len(prefill.rows) and kv.reserve(fitting * len(partial)):
        fitting += 1
    row_states = prefill.states.reshape(len(prefill.rows), -1)
    copies = fitting - 1
    copied = pool.allocate(copies * len(partial))
    try:
        pool.copy(np.tile(partial, copies), copied)
        states.copy(np.tile(row_states[0], copies), row_states[1:fitting].ravel())
    except BaseException:
        pool.release(copied)
        raise
    queue.put_back(prefill.rows[fitting:])
    states.release(row_states[fitting:].ravel())
    found = [Fork(prefill.rows[0], prefill.pages, row_states[0], prefill.taken_pages)]
    own_pages = copied.reshape(copies, len(partial))
    for row, pages, state in zip(prefill.rows[1:fitting], own_pages, row_states[1:fitting], strict=True):
        pool.share(shared)
        found.append(Fork(row, np.concatenate([shared, pages]), state, full))
    return found

"""The scheduler: admits waiting rows, shares prompt pages, preempts rows and frees their pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from rollout.batcher.preemption import Victim, cheapest, youngest
from rollout.batcher.types import IntArray
from rollout.engine.batch_row import BatchRow, Group, Prefill, PrefillChunk
from rollout.engine.kv_memory import KVMemory
from rollout.engine.live_batch import LiveBatch
from rollout.engine.waiting_queue import WaitingQueue
from rollout.stats import Tally

_NO_PAGES: IntArray = np.zeros(0, np.int64)
#: Share of the pool that admission leaves free while rows are alive, for the tokens they are about to add.
_WATERMARK = 0.02


class JoinedRows(NamedTuple):
    """Rows that joined the live batch because their prefill finished; they have no token yet."""

    slots: IntArray
    """[rows] the slot of each row."""
    chunks: IntArray
    """[rows] index of the chunk that finished each row's prefill; the samples of a prompt share one."""


class _Fork(NamedTuple):
    """One row of a finished prefill, with pages and recurrent state of its own."""

    row: BatchRow
    pages: IntArray
    state: IntArray


class Scheduler:
    """Owns the live batch and the prefills, and the pages of both.

    In a model with recurrent states, a row holds one state page from admission until it leaves. Each context is then
    computed in a single forward, and a row that joins later computes it again: the state after a prefix cannot be
    shared, only copied when the prefill ends.

    Args:
        kv: the page pool and the memory it may grow into.
        queue: where rows come from, and return to when they are preempted.
        tally: counters to update.
        settle: reads pending tokens and removes the rows that end with them; returns whether any were pending. Called
            before a preemption, which is not needed if other rows have ended.
    """

    def __init__(self, kv: KVMemory, queue: WaitingQueue, tally: Tally, settle: Callable[[], bool]) -> None:
        self._kv = kv
        self._queue = queue
        self._tally = tally
        self._settle = settle
        self._pool = kv.pool
        self._states = self._pool.states
        self._page_size = self._pool.layout.page_size
        self._pages_for = self._pool.layout.pages_for
        self.recurrent = bool(self._pool.layout.states)
        self._states_per_row = 1 if self.recurrent else 0
        self.live = LiveBatch(page_size=self._page_size, device=self._pool.device, states_per_row=self._states_per_row)
        self.prefills: list[Prefill] = []

    @property
    def alive(self) -> int:
        """Rows that have not ended: those that decode and those in prefill."""
        return len(self.live) + sum(len(prefill.rows) for prefill in self.prefills)

    # -- admitting -----------------------------------------------------------------------------------

    def admit(self, rows: int, prefill_tokens: int) -> int | None:
        """Admit waiting rows, in order, until ``rows`` are alive or memory or prefill tokens run out.

        Returns the pages that the next row needs if it does not fit on an empty device, else None.
        """
        self._preempt_rows_past_boundary()
        budget = prefill_tokens - sum(prefill.remaining for prefill in self.prefills)
        while self.alive < rows and (row := self._queue.first()) is not None:
            group = row.group
            if group.prefill is not None and not len(row.completion):
                if not self._reserve(self._pages_for(1), self._states_per_row, keep_free=self._admission_reserve):
                    return None
                group.prefill.rows.append(self._queue.pop())
                group.prefill.states = np.append(group.prefill.states, self._states.allocate(self._states_per_row))
                continue
            if budget <= 0:
                return None
            context = row.context
            shared = group.pages[: (len(context) - 1) // self._page_size]
            if not self._pool.layout.alike(len(context), len(group.prompt_ids)):
                shared = _NO_PAGES
            # One token more than the context, so that every admitted row can add at least one.
            needed = self._pages_for(len(context) + 1) - len(shared)
            if not self._reserve(needed, self._states_per_row, keep_free=self._admission_reserve):
                return None if self.alive else needed
            self._pool.share(shared)
            own = self._pool.allocate(self._pages_for(len(context)) - len(shared))
            state = self._states.allocate(self._states_per_row)
            computed = len(shared) * self._page_size
            prefill = Prefill(
                group=group,
                context=context,
                pages=np.concatenate([shared, own]),
                states=state,
                computed=computed,
                rows=[self._queue.pop()],
            )
            self.prefills.append(prefill)
            if not len(row.completion):
                group.prefill = prefill
            budget -= prefill.remaining
        return None

    def _preempt_rows_past_boundary(self) -> None:
        """Preempt rows that just crossed the longrope boundary: their whole KV cache must be recomputed."""
        boundary = self._pool.layout.boundary
        if boundary is None or not len(self._past_boundary(boundary)):
            return
        self._settle()
        # Youngest first: each goes to the front of the queue.
        for slot in self._past_boundary(boundary)[::-1].tolist():
            self.preempt(slot)

    def _past_boundary(self, boundary: int) -> IntArray:
        slots: IntArray = self.live.active[self.live.lengths(self.live.active) == boundary + 1]
        return slots

    def _reserve(self, pages: int, states: int = 0, keep_free: int = 0) -> bool:
        """Reserve as `KVMemory.reserve` does, moving free slabs between KV pages and recurrent states if needed.

        Every page and state in use must be listed by `held_pages` and `held_states`, since pages may move.
        """
        if self._kv.reserve(pages, states, keep_free):
            return True
        return self.recurrent and self.drop_free_slabs() and self._kv.reserve(pages, states, keep_free)

    @property
    def _admission_reserve(self) -> int:
        """Pages that admission leaves free: one per row in prefill for its fork, and a share for decoding rows."""
        if not self.alive:
            return 0
        forks = sum(len(prefill.rows) for prefill in self.prefills)
        return forks + int(_WATERMARK * (self._pool.used_pages + self._kv.obtainable_pages))

    # -- prefilling ----------------------------------------------------------------------------------

    def prefill_chunks(self, tokens: int) -> list[PrefillChunk]:
        """Return the next chunks to prefill, oldest prefill first, of at most ``tokens`` tokens together.

        A recurrent model computes contexts whole, so there the oldest prefill is taken whatever its length.
        """
        chunks: list[PrefillChunk] = []
        for prefill in self.prefills:
            length = min(prefill.remaining, tokens)
            if self.recurrent and length < prefill.remaining:
                length = 0 if chunks else prefill.remaining
            if not length:
                break
            tokens = max(0, tokens - length)
            chunks.append(PrefillChunk(prefill=prefill, tokens=length))
        return chunks

    def finish_chunks(self, chunks: Sequence[PrefillChunk]) -> JoinedRows:
        """Count the chunks as computed, and move the rows of finished prefills into the live batch."""
        for chunk in chunks:
            chunk.prefill.computed += chunk.tokens
        finished = [i for i, chunk in enumerate(chunks) if not chunk.prefill.remaining]
        sources = self.go_live([chunks[i].prefill for i in finished])
        slots = self.live.active[len(self.live) - len(sources) :]
        return JoinedRows(slots=slots, chunks=np.array(finished, np.int64)[sources])

    def go_live(self, prefills: Sequence[Prefill]) -> IntArray:
        """Move the rows of finished prefills into the live batch, as its youngest.

        Returns [rows] the index in ``prefills`` of each row that joined.
        """
        sources: list[int] = []
        for index, prefill in enumerate(prefills):
            self._remove(prefill)
            group = prefill.group
            shareable = self._pool.layout.alike(len(prefill.context), len(group.prompt_ids))
            if not group.holders and not self.recurrent and shareable:
                group.pages = prefill.pages[: len(group.prompt_ids) // self._page_size].copy()
                self._pool.share(group.pages)
            for fork in self._fork(prefill):
                self.live.add(fork.row, fork.pages, fork.state)
                sources.append(index)
                group.holders += 1
        return np.array(sources, np.int64)

    def _remove(self, prefill: Prefill) -> None:
        self.prefills.remove(prefill)
        if prefill.group.prefill is prefill:
            prefill.group.prefill = None

    def _fork(self, prefill: Prefill) -> list[_Fork]:
        """Give each row of a finished prefill its pages and state; rows without room return to the queue.

        Full pages are shared; a partial last page and the recurrent state are copied.
        """
        full = len(prefill.context) // self._page_size
        shared, partial = prefill.pages[:full], prefill.pages[full:]
        fitting = 1
        while fitting < len(prefill.rows) and self._kv.reserve(fitting * len(partial)):
            fitting += 1
        self._queue.put_back(prefill.rows[fitting:])
        states = prefill.states.reshape(len(prefill.rows), self._states_per_row)
        self._states.release(states[fitting:].ravel())
        copies = fitting - 1
        copied = self._pool.allocate(copies * len(partial))
        self._pool.copy(np.tile(partial, copies), copied)
        self._states.copy(np.tile(states[0], copies), states[1:fitting].ravel())
        forks = [_Fork(row=prefill.rows[0], pages=prefill.pages, state=states[0])]
        for row, pages, state in zip(
            prefill.rows[1:fitting], copied.reshape(copies, len(partial)), states[1:fitting], strict=True
        ):
            self._pool.share(shared)
            forks.append(_Fork(row=row, pages=np.concatenate([shared, pages]), state=state))
        return forks

    # -- decoding ------------------------------------------------------------------------------------

    def make_room(self, most: int | None) -> IntArray:
        """Return the slots to decode next, the ``most`` oldest or all, each with a page for its next token.

        Preempts rows while there are too few pages.
        """
        while True:
            slots = self.live.active[: None if most is None else max(1, most)]
            missing = self.live.without_page(slots) if self._pool.page_bytes else slots[:0]
            if self._reserve(len(missing)):
                if len(missing):
                    self.live.add_pages(missing, self._pool.allocate(len(missing)))
                return slots
            self._preempt_one(cheapest)

    # -- leaving -------------------------------------------------------------------------------------

    def leave(self, slot: int, scrub: bool = False) -> None:
        """Remove a row from the live batch and release its pages, zeroed first if ``scrub`` is set."""
        group = self.live.row(slot).group
        self._pool.release(self.live.pages(slot), scrub)
        self._states.release(self.live.states[slot])
        self.live.remove(slot)
        group.holders -= 1
        if not group.holders:
            self._pool.release(group.pages, scrub)
            group.pages = _NO_PAGES

    def preempt_beyond(self, rows: int) -> None:
        """Preempt the youngest rows until ``rows`` are alive."""
        while self.alive > rows and self.preempt_youngest():
            pass

    def preempt_youngest(self) -> bool:
        """Return the youngest row to the queue with its tokens, dropping its pages. Return False if there is none.

        If pending tokens were outstanding, only read them: rows that end with them may free enough.
        """
        return self._preempt_one(youngest)

    def _preempt_one(self, victim: Victim) -> bool:
        """Preempt the youngest row in prefill, or the live row that ``victim`` picks if there is no prefill."""
        if self._settle():
            return True
        if self.prefills:
            prefill = self.prefills[-1]
            self._queue.put_back([prefill.rows.pop()])
            states_kept = len(prefill.rows) * self._states_per_row
            self._states.release(prefill.states[states_kept:])
            prefill.states = prefill.states[:states_kept]
            self._tally.preempted_rows += 1
            if not prefill.rows:
                self._remove(prefill)
                # These pages were never checked, and a non-finite number must not reach their next holder.
                self._pool.release(prefill.pages, scrub=prefill.computed > 0)
                self._tally.recomputed_tokens += prefill.computed
            return True
        if len(self.live):
            self.preempt(int(self.live.active[victim(self._recompute_costs())]))
            return True
        return False

    def _recompute_costs(self) -> IntArray:
        """Return [live rows] the tokens to recompute if the row is preempted."""
        slots = self.live.active
        shared = np.array([self._shared_tokens(self.live.row(slot).group) for slot in slots.tolist()], np.int64)
        return self.live.lengths(slots) - 1 - shared

    def _shared_tokens(self, group: Group) -> int:
        """Return the prompt tokens whose pages stay in memory when one row of the group leaves."""
        return 0 if group.holders == 1 else self._page_size * len(group.pages)

    def preempt(self, slot: int) -> None:
        """Return a live row to the queue; all of its tokens must have been received."""
        assert self.live.received[slot] == self.live.generated[slot]
        row = self.live.row(slot)
        row.completion = self.live.completion(slot)
        self._tally.preempted_rows += 1
        lost = len(row.group.prompt_ids) + max(0, len(row.completion) - 1)
        self._tally.recomputed_tokens += lost - self._shared_tokens(row.group)
        self.leave(slot)
        self._queue.put_back([row])

    # -- giving memory back --------------------------------------------------------------------------

    def shrink(self, excess_bytes: int) -> None:
        """Free at least ``excess_bytes``, preempting rows only when their pages cannot be moved into other slabs."""
        before = self._kv.bytes_held
        while self._kv.bytes_held > before - excess_bytes:
            if not self._kv.shrink(self.held_pages(), self.held_states()) and not self._preempt_one(cheapest):
                break
        if self._kv.bytes_held < before:
            self._kv.release_cached()

    def drop_free_slabs(self) -> bool:
        """Compact pages and free the empty slabs, without preempting. Return whether any slab was freed."""
        return self._kv.shrink_free(self.held_pages(), self.held_states())

    def held_pages(self) -> list[IntArray]:
        """Return all arrays of page ids, one entry per reference; rewritten in place when pages move."""
        groups = {id(row.group): row.group for row in self.live.all_rows()}
        prefills = [prefill.pages for prefill in self.prefills]
        return [*self.live.all_pages(), *prefills, *(group.pages for group in groups.values())]

    def held_states(self) -> list[IntArray]:
        """Return all arrays of recurrent-state pages; rewritten in place when states move."""
        return [*self.live.all_states(), *(prefill.states for prefill in self.prefills)]

    def close(self) -> None:
        """Drop all rows and prefills and free all slabs."""
        for slot in self.live.occupied.tolist():
            self.leave(slot)
        for prefill in self.prefills:
            self._pool.release(prefill.pages)
            self._states.release(prefill.states)
        self.prefills.clear()
        self.drop_free_slabs()

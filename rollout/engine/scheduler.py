"""The scheduler: admits waiting rows, shares prompt pages, preempts rows and frees their pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from rollout.batcher.preemption import Victim, cheapest, youngest
from rollout.batcher.shared_pages import find_shared
from rollout.batcher.types import NO_SHARED_PAGES, IntArray, SharedPages
from rollout.engine.batch_row import NO_ROWS, BatchRow, JoinedRows, Prefill, PrefillChunk
from rollout.engine.forks import forks
from rollout.engine.kv_memory import KVMemory
from rollout.engine.live_batch import LiveBatch
from rollout.engine.prefix_reuse import PrefixReuse
from rollout.engine.recomputation import Recomputation
from rollout.engine.waiting_queue import WaitingQueue
from rollout.models.kv_cache.prefix_cache import NO_PREFIX
from rollout.stats import Tally

#: Share of the pool that admission leaves free while rows are alive, for the tokens they are about to add.
_WATERMARK = 0.02
#: Rows at the front of the queue that may wait for a prefix while rows behind them are admitted.
_MOST_PASSED = 256


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
        self._prefixes = PrefixReuse(kv, queue, tally)
        self._shared: tuple[IntArray, int, int, SharedPages] | None = None
        """What `shared_pages` found, after what it depends on."""

    @property
    def alive(self) -> int:
        """Rows that have not ended: those that decode and those in prefill."""
        return len(self.live) + sum(len(prefill.rows) for prefill in self.prefills)

    def shared_pages(self) -> SharedPages:
        """Return the prompt pages that several rows hold: those that decode, oldest first, then those in prefill."""
        in_prefill = [prefill for prefill in self.prefills for _ in prefill.rows]
        state = (self.live.active, self._pool.reference_changes, len(in_prefill))
        if self._shared is None or self._shared[0] is not state[0] or self._shared[1:3] != state[1:]:
            self._shared = (*state, self._find_shared(in_prefill))
        return self._shared[3]

    def _find_shared(self, in_prefill: Sequence[Prefill]) -> SharedPages:
        slots = self.live.active
        # No page is shared beyond what any row has taken from others.
        taken = [len(p.group.prompt_ids) // self._page_size if len(p.rows) > 1 else p.taken_pages for p in in_prefill]
        width = max([int(self.live.shared_pages[slots].max(initial=0)), *taken])
        if not width:
            return NO_SHARED_PAGES
        prompts = [len(prefill.group.prompt_ids) for prefill in in_prefill]
        full = np.concatenate([self.live.prompt_lengths[slots], np.array(prompts, np.int64)]) // self._page_size
        tables = np.zeros((len(full), width), np.int64)
        decoding = self.live.page_tables[slots, :width]
        tables[: len(slots), : decoding.shape[1]] = decoding
        for table, prefill in zip(tables[len(slots) :], in_prefill, strict=True):
            pages = prefill.pages[:width]
            table[: len(pages)] = pages
        return find_shared(tables, np.minimum(full, width), self._page_size)

    # -- admitting -----------------------------------------------------------------------------------

    def admit(self, rows: int, prefill_tokens: int) -> int | None:
        """Admit waiting rows, in order, until ``rows`` are alive or memory or prefill tokens run out.

        A row that begins with what a prefill is computing waits until it can share that, and lets others pass.

        Returns the pages that the next row needs if it does not fit on an empty device, else None.
        """
        self._preempt_rows_past_boundary()
        missing_pages = self._admit(rows, prefill_tokens)
        self._prefixes.copy_partial_pages()
        return missing_pages

    def _admit(self, rows: int, prefill_tokens: int) -> int | None:
        """Implement `admit`, except for the copies of pages that are shared in part."""
        budget = prefill_tokens - sum(prefill.remaining for prefill in self.prefills)
        place, alive = 0, self.alive
        while alive < rows and place < _MOST_PASSED and (row := self._queue.row(place)) is not None:
            group = row.group
            if group.prefill is not None and not len(row.completion):
                keep_free = self._admission_reserve(alive)
                if not self._reserve(self._pages_for(1), self._states_per_row, keep_free):
                    return None
                group.prefill.rows.append(self._queue.pop(place))
                group.prefill.states = np.append(group.prefill.states, self._states.allocate(self._states_per_row))
                alive += 1
                continue
            if budget <= 0:
                return None
            if self._prefixes.is_blocked(row):
                place += 1
                continue
            context = row.context
            # One token more than the context, so that every admitted row can add at least one.
            needed = self._pages_for(len(context) + 1)
            prefix = self._prefixes.take(context, len(group.prompt_ids))
            keep_free = self._admission_reserve(alive)
            if not self._reserve(needed - len(prefix.full), self._states_per_row, keep_free):
                self._prefixes.drop(prefix)
                if alive:
                    return None
                # The cached page that would be copied may be the one that is missing.
                prefix = NO_PREFIX
                if not self._reserve(needed, self._states_per_row):
                    return needed
            own = self._pool.allocate(self._pages_for(len(context)) - len(prefix.full))
            state = self._states.allocate(self._states_per_row)
            prefill = self._prefixes.begin(self._queue.pop(place), prefix, own, state)
            self.prefills.append(prefill)
            if not len(row.completion):
                group.prefill = prefill
            budget -= prefill.remaining
            alive += 1
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

    def _admission_reserve(self, alive: int) -> int:
        """Return the pages to leave free: one per row in prefill for its fork, and a share for decoding rows."""
        in_prefill = alive - len(self.live)
        return in_prefill + int(_WATERMARK * self._kv.attainable_pages) if alive else 0

    # -- prefilling ----------------------------------------------------------------------------------

    def prefill_chunks(self, tokens: int) -> list[PrefillChunk]:
        """Return the next chunks to prefill, oldest prefill first, of at most ``tokens`` tokens together.

        A recurrent model computes contexts whole, so there the oldest prefill is taken whatever its length.
        """
        chunks: list[PrefillChunk] = []
        recomputation = Recomputation(self._pool.layout)
        for prefill in self.prefills:
            length = min(prefill.remaining, tokens)
            if self.recurrent and length < prefill.remaining:
                length = 0 if chunks else prefill.remaining
            if not self.recurrent:
                length = recomputation.take(prefill.computed, length, len(prefill.group.prompt_ids))
            if not length:
                break
            tokens = max(0, tokens - length)
            chunks.append(PrefillChunk(prefill=prefill, tokens=length))
        return chunks

    def finish_chunks(self, chunks: Sequence[PrefillChunk]) -> JoinedRows:
        """Count the chunks as computed, and move the rows of finished prefills into the live batch."""
        if not chunks:
            return NO_ROWS
        for chunk in chunks:
            prefill = chunk.prefill
            prefill.computed += chunk.tokens
            if prefill.offered is not None:
                prefill.offered.computed(prefill.computed)
        finished = [i for i, chunk in enumerate(chunks) if not chunk.prefill.remaining]
        sources = self.go_live([chunks[i].prefill for i in finished])
        slots = self.live.active[len(self.live) - len(sources) :]
        return JoinedRows(slots=slots, chunks=np.array(finished, np.int64)[sources])

    def go_live(self, prefills: Sequence[Prefill]) -> IntArray:
        """Move the rows of finished prefills into the live batch, as its youngest.

        If that fails for lack of memory, the prefills whose rows have not moved compute their last token again.

        Returns [rows] the index in ``prefills`` of each row that joined.
        """
        sources: list[int] = []
        for index, prefill in enumerate(prefills):
            try:
                forked = forks(prefill, self._kv, self._queue)
            except BaseException:
                for left in prefills[index:]:
                    left.computed = 0 if self.recurrent else len(left.context) - 1
                raise
            self._remove(prefill)
            self._prefixes.offer(prefill)
            for fork in forked:
                self.live.add(fork.row, fork.pages, fork.state, fork.shared_pages)
                sources.append(index)
                prefill.group.holders += 1
        return np.array(sources, np.int64)

    def _remove(self, prefill: Prefill) -> None:
        self.prefills.remove(prefill)
        if prefill.group.prefill is prefill:
            prefill.group.prefill = None

    # -- decoding ------------------------------------------------------------------------------------

    def make_room(self, most: int | None) -> IntArray:
        """Return the slots to decode next, the ``most`` oldest or all, each with a page for its next token.

        Preempts rows while there are too few pages.
        """
        while True:
            # The array itself where all decode: what is cached for it is found without a comparison.
            slots = self.live.active if most is None else self.live.active[: max(1, most)]
            missing = self.live.without_page(slots) if self._pool.page_bytes else slots[:0]
            if not len(missing):
                return slots
            if self._reserve(len(missing)):
                self.live.add_pages(missing, self._pool.allocate(len(missing)))
                return slots
            self._preempt_one(cheapest)

    # -- leaving -------------------------------------------------------------------------------------

    def leave(self, slot: int, scrub: bool = False, keep: bool = False) -> None:
        """Remove a row from the live batch and release its pages: zeroed if ``scrub`` is set, or kept for later."""
        group = self.live.row(slot).group
        if keep:
            self._prefixes.keep(group, self.live.received_tokens(slot), self.live.pages(slot))
        if scrub:
            self._prefixes.discard(group)
        self._pool.release(self.live.pages(slot), scrub)
        self._states.release(self.live.states[slot])
        self.live.remove(slot)
        group.holders -= 1

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
            self._queue.put_back(prefill.rows[-1:])
            self._keep_in_prefill(prefill, np.arange(len(prefill.rows)) < len(prefill.rows) - 1)
            self._tally.preempted_rows += 1
            if not prefill.rows:
                self._tally.recomputed_tokens += prefill.computed
            return True
        if len(self.live):
            self.preempt(int(self.live.active[victim(self._recompute_costs())]))
            return True
        return False

    def _recompute_costs(self) -> IntArray:
        """Return [live rows] the tokens to recompute if the row is preempted."""
        slots = self.live.active
        return self.live.lengths(slots) - 1 - self._shared_tokens(slots)

    def _shared_tokens(self, slots: IntArray) -> IntArray:
        """Return [slots] the prompt tokens whose pages stay in memory when the row leaves: other rows use them."""
        if not self._pool.page_bytes:
            return np.zeros(len(slots), np.int64)
        full = self.live.prompt_lengths[slots] // self._page_size
        tables = self.live.page_tables[slots, : int(full.max(initial=0))]
        # The prefix cache holds them as well.
        used = (self._pool.references(tables) > 2) & (np.arange(tables.shape[1]) < full[:, None])
        shared: IntArray = self._page_size * np.count_nonzero(used, axis=1)
        return shared

    def preempt(self, slot: int) -> None:
        """Return a live row to the queue; all of its tokens must have been received."""
        assert self.live.received[slot] == self.live.generated[slot]
        row = self.live.row(slot)
        row.completion = self.live.completion(slot)
        self._tally.preempted_rows += 1
        lost = len(row.group.prompt_ids) + max(0, len(row.completion) - 1)
        self._tally.recomputed_tokens += lost - int(self._shared_tokens(np.array([slot]))[0])
        self.leave(slot)
        self._queue.put_back([row])

    def withdraw(self, unwanted: Callable[[BatchRow], bool]) -> list[BatchRow]:
        """Take unwanted rows out of the live batch and the prefills, with their tokens.

        All of their tokens must have been received.
        """
        rows = []
        for slot in [slot for slot in self.live.active.tolist() if unwanted(self.live.row(slot))]:
            assert self.live.received[slot] == self.live.generated[slot]
            row = self.live.row(slot)
            row.completion = self.live.completion(slot)
            self.leave(slot, keep=True)
            rows.append(row)
        for prefill in list(self.prefills):
            kept = np.array([not unwanted(row) for row in prefill.rows], np.bool_)
            rows += [row for row, keep in zip(prefill.rows, kept, strict=True) if not keep]
            self._keep_in_prefill(prefill, kept)
        return rows

    def _keep_in_prefill(self, prefill: Prefill, kept: NDArray[np.bool_]) -> None:
        """Drop the other rows of a prefill, and the prefill itself if no row is left."""
        states = prefill.states.reshape(len(prefill.rows), self._states_per_row)
        # The prefill computes the first state, whichever row is first.
        self._states.release(states[int(kept.sum()) :].ravel())
        prefill.states = states[: int(kept.sum())].ravel()
        prefill.rows = [row for row, keep in zip(prefill.rows, kept, strict=True) if keep]
        if not prefill.rows:
            self._remove(prefill)
            if prefill.offered is not None:
                prefill.offered.drop()
            # These pages were never checked, and a non-finite number must not reach their next holder.
            self._pool.release(prefill.pages, scrub=prefill.computed > 0)

    # -- giving memory back --------------------------------------------------------------------------

    def shrink(self, excess_bytes: int) -> None:
        """Free at least ``excess_bytes``, preempting rows only when their pages cannot be moved into other slabs."""
        self._kv.free(excess_bytes, self.held_pages, self.held_states, lambda: self._preempt_one(cheapest))

    def drop_free_slabs(self) -> bool:
        """Compact pages and free the empty slabs, without preempting. Return whether any slab was freed."""
        return self._kv.shrink_free(self.held_pages(), self.held_states())

    def held_pages(self) -> list[IntArray]:
        """Return all arrays of page ids, one entry per reference; rewritten in place when pages move."""
        return [*self.live.all_pages(), *(prefill.pages for prefill in self.prefills), self._kv.cache.pages]

    def held_states(self) -> list[IntArray]:
        """Return all arrays of recurrent-state pages; rewritten in place when states move."""
        return [*self.live.all_states(), *(prefill.states for prefill in self.prefills)]

    def close(self) -> None:
        """Drop all rows and prefills, and free all slabs that are not kept for later calls."""
        self._prefixes.close()
        for slot in self.live.occupied.tolist():
            self.leave(slot)
        for prefill in self.prefills:
            if prefill.offered is not None:
                prefill.offered.drop()
            self._pool.release(prefill.pages)
            self._states.release(prefill.states)
        self.prefills.clear()
        if not self._kv.keeps_rows:
            self._kv.cache.clear()
        self.drop_free_slabs()

"""Rows that hold pages: how they get in, share, make way for each other and leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from rollout.batcher.preemption import Victim, cheapest, youngest
from rollout.batcher.types import IntArray
from rollout.engine.batch_row import BatchRow, Group, Prefill
from rollout.engine.kv_memory import KVMemory
from rollout.engine.live_batch import LiveBatch
from rollout.engine.waiting_queue import WaitingQueue
from rollout.models.arrays import uploaded
from rollout.models.forward_batch import ForwardBatch
from rollout.stats import Tally

_NO_PAGES: IntArray = np.zeros(0, np.int64)
#: Share of the pool that admission leaves free while rows live, for the tokens they are about to add.
_WATERMARK = 0.02


class Scheduler:
    """The live batch and the prefills on their way into it, with the pages of both.

    Where the model keeps recurrent states, a row holds the page of its own from admission until it leaves.
    Contexts are then computed whole, in one forward and by each row that comes late: what earlier
    tokens left in a state cannot be shared, only copied when the prefill ends.

    Args:
        memory: the page pool and what it may grow to.
        queue: where rows come from, and go back to when they are preempted.
        tally: counters to keep.
        settle: waits for tokens that were drawn and are not here yet, and takes out the rows that they end. Returns
            whether there were any. Called before a row makes way, which is then not needed where others have ended.
    """

    def __init__(self, memory: KVMemory, queue: WaitingQueue, tally: Tally, settle: Callable[[], bool]) -> None:
        self._memory, self._queue, self._tally, self._settle = memory, queue, tally, settle
        self._pool = memory.pool
        self._states = self._pool.states
        self._page_size = self._pool.layout.page_size
        self._pages_for = self._pool.layout.pages_for
        self.recurrent = bool(self._pool.layout.states)
        self._states_per_row = int(self.recurrent)
        self.live = LiveBatch(self._page_size, self._pool.device, self._states_per_row)
        self.prefills: list[Prefill] = []

    @property
    def alive(self) -> int:
        """Rows that go on: they decode or are being prefilled."""
        return len(self.live) + sum(len(prefill.rows) for prefill in self.prefills)

    # -- admitting -----------------------------------------------------------------------------------

    def admit(self, rows: int, prefill_tokens: int) -> int | None:
        """Takes rows from the queue, in order, until ``rows`` live or memory or prefill tokens run out.

        Returns the pages that the next row wanted if it did not fit into an empty device, else None.
        """
        self._preempt_crossing()
        budget = prefill_tokens - sum(prefill.remaining for prefill in self.prefills)
        while self.alive < rows and (row := self._queue.first()) is not None:
            group = row.group
            if group.prefill is not None and not len(row.completion):
                if not self._reserve(self._pages_for(1), self._states_per_row, leaving=self._spoken_for):
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
            # For one token more than the context, so that an admitted row always lives to add one.
            needed = self._pages_for(len(context) + 1) - len(shared)
            if not self._reserve(needed, self._states_per_row, leaving=self._spoken_for):
                return None if self.alive else needed
            self._pool.share(shared)
            own = self._pool.allocate(self._pages_for(len(context)) - len(shared))
            state = self._states.allocate(self._states_per_row)
            computed = len(shared) * self._page_size
            prefill = Prefill(group, context, np.concatenate([shared, own]), state, computed, [self._queue.pop()])
            self.prefills.append(prefill)
            if not len(row.completion):
                group.prefill = prefill
            budget -= prefill.remaining
        return None

    def _preempt_crossing(self) -> None:
        """Rows that have just passed the length beyond which all of a text is stored otherwise are computed anew."""
        if self._pool.layout.boundary is None or not len(self._crossing(self._pool.layout.boundary)):
            return
        self._settle()
        for slot in self._crossing(self._pool.layout.boundary)[::-1].tolist():  # each goes before those that wait
            self.preempt(slot)

    def _crossing(self, boundary: int) -> IntArray:
        slots: IntArray = self.live.active[self.live.lengths(self.live.active) == boundary + 1]
        return slots

    def _reserve(self, pages: int, states: int = 0, leaving: int = 0) -> bool:
        """See `KVMemory.reserve`. What states have to spare may serve keys and values, and the other way round.

        All pages and states that are in use must be among those held, for they may move.
        """
        if self._memory.reserve(pages, states, leaving):
            return True
        return self.recurrent and self.drop_free_slabs() and self._memory.reserve(pages, states, leaving)

    @property
    def _spoken_for(self) -> int:
        """Pages that admission leaves alone: forks under way, and what live rows are about to add."""
        if not self.alive:
            return 0
        forks = sum(len(prefill.rows) for prefill in self.prefills)
        return forks + int(_WATERMARK * (self._pool.used_pages + self._memory.obtainable_pages))

    # -- prefilling ----------------------------------------------------------------------------------

    def prefill_parts(self, tokens: int) -> list[tuple[Prefill, int]]:
        """What to prefill next, oldest first, and how many tokens of each.

        ``tokens`` at most in all, but where contexts are computed whole, the oldest is taken however long it is.
        """
        parts: list[tuple[Prefill, int]] = []
        for prefill in self.prefills:
            length = min(prefill.remaining, tokens)
            if self.recurrent and length < prefill.remaining:
                length = 0 if parts else prefill.remaining
            if not length:
                break
            tokens = max(0, tokens - length)
            parts.append((prefill, length))
        return parts

    def packed(self, slots: IntArray, parts: Sequence[tuple[Prefill, int]]) -> ForwardBatch | None:
        """The forward of a step: the last token of the row in each of ``slots``, then ``parts``; None of nothing."""
        live, rows = self.live, len(slots)
        if not rows and not parts:
            return None
        pages = [prefill.pages[: self._pages_for(prefill.computed + length)] for prefill, length in parts]
        decoding = int(live.page_counts[slots].max(initial=0))
        tables = np.zeros((rows + len(parts), max([decoding, *map(len, pages)])), np.int64)
        tables[:rows, :decoding] = live.tables[slots, :decoding]
        for table, held in zip(tables[rows:], pages, strict=True):
            table[: len(held)] = held
        tokens, lengths = live.last_tokens(slots), live.lengths(slots)
        if parts:
            new = [prefill.context[prefill.computed : prefill.computed + length] for prefill, length in parts]
            tokens = torch.cat([tokens, uploaded(np.concatenate(new), tokens.device)])
        return ForwardBatch(
            tokens=tokens,
            page_tables=tables,
            prefix_lens=np.concatenate([lengths - 1, np.array([prefill.computed for prefill, _ in parts], np.int64)]),
            query_lens=np.concatenate([np.ones(rows, np.int64), np.array([length for _, length in parts], np.int64)]),
            known_lens=np.concatenate([lengths, np.array([len(prefill.context) for prefill, _ in parts], np.int64)]),
            states=np.concatenate([live.states[slots].ravel(), *(prefill.states[:1] for prefill, _ in parts)]),
        )

    def go_live(self, prefills: Sequence[Prefill]) -> IntArray:
        """Rows of finished prefills join the live batch, as its youngest; they have no token yet.

        Returns, for each row that joined, which of ``prefills`` it comes from.
        """
        sources: list[int] = []
        for number, prefill in enumerate(prefills):
            self._take_out(prefill)
            group = prefill.group
            alike = self._pool.layout.alike(len(prefill.context), len(group.prompt_ids))
            if not group.holders and not self.recurrent and alike:
                group.pages = prefill.pages[: len(group.prompt_ids) // self._page_size].copy()
                self._pool.share(group.pages)
            for row, pages, state in self._fork(prefill):
                self.live.add(row, pages, state)
                sources.append(number)
                group.holders += 1
        return np.array(sources, np.int64)

    def _take_out(self, prefill: Prefill) -> None:
        self.prefills.remove(prefill)
        if prefill.group.prefill is prefill:
            prefill.group.prefill = None

    def _fork(self, prefill: Prefill) -> list[tuple[BatchRow, IntArray, IntArray]]:
        """Pages and state for each of the prefill's rows.

        Full pages are shared; a last partial one and the state are copied.
        """
        full = len(prefill.context) // self._page_size
        shared, partial = prefill.pages[:full], prefill.pages[full:]
        fitting = 1
        while fitting < len(prefill.rows) and self._memory.reserve(fitting * len(partial)):
            fitting += 1
        self._queue.put_back(prefill.rows[fitting:])
        states = prefill.states.reshape(len(prefill.rows), self._states_per_row)
        self._states.release(states[fitting:].ravel())
        forks = [(prefill.rows[0], prefill.pages, states[0])]
        copies = fitting - 1
        own = self._pool.allocate(copies * len(partial))
        self._pool.copy(np.tile(partial, copies), own)
        self._states.copy(np.tile(states[0], copies), states[1:fitting].ravel())
        for row, pages, state in zip(
            prefill.rows[1:fitting], own.reshape(copies, len(partial)), states[1:fitting], strict=True
        ):
            self._pool.share(shared)
            forks.append((row, np.concatenate([shared, pages]), state))
        return forks

    # -- decoding ------------------------------------------------------------------------------------

    def make_room(self, most: int | None) -> IntArray:
        """The rows to decode next: the ``most`` oldest, or all, each with a page for its next token.

        While there are too few pages, rows make way.
        """
        while True:
            slots = self.live.active[: None if most is None else max(1, most)]
            lacking = self.live.without_page(slots) if self._pool.page_bytes else slots[:0]
            if self._reserve(len(lacking)):
                if len(lacking):
                    self.live.give_pages(lacking, self._pool.allocate(len(lacking)))
                return slots
            self._preempt_one(cheapest)

    # -- leaving -------------------------------------------------------------------------------------

    def leave(self, slot: int, scrub: bool = False) -> None:
        """Takes a row out of the live batch and drops its pages, zeroed if they hold non-finite values."""
        group = self.live.row(slot).group
        self._pool.release(self.live.pages(slot), scrub)
        self._states.release(self.live.states[slot])
        self.live.remove(slot)
        group.holders -= 1
        if not group.holders:
            self._pool.release(group.pages, scrub)
            group.pages = _NO_PAGES

    def preempt_beyond(self, rows: int) -> None:
        """Preempts the youngest rows until ``rows`` live."""
        while self.alive > rows and self.preempt_youngest():
            pass

    def preempt_youngest(self) -> bool:
        """Puts the youngest row back into the queue; its tokens are kept, its pages dropped. False if there is none.

        Or only takes out rows that have ended, if that was not known yet.
        """
        return self._preempt_one(youngest)

    def _preempt_one(self, victim: Victim) -> bool:
        """The same of the youngest that is being prefilled, or of ``victim`` where none is."""
        if self._settle():
            return True
        if self.prefills:
            prefill = self.prefills[-1]
            self._queue.put_back([prefill.rows.pop()])
            kept = len(prefill.rows) * self._states_per_row
            self._states.release(prefill.states[kept:])
            prefill.states = prefill.states[:kept]
            self._tally.preempted_rows += 1
            if not prefill.rows:
                self._take_out(prefill)
                # Nobody has looked at its numbers yet, and one that is not finite must not reach a later holder.
                self._pool.release(prefill.pages, scrub=prefill.computed > 0)
                self._tally.recomputed_tokens += prefill.computed
            return True
        if len(self.live):
            self.preempt(int(self.live.active[victim(self._costs())]))
            return True
        return False

    def _costs(self) -> IntArray:
        """For each live row the tokens to compute again if it makes way."""
        slots = self.live.active
        kept = np.array([self._kept_by_others(self.live.row(slot).group) for slot in slots.tolist()], np.int64)
        return self.live.lengths(slots) - 1 - kept

    def _kept_by_others(self, group: Group) -> int:
        """Tokens of the prompt that stay where they are when one row of the group leaves."""
        return 0 if group.holders == 1 else self._page_size * len(group.pages)

    def preempt(self, slot: int) -> None:
        """Puts a live row, all of whose tokens are here, back into the queue."""
        assert self.live.arrived[slot] == self.live.generated[slot]
        row = self.live.row(slot)
        row.completion = self.live.completion(slot)
        self._tally.preempted_rows += 1
        lost = len(row.group.prompt_ids) + max(0, len(row.completion) - 1)
        self._tally.recomputed_tokens += lost - self._kept_by_others(row.group)
        self.leave(slot)
        self._queue.put_back([row])

    # -- giving memory back --------------------------------------------------------------------------

    def shrink(self, excess_bytes: int) -> None:
        """Gives at least so much back; rows are preempted only when what they hold has nowhere to move."""
        before = self._memory.bytes_held
        while self._memory.bytes_held > before - excess_bytes:
            if not self._memory.shrink(self.held_pages(), self.held_states()) and not self._preempt_one(cheapest):
                break
        if self._memory.bytes_held < before:
            self._memory.hand_back()

    def drop_free_slabs(self) -> bool:
        """Gives back what is free, moving pages together, with no row the worse. Returns whether there was any."""
        return self._memory.shrink_free(self.held_pages(), self.held_states())

    def held_pages(self) -> list[IntArray]:
        """All arrays that name pages, each entry for one reference; rewritten in place when pages move."""
        groups = {id(row.group): row.group for row in self.live.all_rows()}
        prefills = [prefill.pages for prefill in self.prefills]
        return [*self.live.all_pages(), *prefills, *(group.pages for group in groups.values())]

    def held_states(self) -> list[IntArray]:
        """The same for the pages of recurrent states."""
        return [*self.live.all_states(), *(prefill.states for prefill in self.prefills)]

    def close(self) -> None:
        """Drops everything."""
        for slot in self.live.held.tolist():
            self.leave(slot)
        for prefill in self.prefills:
            self._pool.release(prefill.pages)
            self._states.release(prefill.states)
        self.prefills.clear()
        self.drop_free_slabs()

"""Rows of a simulated job and the pages that they hold, with methods named after those of the engine's scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rollout.batcher.preemption import Victim, recompute_tokens
from rollout.batcher.simulation.prefix_pages import PrefixPages
from rollout.batcher.simulation.simulated_queue import SimulatedQueue
from rollout.batcher.simulation.workloads import Workload
from rollout.batcher.types import FinishedRow, IntArray, SharedPages, ceil_div

_MOST_PASSED = 256
"""Rows at the front of the queue that may wait for a beginning while rows behind them are admitted."""


@dataclass(eq=False, slots=True)
class Prefill:
    """The context of one or several rows of a group, on its way into pages."""

    group: int
    tokens: int
    """Tokens of the context."""
    computed: int
    """Tokens of the context that are in pages already."""
    own_pages: int
    """Pages of this prefill, without those of the prompt's beginning and the group's."""
    shared_pages: int
    """Pages of the group's prompt that it uses, without those of the prompt's beginning."""
    recomputes: bool
    """True if a preempted row had computed this context before."""
    rows: list[int]

    @property
    def remaining(self) -> int:
        """Tokens still to be computed."""
        return self.tokens - self.computed


# Fields (rows) of the array of live rows. LENGTH includes the token that the next step computes; SHARES is 1 if the
# row holds a reference to the prompt pages of its group.
ID, PROMPT, GENERATED, OUTPUT, LIMIT, GROUP, LENGTH, CAPACITY, OWN_PAGES, SHARES = range(10)


class BatchComposition(NamedTuple):
    """What a step computed."""

    rows: int
    """Rows that decoded."""
    kv_tokens: int
    """Tokens that those rows attended to."""
    prefill_tokens: int


class SimulatedRows:
    """Waiting, prefilling and decoding rows, and the pages of the pool that they share.

    Args:
        workload: all rows of the job.
        limits: [rows] most output tokens of each row, as policies see them.
        page_tokens: tokens per page.
        kv_tokens: tokens that all pages hold.
        watermark: share of the pool that admission leaves free while rows are live.
        victim: chooses the live row to preempt.

    Raises:
        ValueError: a row does not fit in memory even alone.
    """

    def __init__(
        self,
        workload: Workload,
        limits: IntArray,
        page_tokens: int,
        kv_tokens: int,
        watermark: float,
        victim: Victim,
    ) -> None:
        self._workload = workload
        self._limits = limits
        self._watermark = watermark
        self._victim = victim
        self.page_tokens = page_tokens
        self.pages = kv_tokens // page_tokens
        self.used = 0
        """Pages that live rows and prefills hold. Those that are only kept are free memory."""
        longest = int((workload.prompt_tokens + workload.output_tokens).max(initial=0))
        if self._pages_for(longest) > self.pages:
            raise ValueError(
                f"A row of {longest} tokens does not fit into {kv_tokens} tokens of memory; increase the memory."
            )
        self.queue = SimulatedQueue(workload)
        self.kept = np.zeros(len(workload), np.int64)
        """[all rows] generated tokens that a preempted row has kept."""
        self.live: IntArray = np.zeros((10, 0), np.int64)
        """[fields, live rows], oldest row first."""
        self.prefills: list[Prefill] = []
        self.recomputed_tokens = 0
        """Tokens prefilled more than once, because of preemption."""
        self.reused_tokens = 0
        """Tokens that prefills found in memory."""
        self.prefix_hits = 0
        """Prefills that found any."""
        self.pages_saved = 0
        """Pages that they found whole."""
        self.preempted_rows = 0
        self.paused_steps = 0
        self.prefixes = PrefixPages(workload, page_tokens)
        """Pages of beginnings that several prompts have in common; all others belong to rows and their groups."""
        self.prefixes.wait(self.queue)
        if self.prefixes:
            self.queue.reorder(self.prefixes.order())
        self._prompts: list[int] = workload.prompt_tokens.tolist()
        self._groups: list[int] = workload.groups.tolist()
        self._holders: dict[int, int] = {}
        """References to the prompt pages of each group, by live rows and prefills."""
        self._shared_pages: dict[int, int] = {}
        """Prompt pages of each of these groups, without those of the prompt's beginning."""
        self._joinable: dict[int, Prefill] = {}
        """The prefill of each group's prompt that further rows of the group may join."""

    @property
    def alive(self) -> int:
        """Number of rows that decode or are in prefill."""
        return self.decoding + sum(len(prefill.rows) for prefill in self.prefills)

    @property
    def decoding(self) -> int:
        """Number of rows that decode."""
        return int(self.live.shape[1])

    def has_begun(self, row: int) -> bool:
        """Return True if a waiting row was preempted, or if rows of its group are live."""
        group = self._groups[row]
        return bool(self.kept[row]) or group in self._holders or group in self._joinable

    # -- admission -----------------------------------------------------------------------------------

    def _pages_for(self, tokens: int) -> int:
        return ceil_div(tokens, self.page_tokens)

    def _has_room(self, pages: int, reserve: int = 0) -> bool:
        return self.used + pages + reserve <= self.pages

    def _take(self, pages: int) -> None:
        """Count pages as held, in place of those that are only kept if there are no others."""
        self.used += pages
        excess = self.used + self.prefixes.kept_pages - self.pages
        if excess > 0 and self.prefixes.kept_pages:
            self.recomputed_tokens += self.prefixes.evict(excess)

    def _pop(self, place: int) -> int:
        row = self.queue.pop(place)
        self.prefixes.leave_queue(row)
        return row

    def _put_back(self, rows: Sequence[int]) -> None:
        self.queue.put_back(rows)
        self.prefixes.wait(rows)

    def admit(self, rows: int, prefill_tokens: int) -> None:
        """Admit waiting rows up to ``rows`` live rows, while prefill tokens and pages are left.

        A row that begins with what a prefill is computing waits until it can share that, and lets others pass.
        """
        budget = prefill_tokens - sum(prefill.remaining for prefill in self.prefills)
        alive = self.alive
        # Each row in prefill will need a page of its own when it starts to decode.
        prefilling = alive - self.decoding
        place = 0
        while alive < rows and place < min(len(self.queue), _MOST_PASSED):
            row = self.queue.row(place)
            group, prompt, kept = self._groups[row], self._prompts[row], int(self.kept[row])
            reserve = prefilling + int(self._watermark * self.pages) if alive else 0
            if not kept and group in self._joinable:
                if not self._has_room(1, reserve):
                    return
                self._joinable[group].rows.append(self._pop(place))
            else:
                if budget <= 0:
                    return
                if self.prefixes.is_in_prefill(row):
                    place += 1
                    continue
                tokens = prompt + kept
                begin = self.prefixes.pages_of(row)
                shared = min(prompt, tokens - 1) // self.page_tokens - begin if group in self._holders else 0
                if not self._has_room(self._pages_for(tokens + 1) - shared - self.prefixes.held_pages(row), reserve):
                    return
                own = self._pages_for(tokens) - shared - begin
                if shared:
                    self._holders[group] += 1
                found = shared + self.prefixes.computed_pages(row)
                computed = found * self.page_tokens + (0 if shared else self.prefixes.copied_tokens(row))
                self.reused_tokens += computed
                self.prefix_hits += computed > 0
                self.pages_saved += found
                prefill = Prefill(
                    group=group,
                    tokens=tokens,
                    computed=computed,
                    own_pages=own,
                    shared_pages=shared,
                    recomputes=kept > 0,
                    rows=[self._pop(place)],
                )
                self._take(own + self.prefixes.hold(row))
                self.prefills.append(prefill)
                if not kept:
                    self._joinable[group] = prefill
                budget -= prefill.remaining
            alive += 1
            prefilling += 1

    # -- computing -----------------------------------------------------------------------------------

    def step(self, decoding: int, prefill_tokens: int) -> BatchComposition:
        """Decode a token for the oldest ``decoding`` rows, and prefill at most ``prefill_tokens`` tokens."""
        rows = self._make_room(decoding)
        live = self.live
        if rows < self.decoding:
            self.paused_steps += 1
        kv_tokens = int(live[LENGTH, :rows].sum())
        left, prefilled, ready = prefill_tokens, 0, []
        for prefill in self.prefills:
            length = min(prefill.remaining, left)
            if not length:
                break
            prefill.computed += length
            prefilled += length
            left -= length
            if prefill.recomputes:
                # A beginning that has to be computed again was counted when it was evicted.
                begin = self.prefixes.pages_of(prefill.rows[0]) * self.page_tokens
                self.recomputed_tokens += max(0, min(length, prefill.computed - begin))
            self.prefixes.compute(prefill.rows[0], prefill.computed)
            if not prefill.remaining:
                ready.append(prefill)
        live[GENERATED, :rows] += 1
        live[LENGTH, :rows] += 1
        if ready:
            self._go_live(ready)
        return BatchComposition(rows=rows, kv_tokens=kv_tokens, prefill_tokens=prefilled)

    def _make_room(self, decoding: int) -> int:
        """Give the oldest ``decoding`` rows their next pages, preempting if needed; return how many remain."""
        while True:
            live = self.live
            rows = min(decoding, self.decoding)
            full = np.flatnonzero(live[LENGTH, :rows] > live[CAPACITY, :rows])
            needed = len(full)
            if self._has_room(needed):
                live[CAPACITY, full] += self.page_tokens
                live[OWN_PAGES, full] += 1
                self._take(needed)
                return rows
            self.preempt()

    def _go_live(self, ready: Sequence[Prefill]) -> None:
        """Let the rows of complete prefills decode, as far as there are pages."""
        joining: list[list[int]] = []
        for prefill in ready:
            self._remove_prefill(prefill)
            group = prefill.group
            partial = self._pages_for(prefill.tokens) - prefill.tokens // self.page_tokens
            fitting = 1
            while fitting < len(prefill.rows) and self._has_room(fitting * partial):
                fitting += 1
            self._put_back(prefill.rows[fitting:])
            self._share_prompt(prefill)
            # Where another prefill stored the group's prompt first, the first row keeps its own copy of it.
            joining.append(self._decode_row(prefill.rows[0], group, prefill.own_pages, prefill.shared_pages))
            for row in prefill.rows[1:fitting]:
                self._take(partial + self.prefixes.hold(row))
                shared = prefill.tokens // self.page_tokens - self.prefixes.pages_of(row)
                joining.append(self._decode_row(row, group, partial, shared))
        self.live = np.concatenate((self.live, np.array(joining, np.int64).T), axis=1)

    def _share_prompt(self, prefill: Prefill) -> None:
        """Give the prompt pages of a complete prefill to its group, or drop its reference to pages of the group."""
        group = prefill.group
        if group not in self._holders:
            row = prefill.rows[0]
            prompt_pages = self._prompts[row] // self.page_tokens - self.prefixes.pages_of(row)
            self._holders[group] = 0
            self._shared_pages[group] = prompt_pages
            prefill.own_pages -= prompt_pages
            prefill.shared_pages = prompt_pages
        elif prefill.shared_pages:
            self._holders[group] -= 1

    def _decode_row(self, row: int, group: int, own_pages: int, shared_pages: int) -> list[int]:
        """Return the fields of a row that starts to decode, and count its reference to the group's pages."""
        shares = shared_pages > 0 or self._shared_pages[group] == 0
        if shares:
            self._holders[group] += 1
        prompt, kept = self._prompts[row], int(self.kept[row])
        values = {
            ID: row,
            PROMPT: prompt,
            GENERATED: kept + 1,
            OUTPUT: int(self._workload.output_tokens[row]),
            LIMIT: int(self._limits[row]),
            GROUP: group,
            LENGTH: prompt + kept + 1,
            CAPACITY: (own_pages + shared_pages + self.prefixes.pages_of(row)) * self.page_tokens,
            OWN_PAGES: own_pages,
            SHARES: int(shares),
        }
        return [values[field] for field in range(len(values))]

    def retire(self) -> list[tuple[int, FinishedRow]]:
        """Remove rows that have all of their tokens; return each with its index in the workload."""
        live = self.live
        ended = live[GENERATED] >= live[OUTPUT]
        finished: list[tuple[int, FinishedRow]] = []
        if not ended.any():
            return finished
        for slot in np.flatnonzero(ended).tolist():
            row, prompt, generated, limit = (int(live[field, slot]) for field in (ID, PROMPT, GENERATED, LIMIT))
            ended_row = FinishedRow(prompt_tokens=prompt, output_tokens=generated, cut=generated >= limit)
            finished.append((row, ended_row))
            self._free(slot)
        self.live = live[:, ~ended]
        return finished

    # -- release -------------------------------------------------------------------------------------

    def _free(self, slot: int) -> None:
        """Free the pages of a live row; the caller removes it from ``live``."""
        self.used -= int(self.live[OWN_PAGES, slot]) + self.prefixes.release(int(self.live[ID, slot]))
        if self.live[SHARES, slot]:
            self._release_prompt(int(self.live[GROUP, slot]))

    def _release_prompt(self, group: int) -> None:
        """Drop a reference to the prompt pages of a group; the last one frees them."""
        self._holders[group] -= 1
        if not self._holders[group]:
            del self._holders[group]
            self.used -= self._shared_pages.pop(group)

    def _remove_prefill(self, prefill: Prefill) -> None:
        self.prefills.remove(prefill)
        if self._joinable.get(prefill.group) is prefill:
            del self._joinable[prefill.group]

    def preempt(self) -> bool:
        """Return a row to the queue: the youngest in prefill, else the decoding row that ``victim`` chooses.

        Returns False if no row is live.
        """
        if self.prefills:
            prefill = self.prefills[-1]
            row = prefill.rows.pop()
            self._put_back([row])
            self.preempted_rows += 1
            if not prefill.rows:
                stays = prefill.shared_pages + self.prefixes.computed_pages(row)
                self._remove_prefill(prefill)
                self.used -= prefill.own_pages + self.prefixes.release(row)
                if prefill.shared_pages:
                    self._release_prompt(prefill.group)
                self.recomputed_tokens += prefill.computed - stays * self.page_tokens
            return True
        live = self.live
        if not self.decoding:
            return False
        slot = self._victim(self._recompute_tokens())
        row = int(live[ID, slot])
        self.kept[row] = live[GENERATED, slot]
        self.preempted_rows += 1
        # First of all the row waits, so that the beginning of its prompt is kept.
        self._put_back([row])
        self._free(slot)
        self.live = np.delete(live, slot, axis=1)
        return True

    def _recompute_tokens(self) -> IntArray:
        """[decoding rows] Return the tokens that each row would recompute if it were preempted."""
        live = self.live
        if self.prefixes:
            return recompute_tokens(live[LENGTH] - 1, self.shared())
        others_share = np.array([self._holders.get(group) != 1 for group in live[GROUP].tolist()], bool)
        prompt_stays = (live[SHARES] == 1) & others_share
        full_page_tokens = live[PROMPT] // self.page_tokens * self.page_tokens
        tokens: IntArray = live[LENGTH] - 1 - np.where(prompt_stays, full_page_tokens, 0)
        return tokens

    def shared(self) -> SharedPages:
        """Return the pages that several rows hold, decoding rows first and then those in prefill."""
        live = self.live
        prefilling = [row for prefill in self.prefills for row in prefill.rows]
        rows = [*live[ID].tolist(), *prefilling]
        shares = [*live[SHARES].tolist(), *(1 for _ in prefilling)]
        pages = [
            share * (self._prompts[row] // self.page_tokens - self.prefixes.pages_of(row))
            for row, share in zip(rows, shares, strict=True)
        ]
        return self.prefixes.shared(rows, [self._groups[row] for row in rows], pages)

    def resize(self, kv_tokens: int) -> None:
        """Set the size of memory, and preempt rows until the rest fits."""
        self.pages = kv_tokens // self.page_tokens
        while self.used > self.pages and self.preempt():
            pass
        self._take(0)

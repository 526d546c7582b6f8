"""Rows of a simulated job and the pages that they hold; methods are named after those of the engine's scheduler."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rollout.batcher.preemption import Victim
from rollout.batcher.simulation.workloads import Workload
from rollout.batcher.types import FinishedRow, IntArray


@dataclass(eq=False, slots=True)
class Prefill:
    """The context of some rows, on its way into pages."""

    group: int
    tokens: int
    """Of its context."""
    computed: int
    own: int
    """Its pages, without the group's."""
    shared: int
    """Pages of the group's that it uses."""
    again: bool
    """Whether its context was computed before."""
    rows: list[int]

    @property
    def remaining(self) -> int:
        return self.tokens - self.computed


# Rows of the array of live rows. Lengths count the token that is about to be computed; rows that share hold a
# reference to the pages of their group.
ID, PROMPT, GENERATED, OUTPUT, LIMIT, GROUP, LENGTH, CAPACITY, OWN, SHARES = range(10)


class _Counted:
    """Prompt tokens of waiting rows, those of a group counted once."""

    def __init__(self) -> None:
        self.tokens = 0
        self._rows: dict[int, int] = {}

    def add(self, group: int, tokens: int) -> None:
        rows = self._rows.get(group, 0)
        self.tokens += 0 if rows else tokens
        self._rows[group] = rows + 1

    def remove(self, group: int, tokens: int) -> None:
        self._rows[group] -= 1
        if not self._rows[group]:
            self.tokens -= tokens
            del self._rows[group]


class SimulatedRows:
    """Rows that wait, are prefilled or decode, and the pages of one pool that they share.

    Args:
        workload: the rows.
        limits: most output tokens of each row, as policies are told.
        page_tokens, kv_tokens: tokens of a page, and of all pages.
        watermark: share of the pool that admission leaves free while rows live.
        victim: which live row makes way.

    Raises:
        ValueError: a row does not fit into memory even alone.
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
        self._work, self._limits, self._watermark, self._victim = workload, limits, watermark, victim
        self.page_tokens = page_tokens
        self.pages = kv_tokens // page_tokens
        self.used = 0
        longest = int((workload.prompt_tokens + workload.output_tokens).max(initial=0))
        if self._pages_for(longest) > self.pages:
            raise ValueError(
                f"A row of {longest} tokens does not fit into {kv_tokens} tokens of memory: give more of it."
            )
        self.queue = deque(range(len(workload)))
        self.kept = np.zeros(len(workload), np.int64)
        """Tokens that a preempted row has kept."""
        self.live: IntArray = np.zeros((10, 0), np.int64)
        self.prefills: list[Prefill] = []
        self.waiting_prompts = _Counted()
        self.recomputed = 0
        """Tokens prefilled again."""
        self.preempted = 0
        self.paused_steps = 0
        self.moves = 0
        """How often rows left or joined the queue."""
        self._prompts: list[int] = workload.prompt_tokens.tolist()
        self._groups: list[int] = workload.groups.tolist()
        self._holders: dict[int, int] = {}
        """Live rows, and prefills that use its pages, of each group that has any."""
        self._shared_pages: dict[int, int] = {}
        """Pages of the prompt of each of these groups."""
        self._under_way: dict[int, Prefill] = {}
        """The prefill of a group's prompt that further rows may join."""
        for group, prompt in zip(self._groups, self._prompts, strict=True):
            self.waiting_prompts.add(group, prompt)

    @property
    def alive(self) -> int:
        """Rows that decode or are being prefilled."""
        return self.decoding + sum(len(prefill.rows) for prefill in self.prefills)

    @property
    def decoding(self) -> int:
        """Rows that decode."""
        return int(self.live.shape[1])

    def has_begun(self, row: int) -> bool:
        """Whether a waiting row was preempted, or others of its group live."""
        group = self._groups[row]
        return bool(self.kept[row]) or group in self._holders or group in self._under_way

    # -- admitting -----------------------------------------------------------------------------------

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def _reserve(self, pages: int, leaving: int = 0) -> bool:
        return self.used + pages + leaving <= self.pages

    def admit(self, rows: int, prefill_tokens: int) -> None:
        """Let waiting rows begin, up to so many alive, while prefill tokens and pages are left."""
        budget = prefill_tokens - sum(prefill.remaining for prefill in self.prefills)
        alive = self.alive
        forks = alive - self.decoding
        while alive < rows and self.queue:
            row = self.queue[0]
            group, prompt, kept = self._groups[row], self._prompts[row], int(self.kept[row])
            leaving = forks + int(self._watermark * self.pages) if alive else 0
            if not kept and group in self._under_way:
                if not self._reserve(1, leaving):
                    return
                self._under_way[group].rows.append(self._pop())
            else:
                if budget <= 0:
                    return
                tokens = prompt + kept
                shared = min(prompt, tokens - 1) // self.page_tokens if group in self._holders else 0
                if not self._reserve(self._pages_for(tokens + 1) - shared, leaving):
                    return
                own = self._pages_for(tokens) - shared
                self.used += own
                if shared:
                    self._holders[group] += 1
                prefill = Prefill(group, tokens, shared * self.page_tokens, own, shared, kept > 0, [self._pop()])
                self.prefills.append(prefill)
                if not kept:
                    self._under_way[group] = prefill
                budget -= prefill.remaining
            alive += 1
            forks += 1

    def _pop(self) -> int:
        self.moves += 1
        row = self.queue.popleft()
        self.waiting_prompts.remove(self._groups[row], self._prompts[row])
        return row

    def _put_back(self, rows: Sequence[int]) -> None:
        self.moves += 1
        self.queue.extendleft(reversed(rows))
        for row in rows:
            self.waiting_prompts.add(self._groups[row], self._prompts[row])

    # -- computing -----------------------------------------------------------------------------------

    def step(self, decoding: int, prefill_tokens: int) -> tuple[int, int, int]:
        """Decode a token for the oldest ``decoding`` rows, and prefill.

        Returns rows that decoded, tokens that they attended to, tokens prefilled.
        """
        rows = self._make_room(decoding)
        live = self.live
        self.paused_steps += int(rows < self.decoding)
        kv_tokens = int(live[LENGTH, :rows].sum())
        left, prefilled, ready = prefill_tokens, 0, []
        for prefill in self.prefills:
            length = min(prefill.remaining, left)
            if not length:
                break
            prefill.computed += length
            prefilled += length
            left -= length
            if prefill.again:
                self.recomputed += length
            if not prefill.remaining:
                ready.append(prefill)
        live[GENERATED, :rows] += 1
        live[LENGTH, :rows] += 1
        if ready:
            self._go_live(ready)
        return rows, kv_tokens, prefilled

    def _make_room(self, decoding: int) -> int:
        """A page for each of the oldest ``decoding`` rows that needs one; returns how many of them are left."""
        while True:
            live = self.live
            rows = min(decoding, self.decoding)
            lacking = live[LENGTH, :rows] > live[CAPACITY, :rows]
            needed = int(np.count_nonzero(lacking))
            if self._reserve(needed):
                if needed:
                    live[CAPACITY, :rows] += lacking * self.page_tokens
                    live[OWN, :rows] += lacking
                    self.used += needed
                return rows
            self.preempt()

    def _go_live(self, ready: Sequence[Prefill]) -> None:
        """Let the rows of complete prefills decode, as far as there are pages."""
        joining: list[tuple[int, ...]] = []
        for prefill in ready:
            self._take_out(prefill)
            group = prefill.group
            partial = self._pages_for(prefill.tokens) - prefill.tokens // self.page_tokens
            fitting = 1
            while fitting < len(prefill.rows) and self._reserve(fitting * partial):
                fitting += 1
            self._put_back(prefill.rows[fitting:])
            prompt = self._prompts[prefill.rows[0]]
            if group not in self._holders:
                # The pages of the prompt become the group's.
                self._holders[group] = 0
                self._shared_pages[group] = prompt // self.page_tokens
                prefill.own -= prompt // self.page_tokens
                prefill.shared = prompt // self.page_tokens
            elif prefill.shared:
                self._holders[group] -= 1
            for number, row in enumerate(prefill.rows[:fitting]):
                # Where another prefill made the group's pages first, the first row keeps its double of them.
                own = prefill.own if not number else partial
                shared = prefill.shared if not number else prefill.tokens // self.page_tokens
                self._holders[group] += shared > 0 or self._shared_pages[group] == 0
                if number:
                    self.used += own
                kept = int(self.kept[row])
                joining.append(
                    (
                        row,
                        prompt,
                        kept + 1,
                        int(self._work.output_tokens[row]),
                        int(self._limits[row]),
                        group,
                        prompt + kept + 1,
                        (own + shared) * self.page_tokens,
                        own,
                        int(shared > 0 or self._shared_pages[group] == 0),
                    )
                )
        self.live = np.concatenate((self.live, np.array(joining, np.int64).T), axis=1)

    def retire(self) -> list[tuple[int, FinishedRow]]:
        """Drop rows that have all of their tokens; return each with its number."""
        live = self.live
        ended = live[GENERATED] >= live[OUTPUT]
        finished: list[tuple[int, FinishedRow]] = []
        if not ended.any():
            return finished
        for slot in np.flatnonzero(ended).tolist():
            row, prompt, generated, limit = (int(live[field, slot]) for field in (ID, PROMPT, GENERATED, LIMIT))
            finished.append((row, FinishedRow(prompt, generated, generated >= limit)))
            self._leave(slot)
        self.live = live[:, ~ended]
        return finished

    # -- leaving -------------------------------------------------------------------------------------

    def _leave(self, slot: int) -> None:
        """Drops the pages of a live row; the caller takes it out of the array."""
        self.used -= int(self.live[OWN, slot])
        if self.live[SHARES, slot]:
            self._let_go(int(self.live[GROUP, slot]))

    def _let_go(self, group: int) -> None:
        self._holders[group] -= 1
        if not self._holders[group]:
            del self._holders[group]
            self.used -= self._shared_pages.pop(group)

    def _take_out(self, prefill: Prefill) -> None:
        self.prefills.remove(prefill)
        if self._under_way.get(prefill.group) is prefill:
            del self._under_way[prefill.group]

    def preempt(self) -> bool:
        """Puts a row back into the queue: the youngest that is being prefilled, else the victim of the live ones."""
        if self.prefills:
            prefill = self.prefills[-1]
            self._put_back([prefill.rows.pop()])
            self.preempted += 1
            if not prefill.rows:
                self._take_out(prefill)
                self.used -= prefill.own
                if prefill.shared:
                    self._let_go(prefill.group)
                self.recomputed += prefill.computed - prefill.shared * self.page_tokens
            return True
        live = self.live
        if not self.decoding:
            return False
        slot = self._victim(self._costs())
        row = int(live[ID, slot])
        self.kept[row] = live[GENERATED, slot]
        self.preempted += 1
        self._leave(slot)
        self.live = np.delete(live, slot, axis=1)
        self._put_back([row])
        return True

    def _costs(self) -> IntArray:
        """For each live row the tokens to compute again if it makes way."""
        live = self.live
        stays = np.array([self._holders.get(group) != 1 for group in live[GROUP].tolist()])
        kept = live[SHARES] * stays * (live[PROMPT] // self.page_tokens * self.page_tokens)
        costs: IntArray = live[LENGTH] - 1 - kept
        return costs

    def squeeze(self, tokens: int) -> None:
        """Others take memory or give it back; rows make way until the rest is enough."""
        self.pages = tokens // self.page_tokens
        while self.used > self.pages and self.preempt():
            pass

"""A job in discrete steps: the engine's loop and page accounting, with a cost model instead of a model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from rollout.batcher.admission_order import Ordering
from rollout.batcher.preemption import Victim, cheapest
from rollout.batcher.simulation.workloads import Workload
from rollout.batcher.types import (
    Decision,
    FinishedRow,
    FloatArray,
    IntArray,
    Observation,
    Policy,
    StepSample,
    WaitingRows,
)

WATERMARK = 0.02
"""Share of the pool that admission leaves free while rows live, as in the engine."""
_LOOKAHEAD = 64
_NOISE_BLOCK = 4096
_IDLE_STEPS = 1000


@dataclass(frozen=True, slots=True)
class Machine:
    """What a step costs and what memory holds."""

    kv_tokens: int
    step_ms: tuple[float, float, float, float]
    """c0 a step, c1 a decoding row, c2 a token attended to, c3 a prefilled token, in milliseconds."""
    page_tokens: int = 16
    noise: float = 0.02
    """Relative standard deviation of a step's time."""

    def step_time(self, rows: int, kv_tokens: int, prefill_tokens: int) -> float:
        """Milliseconds of a step, without noise."""
        c0, c1, c2, c3 = self.step_ms
        return c0 + c1 * rows + c2 * kv_tokens + c3 * prefill_tokens


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a policy made of a job."""

    output_tokens: int
    total_s: float
    step_ms: FloatArray
    """[steps]"""
    recompute_s: float
    """Time spent on prefilling again what preemption had dropped."""
    preempted_rows: int
    paused_steps: int
    """Steps in which a live row that could decode did not."""
    rows_mean: float
    """Rows alive, mean over steps."""
    rows_max: int

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.total_s

    @property
    def recompute_share(self) -> float:
        """Of the total time."""
        return self.recompute_s / self.total_s

    def over(self, budget_ms: float) -> float:
        """Share of steps that took longer."""
        return float(np.mean(self.step_ms > budget_ms))


def simulate(
    workload: Workload,
    machine: Machine,
    policy: Policy,
    *,
    seed: int = 0,
    watermark: float = WATERMARK,
    reveal: bool = False,
    victim: Victim = cheapest,
    kv_tokens_at: Callable[[int], int] | None = None,
) -> Outcome:
    """Runs a job to its end.

    Args:
        workload: the rows. If it has hints, rows are put in order by them, as in the engine (`order.Ordering`).
        machine: costs and memory.
        policy: a new one; it keeps state.
        seed: of the noise in step times.
        watermark: share of the pool that admission leaves free while rows live.
        reveal: tell the policy the true lengths, as limits that rows surely reach.
        victim: which live row makes way.
        kv_tokens_at: tokens that memory holds at a step, when others take some; None: all of ``machine``'s.

    Raises:
        ValueError: a row does not fit into memory even alone, or the policy lets nothing go on.
    """
    return _Simulation(workload, machine, policy, seed, watermark, reveal, victim, kv_tokens_at).run()


@dataclass(eq=False, slots=True)
class _Prefill:
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
_ID, _PROMPT, _GENERATED, _OUTPUT, _LIMIT, _GROUP, _LENGTH, _CAPACITY, _OWN, _SHARES = range(10)


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


class _Simulation:
    """The state of a job; its methods are named after those of the engine that they stand for."""

    def __init__(
        self,
        workload: Workload,
        machine: Machine,
        policy: Policy,
        seed: int,
        watermark: float,
        reveal: bool,
        victim: Victim,
        kv_tokens_at: Callable[[int], int] | None,
    ) -> None:
        self._work, self._machine, self._policy, self._victim = workload, machine, policy, victim
        self._watermark, self._reveal, self._kv_tokens_at = watermark, reveal, kv_tokens_at
        self._ordering = None if workload.length_hints is None else Ordering()
        self._page = machine.page_tokens
        self._pages = machine.kv_tokens // self._page
        self._used = 0
        longest = int((workload.prompt_tokens + workload.output_tokens).max(initial=0))
        if self._pages_for(longest) > self._pages:
            raise ValueError(
                f"A row of {longest} tokens does not fit into {machine.kv_tokens} tokens of memory: give more of it."
            )
        self._queue = deque(range(len(workload)))
        self._kept = np.zeros(len(workload), np.int64)
        self._limits = workload.output_tokens if reveal else workload.max_new_tokens
        self._prompts: list[int] = workload.prompt_tokens.tolist()
        self._groups: list[int] = workload.groups.tolist()
        self._holders: dict[int, int] = {}
        """Live rows, and prefills that use its pages, of each group that has any."""
        self._shared_pages: dict[int, int] = {}
        """Pages of the prompt of each of these groups."""
        self._live: IntArray = np.zeros((10, 0), np.int64)
        self._prefills: list[_Prefill] = []
        self._under_way: dict[int, _Prefill] = {}
        """The prefill of a group's prompt that further rows may join."""
        self._waiting_prompts = _Counted()
        for group, prompt in zip(self._groups, self._prompts, strict=True):
            self._waiting_prompts.add(group, prompt)
        self._steps: list[StepSample] = []
        self._finished: list[FinishedRow] = []
        self._next: WaitingRows | None = None
        self._recomputed = 0
        self._preempted = 0
        self._paused = 0
        self._noise = np.random.default_rng([seed, 1])

    def run(self) -> Outcome:
        times: list[float] = []
        noise: list[float] = []
        alive_sum = alive_max = idle = 0
        while self._queue or self._alive:
            if self._kv_tokens_at is not None:
                self._squeeze(self._kv_tokens_at(len(times)))
            if self._ordering is not None and self._ordering.changed():
                self._arrange(self._ordering)
            decision = self._policy.decide(self._observe())
            while self._alive > max(0, decision.rows) and self._preempt():
                pass
            self._admit(decision.rows, decision.prefill_tokens)
            alive = self._alive
            alive_sum += alive
            alive_max = max(alive_max, alive)
            rows, kv_tokens, prefilled = self._forward(decision)
            if not rows and not prefilled:
                idle += 1
                if idle > _IDLE_STEPS:
                    raise ValueError(f"The policy lets no row go on (its last decision: {decision}).")
                continue
            idle = 0
            if not noise:
                noise = (1 + self._machine.noise * self._noise.standard_normal(_NOISE_BLOCK)).tolist()
            ms = self._machine.step_time(rows, kv_tokens, prefilled) * noise.pop()
            times.append(ms)
            self._steps.append(StepSample(rows, kv_tokens, prefilled, ms))
        step_ms = np.array(times)
        return Outcome(
            output_tokens=int(self._work.output_tokens.sum()),
            total_s=float(step_ms.sum()) / 1e3,
            step_ms=step_ms,
            recompute_s=self._recomputed * self._machine.step_ms[3] / 1e3,
            preempted_rows=self._preempted,
            paused_steps=self._paused,
            rows_mean=alive_sum / max(1, len(times)),
            rows_max=alive_max,
        )

    # -- observing -----------------------------------------------------------------------------------

    @property
    def _alive(self) -> int:
        return self._decoding + sum(len(prefill.rows) for prefill in self._prefills)

    @property
    def _decoding(self) -> int:
        return int(self._live.shape[1])

    def _observe(self) -> Observation:
        live, work = self._live, self._work
        starting = np.array([row for prefill in self._prefills for row in prefill.rows], np.int64)

        def joined(decoding: IntArray, others: IntArray) -> IntArray:
            return np.concatenate((decoding, others)) if len(others) else decoding

        prompts = joined(live[_PROMPT], work.prompt_tokens[starting])
        observation = Observation(
            prompt_tokens=prompts,
            # A copy: what was observed does not change when rows grow.
            generated_tokens=joined(live[_GENERATED].copy(), self._kept[starting]),
            max_new_tokens=joined(live[_LIMIT], self._limits[starting]),
            waiting_rows=len(self._queue),
            waiting_prompt_tokens=self._waiting_prompts.tokens,
            kv_tokens_held=self._used * self._page,
            kv_tokens_free=(self._pages - self._used) * self._page,
            headroom_bytes=(self._pages - self._used) * self._page,
            bytes_per_token=1,
            page_tokens=self._page,
            groups=joined(live[_GROUP], work.groups[starting]),
            ends_at_limit=np.full(len(prompts), self._reveal),
            waiting=self._waiting(),
            steps=tuple(self._steps),
            finished=tuple(self._finished),
        )
        self._steps.clear()
        self._finished.clear()
        return observation

    def _waiting(self) -> WaitingRows:
        if self._next is None:
            rows = np.fromiter(islice(self._queue, _LOOKAHEAD), np.int64)
            work = self._work
            self._next = WaitingRows(
                work.prompt_tokens[rows],
                self._kept[rows],
                self._limits[rows],
                work.groups[rows],
                np.full(len(rows), self._reveal),
            )
        return self._next

    def _arrange(self, ordering: Ordering) -> None:
        """What was preempted, and the rest of groups that live, stay in front."""
        hints = self._work.length_hints
        assert hints is not None
        begun = [row for row in self._queue if self._has_begun(row)]
        rest = np.array(sorted(row for row in self._queue if not self._has_begun(row)), np.int64)
        work = self._work
        order = ordering.order(work.groups[rest], work.prompt_tokens[rest], hints[rest], self._pages * self._page)
        self._queue = deque(begun + rest[order].tolist())
        self._next = None

    def _has_begun(self, row: int) -> bool:
        group = self._groups[row]
        return bool(self._kept[row]) or group in self._holders or group in self._under_way

    # -- admitting -----------------------------------------------------------------------------------

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self._page)

    def _reserve(self, pages: int, leaving: int = 0) -> bool:
        return self._used + pages + leaving <= self._pages

    def _admit(self, rows: int, prefill_tokens: int) -> None:
        budget = prefill_tokens - sum(prefill.remaining for prefill in self._prefills)
        alive = self._alive
        forks = alive - self._decoding
        while alive < rows and self._queue:
            row = self._queue[0]
            group, prompt, kept = self._groups[row], self._prompts[row], int(self._kept[row])
            leaving = forks + int(self._watermark * self._pages) if alive else 0
            if not kept and group in self._under_way:
                if not self._reserve(1, leaving):
                    return
                self._under_way[group].rows.append(self._pop())
            else:
                if budget <= 0:
                    return
                tokens = prompt + kept
                shared = min(prompt, tokens - 1) // self._page if group in self._holders else 0
                if not self._reserve(self._pages_for(tokens + 1) - shared, leaving):
                    return
                own = self._pages_for(tokens) - shared
                self._used += own
                if shared:
                    self._holders[group] += 1
                prefill = _Prefill(group, tokens, shared * self._page, own, shared, kept > 0, [self._pop()])
                self._prefills.append(prefill)
                if not kept:
                    self._under_way[group] = prefill
                budget -= prefill.remaining
            alive += 1
            forks += 1

    def _pop(self) -> int:
        self._next = None
        row = self._queue.popleft()
        self._waiting_prompts.remove(self._groups[row], self._prompts[row])
        return row

    def _put_back(self, rows: Sequence[int]) -> None:
        self._next = None
        self._queue.extendleft(reversed(rows))
        for row in rows:
            self._waiting_prompts.add(self._groups[row], self._prompts[row])

    # -- computing -----------------------------------------------------------------------------------

    def _forward(self, decision: Decision) -> tuple[int, int, int]:
        """Rows that decoded, tokens that they attended to, tokens prefilled."""
        rows = self._make_room(self._decoding if decision.decode_rows is None else decision.decode_rows)
        live = self._live
        self._paused += rows < self._decoding
        kv_tokens = int(live[_LENGTH, :rows].sum())
        left, prefilled, ready = decision.prefill_tokens, 0, []
        for prefill in self._prefills:
            length = min(prefill.remaining, left)
            if not length:
                break
            prefill.computed += length
            prefilled += length
            left -= length
            if prefill.again:
                self._recomputed += length
            if not prefill.remaining:
                ready.append(prefill)
        live[_GENERATED, :rows] += 1
        live[_LENGTH, :rows] += 1
        if ready:
            self._go_live(ready)
        self._retire()
        return rows, kv_tokens, prefilled

    def _make_room(self, decoding: int) -> int:
        """A page for each of the oldest ``decoding`` rows that needs one; returns how many of them are left."""
        while True:
            live = self._live
            rows = min(decoding, self._decoding)
            lacking = live[_LENGTH, :rows] > live[_CAPACITY, :rows]
            needed = int(np.count_nonzero(lacking))
            if self._reserve(needed):
                if needed:
                    live[_CAPACITY, :rows] += lacking * self._page
                    live[_OWN, :rows] += lacking
                    self._used += needed
                return rows
            self._preempt()

    def _go_live(self, ready: Sequence[_Prefill]) -> None:
        joining: list[tuple[int, ...]] = []
        for prefill in ready:
            self._take_out(prefill)
            group = prefill.group
            partial = self._pages_for(prefill.tokens) - prefill.tokens // self._page
            fitting = 1
            while fitting < len(prefill.rows) and self._reserve(fitting * partial):
                fitting += 1
            self._put_back(prefill.rows[fitting:])
            prompt = self._prompts[prefill.rows[0]]
            if group not in self._holders:
                # The pages of the prompt become the group's.
                self._holders[group] = 0
                self._shared_pages[group] = prompt // self._page
                prefill.own -= prompt // self._page
                prefill.shared = prompt // self._page
            elif prefill.shared:
                self._holders[group] -= 1
            for number, row in enumerate(prefill.rows[:fitting]):
                # Where another prefill made the group's pages first, the first row keeps its double of them.
                own = prefill.own if not number else partial
                shared = prefill.shared if not number else prefill.tokens // self._page
                self._holders[group] += shared > 0 or self._shared_pages[group] == 0
                if number:
                    self._used += own
                kept = int(self._kept[row])
                joining.append(
                    (
                        row,
                        prompt,
                        kept + 1,
                        int(self._work.output_tokens[row]),
                        int(self._limits[row]),
                        group,
                        prompt + kept + 1,
                        (own + shared) * self._page,
                        own,
                        int(shared > 0 or self._shared_pages[group] == 0),
                    )
                )
        self._live = np.concatenate((self._live, np.array(joining, np.int64).T), axis=1)

    def _retire(self) -> None:
        live = self._live
        ended = live[_GENERATED] >= live[_OUTPUT]
        if not ended.any():
            return
        for slot in np.flatnonzero(ended).tolist():
            prompt, generated, limit = (int(live[field, slot]) for field in (_PROMPT, _GENERATED, _LIMIT))
            self._finished.append(FinishedRow(prompt, generated, generated >= limit))
            if self._ordering is not None and self._work.length_hints is not None:
                self._ordering.learn(float(self._work.length_hints[int(live[_ID, slot])]), generated)
            self._leave(slot)
        self._live = live[:, ~ended]

    # -- leaving -------------------------------------------------------------------------------------

    def _leave(self, slot: int) -> None:
        """Drops the pages of a live row; the caller takes it out of the array."""
        self._used -= int(self._live[_OWN, slot])
        if self._live[_SHARES, slot]:
            self._let_go(int(self._live[_GROUP, slot]))

    def _let_go(self, group: int) -> None:
        self._holders[group] -= 1
        if not self._holders[group]:
            del self._holders[group]
            self._used -= self._shared_pages.pop(group)

    def _take_out(self, prefill: _Prefill) -> None:
        self._prefills.remove(prefill)
        if self._under_way.get(prefill.group) is prefill:
            del self._under_way[prefill.group]

    def _preempt(self) -> bool:
        """Puts a row back into the queue: the youngest that is being prefilled, else the victim of the live ones."""
        if self._prefills:
            prefill = self._prefills[-1]
            self._put_back([prefill.rows.pop()])
            self._preempted += 1
            if not prefill.rows:
                self._take_out(prefill)
                self._used -= prefill.own
                if prefill.shared:
                    self._let_go(prefill.group)
                self._recomputed += prefill.computed - prefill.shared * self._page
            return True
        live = self._live
        if not self._decoding:
            return False
        slot = self._victim(self._costs())
        row = int(live[_ID, slot])
        self._kept[row] = live[_GENERATED, slot]
        self._preempted += 1
        self._leave(slot)
        self._live = np.delete(live, slot, axis=1)
        self._put_back([row])
        return True

    def _costs(self) -> IntArray:
        """For each live row the tokens to compute again if it makes way."""
        live = self._live
        stays = np.array([self._holders.get(group) != 1 for group in live[_GROUP].tolist()])
        kept = live[_SHARES] * stays * (live[_PROMPT] // self._page * self._page)
        costs: IntArray = live[_LENGTH] - 1 - kept
        return costs

    def _squeeze(self, tokens: int) -> None:
        """Others take memory or give it back; rows make way until the rest is enough."""
        self._pages = tokens // self._page
        while self._used > self._pages and self._preempt():
            pass

"""A job in discrete steps: the engine's loop and page accounting, with a cost model instead of a model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import numpy as np

from rollout.batcher.admission_order import Ordering
from rollout.batcher.preemption import Victim, cheapest
from rollout.batcher.simulation.simulated_rows import GENERATED, GROUP, LIMIT, PROMPT, SimulatedRows
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
        workload: the rows. If it has hints, they order the rows, as in the engine (`admission_order.Ordering`).
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


class _Simulation:
    """The loop over a job's rows; its methods are named after those of the engine that they stand for."""

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
        self._work, self._machine, self._policy = workload, machine, policy
        self._reveal, self._kv_tokens_at = reveal, kv_tokens_at
        self._ordering = None if workload.length_hints is None else Ordering()
        self._limits = workload.output_tokens if reveal else workload.max_new_tokens
        self._rows = SimulatedRows(workload, self._limits, machine.page_tokens, machine.kv_tokens, watermark, victim)
        self._steps: list[StepSample] = []
        self._finished: list[FinishedRow] = []
        self._next: WaitingRows | None = None
        self._next_of = 0
        """`SimulatedRows.moves` when that was made."""
        self._noise = np.random.default_rng([seed, 1])

    def run(self) -> Outcome:
        times: list[float] = []
        noise: list[float] = []
        alive_sum = alive_max = idle = 0
        while self._rows.queue or self._rows.alive:
            if self._kv_tokens_at is not None:
                self._rows.squeeze(self._kv_tokens_at(len(times)))
            if self._ordering is not None and self._ordering.changed():
                self._arrange(self._ordering)
            decision = self._policy.decide(self._observe())
            while self._rows.alive > max(0, decision.rows) and self._rows.preempt():
                pass
            self._rows.admit(decision.rows, decision.prefill_tokens)
            alive = self._rows.alive
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
            recompute_s=self._rows.recomputed * self._machine.step_ms[3] / 1e3,
            preempted_rows=self._rows.preempted,
            paused_steps=self._rows.paused_steps,
            rows_mean=alive_sum / max(1, len(times)),
            rows_max=alive_max,
        )

    # -- observing -----------------------------------------------------------------------------------

    def _observe(self) -> Observation:
        live, work = self._rows.live, self._work
        starting = np.array([row for prefill in self._rows.prefills for row in prefill.rows], np.int64)

        def joined(decoding: IntArray, others: IntArray) -> IntArray:
            return np.concatenate((decoding, others)) if len(others) else decoding

        prompts = joined(live[PROMPT], work.prompt_tokens[starting])
        observation = Observation(
            prompt_tokens=prompts,
            # A copy: what was observed does not change when rows grow.
            generated_tokens=joined(live[GENERATED].copy(), self._rows.kept[starting]),
            max_new_tokens=joined(live[LIMIT], self._limits[starting]),
            waiting_rows=len(self._rows.queue),
            waiting_prompt_tokens=self._rows.waiting_prompts.tokens,
            kv_tokens_held=self._rows.used * self._rows.page_tokens,
            kv_tokens_free=(self._rows.pages - self._rows.used) * self._rows.page_tokens,
            headroom_bytes=(self._rows.pages - self._rows.used) * self._rows.page_tokens,
            bytes_per_token=1,
            page_tokens=self._rows.page_tokens,
            groups=joined(live[GROUP], work.groups[starting]),
            ends_at_limit=np.full(len(prompts), self._reveal),
            waiting=self._waiting(),
            steps=tuple(self._steps),
            finished=tuple(self._finished),
        )
        self._steps.clear()
        self._finished.clear()
        return observation

    def _waiting(self) -> WaitingRows:
        if self._next is None or self._next_of != self._rows.moves:
            self._next_of = self._rows.moves
            rows = np.fromiter(islice(self._rows.queue, _LOOKAHEAD), np.int64)
            work = self._work
            self._next = WaitingRows(
                work.prompt_tokens[rows],
                self._rows.kept[rows],
                self._limits[rows],
                work.groups[rows],
                np.full(len(rows), self._reveal),
            )
        return self._next

    def _arrange(self, ordering: Ordering) -> None:
        """What was preempted, and the rest of groups that live, stay in front."""
        hints = self._work.length_hints
        assert hints is not None
        begun = [row for row in self._rows.queue if self._rows.has_begun(row)]
        rest = np.array(sorted(row for row in self._rows.queue if not self._rows.has_begun(row)), np.int64)
        work = self._work
        order = ordering.order(
            work.groups[rest], work.prompt_tokens[rest], hints[rest], self._rows.pages * self._rows.page_tokens
        )
        self._rows.queue = deque(begun + rest[order].tolist())
        self._next = None

    # -- computing -----------------------------------------------------------------------------------

    def _forward(self, decision: Decision) -> tuple[int, int, int]:
        """Rows that decoded, tokens that they attended to, tokens prefilled."""
        decoding = self._rows.decoding if decision.decode_rows is None else decision.decode_rows
        done = self._rows.step(decoding, decision.prefill_tokens)
        for row, finished in self._rows.retire():
            self._finished.append(finished)
            if self._ordering is not None and self._work.length_hints is not None:
                self._ordering.learn(float(self._work.length_hints[row]), finished.output_tokens)
        return done

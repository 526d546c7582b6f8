"""Step-by-step simulation of a job: the engine's loop and page accounting, with a cost model for the step time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import numpy as np

from rollout.batcher.admission_order import Ordering
from rollout.batcher.preemption import Victim, cheapest
from rollout.batcher.simulation.simulated_rows import GENERATED, GROUP, LIMIT, PROMPT, BatchComposition, SimulatedRows
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
"""Share of the pool that admission leaves free while rows are live, as in the engine."""
_LOOKAHEAD_ROWS = 64
_NOISE_BLOCK = 4096
_MAX_IDLE_STEPS = 1000


@dataclass(frozen=True, slots=True)
class Machine:
    """Memory size and step costs of a simulated machine."""

    kv_tokens: int
    """Tokens that memory holds."""
    step_ms: tuple[float, float, float, float]
    """Milliseconds c0 per step, c1 per decoding row, c2 per attended token, c3 per prefilled token."""
    page_tokens: int = 16
    noise: float = 0.02
    """Relative standard deviation of step times."""

    def step_time(self, rows: int, kv_tokens: int, prefill_tokens: int) -> float:
        """Return the milliseconds of a step, without noise."""
        c0, c1, c2, c3 = self.step_ms
        return c0 + c1 * rows + c2 * kv_tokens + c3 * prefill_tokens


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a policy on a job."""

    output_tokens: int
    total_s: float
    step_ms: FloatArray
    """[steps] durations."""
    recompute_s: float
    """Time spent on recomputing tokens after preemption."""
    preempted_rows: int
    paused_steps: int
    """Steps in which the policy paused a row that could decode."""
    rows_mean: float
    """Live rows, mean over steps."""
    rows_max: int
    """Live rows, maximum over steps."""
    prefilled_tokens: int
    """Tokens that went through prefill, recomputation included."""
    reused_tokens: int
    """Tokens that went through no prefill, because their pages were in memory when the row was admitted."""
    prefix_hits: int
    """Prefills that began with such tokens."""
    pages_saved: int
    """Pages that those prefills shared, and did not take for themselves."""

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second."""
        return self.output_tokens / self.total_s

    @property
    def recompute_share(self) -> float:
        """Share of the total time spent on recomputing tokens."""
        return self.recompute_s / self.total_s

    def over(self, budget_ms: float) -> float:
        """Return the share of steps that exceeded ``budget_ms``."""
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
    """Run a job to its end.

    Args:
        workload: rows of the job. Hints, if any, order the rows as in the engine (``admission_order.Ordering``).
        machine: costs and memory.
        policy: a new policy, because policies keep state.
        seed: seed of the noise in step times.
        watermark: share of the pool that admission leaves free while rows are live.
        reveal: show the policy the true lengths, as limits at which rows are known to end.
        victim: chooses the live row to preempt.
        kv_tokens_at: memory size in tokens at a step, when other processes take some; None: always ``machine``'s.

    Raises:
        ValueError: a row does not fit in memory even alone, or the policy stalls the job.
    """
    simulation = _Simulation(
        workload=workload,
        machine=machine,
        policy=policy,
        seed=seed,
        watermark=watermark,
        reveal=reveal,
        victim=victim,
        kv_tokens_at=kv_tokens_at,
    )
    return simulation.run()


class _Simulation:
    """Loop over the steps of a job, with methods named after those of the engine's loop."""

    def __init__(
        self,
        *,
        workload: Workload,
        machine: Machine,
        policy: Policy,
        seed: int,
        watermark: float,
        reveal: bool,
        victim: Victim,
        kv_tokens_at: Callable[[int], int] | None,
    ) -> None:
        self._workload = workload
        self._machine = machine
        self._policy = policy
        self._reveal = reveal
        self._kv_tokens_at = kv_tokens_at
        self._ordering = None if workload.length_hints is None else Ordering()
        self._limits = workload.output_tokens if reveal else workload.max_new_tokens
        self._rows = SimulatedRows(
            workload=workload,
            limits=self._limits,
            page_tokens=machine.page_tokens,
            kv_tokens=machine.kv_tokens,
            watermark=watermark,
            victim=victim,
        )
        self._steps: list[StepSample] = []
        self._finished: list[FinishedRow] = []
        self._waiting: WaitingRows | None = None
        """The waiting rows as last observed, valid while the queue has not changed."""
        self._waiting_moves = 0
        """``SimulatedQueue.moves`` at that observation."""
        self._rng = np.random.default_rng([seed, 1])

    def run(self) -> Outcome:
        """Run all steps."""
        times: list[float] = []
        noise: list[float] = []
        alive_sum = alive_max = idle = prefilled = 0
        while self._rows.queue or self._rows.alive:
            if self._kv_tokens_at is not None:
                self._rows.resize(self._kv_tokens_at(len(times)))
            if self._ordering is not None and self._ordering.changed():
                self._reorder(self._ordering)
            decision = self._policy.decide(self._observe())
            while self._rows.alive > max(0, decision.rows) and self._rows.preempt():
                pass
            self._rows.admit(decision.rows, decision.prefill_tokens)
            alive = self._rows.alive
            alive_sum += alive
            alive_max = max(alive_max, alive)
            composition = self._forward(decision)
            if not composition.rows and not composition.prefill_tokens:
                idle += 1
                if idle > _MAX_IDLE_STEPS:
                    raise ValueError(f"The policy stalled the job for {idle} steps; its last decision was {decision}.")
                continue
            idle = 0
            prefilled += composition.prefill_tokens
            if not noise:
                noise = (1 + self._machine.noise * self._rng.standard_normal(_NOISE_BLOCK)).tolist()
            ms = self._machine.step_time(*composition) * noise.pop()
            times.append(ms)
            self._steps.append(
                StepSample(
                    rows=composition.rows,
                    kv_tokens=composition.kv_tokens,
                    prefill_tokens=composition.prefill_tokens,
                    ms=ms,
                )
            )
        step_ms = np.array(times)
        return Outcome(
            output_tokens=int(self._workload.output_tokens.sum()),
            total_s=float(step_ms.sum()) / 1e3,
            step_ms=step_ms,
            recompute_s=self._rows.recomputed_tokens * self._machine.step_ms[3] / 1e3,
            preempted_rows=self._rows.preempted_rows,
            paused_steps=self._rows.paused_steps,
            rows_mean=alive_sum / max(1, len(times)),
            rows_max=alive_max,
            prefilled_tokens=prefilled,
            reused_tokens=self._rows.reused_tokens,
            prefix_hits=self._rows.prefix_hits,
            pages_saved=self._rows.pages_saved,
        )

    # -- observation -----------------------------------------------------------------------------------

    def _observe(self) -> Observation:
        live, workload = self._rows.live, self._workload
        prefilling = np.array([row for prefill in self._rows.prefills for row in prefill.rows], np.int64)

        def joined(decoding: IntArray, in_prefill: IntArray) -> IntArray:
            return np.concatenate((decoding, in_prefill)) if len(in_prefill) else decoding

        prompts = joined(live[PROMPT], workload.prompt_tokens[prefilling])
        observation = Observation(
            prompt_tokens=prompts,
            # A copy, because the array of live rows changes in place.
            generated_tokens=joined(live[GENERATED].copy(), self._rows.kept[prefilling]),
            max_new_tokens=joined(live[LIMIT], self._limits[prefilling]),
            waiting_rows=len(self._rows.queue),
            waiting_prompt_tokens=self._rows.queue.prompt_tokens,
            kv_tokens_held=self._rows.used * self._rows.page_tokens,
            kv_tokens_free=(self._rows.pages - self._rows.used) * self._rows.page_tokens,
            headroom_bytes=(self._rows.pages - self._rows.used) * self._rows.page_tokens,
            bytes_per_token=1,
            page_tokens=self._rows.page_tokens,
            groups=joined(live[GROUP], workload.groups[prefilling]),
            ends_at_limit=np.full(len(prompts), self._reveal),
            waiting=self._observe_waiting(),
            steps=tuple(self._steps),
            finished=tuple(self._finished),
            shared=self._rows.shared() if self._rows.prefixes else None,
        )
        self._steps.clear()
        self._finished.clear()
        return observation

    def _observe_waiting(self) -> WaitingRows:
        prefixes = self._rows.prefixes
        # Rows that end, or whose prefill ends, change what waiting rows share.
        if self._waiting is None or self._waiting_moves != self._rows.queue.moves or prefixes:
            self._waiting_moves = self._rows.queue.moves
            rows = np.fromiter(islice(self._rows.queue, _LOOKAHEAD_ROWS), np.int64)
            self._waiting = WaitingRows(
                prompt_tokens=self._workload.prompt_tokens[rows],
                generated_tokens=self._rows.kept[rows],
                max_new_tokens=self._limits[rows],
                groups=self._workload.groups[rows],
                ends_at_limit=np.full(len(rows), self._reveal),
                shared_tokens=prefixes.waiting_tokens(rows.tolist()) if prefixes else None,
            )
        return self._waiting

    def _reorder(self, ordering: Ordering) -> None:
        """Order the queue by hints, behind preempted rows and rows whose group is live."""
        hints = self._workload.length_hints
        assert hints is not None
        begun = [row for row in self._rows.queue if self._rows.has_begun(row)]
        rest = np.array(sorted(row for row in self._rows.queue if not self._rows.has_begun(row)), np.int64)
        order = ordering.order(
            groups=self._workload.groups[rest],
            prompt_tokens=self._workload.prompt_tokens[rest],
            expected_tokens=hints[rest],
            kv_tokens=self._rows.pages * self._rows.page_tokens,
        )
        self._rows.queue.reorder(begun + rest[order].tolist())
        self._waiting = None

    # -- forward -----------------------------------------------------------------------------------

    def _forward(self, decision: Decision) -> BatchComposition:
        """Run a step, and remove the rows that finish in it."""
        decoding = self._rows.decoding if decision.decode_rows is None else decision.decode_rows
        composition = self._rows.step(decoding, decision.prefill_tokens)
        for row, finished in self._rows.retire():
            self._finished.append(finished)
            if self._ordering is not None and self._workload.length_hints is not None:
                self._ordering.learn(float(self._workload.length_hints[row]), finished.output_tokens)
        return composition

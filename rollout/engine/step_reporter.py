"""Count each step of the loop and report it to the caller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from rollout.batcher.types import Decision, Observation, StepSample
from rollout.engine.kv_memory import KVMemory
from rollout.engine.waiting_queue import WaitingQueue
from rollout.requests import StepReport
from rollout.stats import Tally


class ForwardSize(NamedTuple):
    """What one forward computed, as `StepSample` counts it; all 0 if there was none."""

    rows: int
    kv_tokens: int
    prefill_tokens: int

    def timed(self, ms: float) -> StepSample:
        """Return the sample of a step of so many milliseconds."""
        return StepSample(self.rows, self.kv_tokens, self.prefill_tokens, ms)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did."""

    observation: Observation
    decision: Decision
    live_rows: int
    """Rows alive after admission."""
    paused_rows: int
    ran: ForwardSize
    missing_pages: int | None
    """Pages that the next waiting row needs if it does not fit on an empty device, else None."""


class StepReporter:
    """Updates the totals with each step and calls ``on_step`` with a report of it.

    Args:
        tally: totals of the call.
        kv: the KV memory.
        queue: waiting rows.
        on_step: called with each report; None: no reports.
    """

    def __init__(
        self, tally: Tally, kv: KVMemory, queue: WaitingQueue, on_step: Callable[[StepReport], None] | None
    ) -> None:
        self._tally = tally
        self.kv = kv
        """The KV memory in use."""
        self._queue = queue
        self.on_step = on_step
        self._reported_tokens = 0
        self._reported_preemptions = 0
        self._reported_ooms = 0

    def report(self, step: StepResult, timed: StepSample) -> None:
        """Count a step and report it with its time."""
        tally, pool, waiting_rows = self._tally, self.kv.pool, len(self._queue)
        tally.steps += 1
        tally.paused_row_steps += step.paused_rows
        tally.count_live_rows(step.live_rows, waiting_rows)
        if self.on_step is None:
            return
        report = StepReport(
            step=tally.steps,
            live_rows=step.live_rows,
            paused_rows=step.paused_rows,
            waiting_rows=waiting_rows,
            row_target=step.decision.rows,
            reason=step.decision.reason,
            kv_tokens=self.kv.used_pages * pool.layout.page_size,
            kv_bytes=self.kv.bytes_held,
            headroom_bytes=self.kv.headroom_bytes,
            prefill_tokens=timed.prefill_tokens,
            new_tokens=tally.sampled_tokens - self._reported_tokens,
            preempted_rows=tally.preempted_rows - self._reported_preemptions,
            out_of_memory_events=tally.out_of_memory_events - self._reported_ooms,
            step_ms=timed.ms,
            observation=step.observation,
        )
        self._reported_tokens = tally.sampled_tokens
        self._reported_preemptions = tally.preempted_rows
        self._reported_ooms = tally.out_of_memory_events
        self.on_step(report)

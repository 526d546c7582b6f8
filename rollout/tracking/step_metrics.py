"""The numbers of the engine's steps, about once a second."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from decimal import ROUND_CEILING, Context
from typing import Any

from rollout.records import Record
from rollout.requests import StepReport

LINE_SECONDS = 1.0
_TWO_DIGITS = Context(prec=2, rounding=ROUND_CEILING)


class StepMetrics:
    """Sum up steps and records into a line of numbers every second and when closed.

    Args:
        on_line: called with each line.
        clock: measures the seconds.
        now: time of day, which stands in each line.
    """

    def __init__(
        self,
        on_line: Callable[[Mapping[str, Any]], None],
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._on_line = on_line
        self._clock = clock
        self._now = now
        self._steps: list[StepReport] = []
        self._finish_reasons: Counter[str] = Counter()
        self._rewards: list[float] = []
        self._line_start = clock()
        self._line_end: tuple[float, float] | None = None
        """When the next line ends, on both clocks; None before that."""

    def step(self, report: StepReport) -> None:
        """Add one step of the engine; its records follow."""
        if self._line_end is not None:
            self._write_line(*self._line_end)
        self._steps.append(report)
        if (now := self._clock()) - self._line_start >= LINE_SECONDS:
            self._line_end = now, self._now()

    def record(self, record: Record) -> None:
        """Add a record that the last step finished."""
        self._finish_reasons[record.finish_reason] += 1
        if record.reward is not None:
            self._rewards.append(record.reward)

    def close(self) -> None:
        """Write the line of what came since the last one."""
        if self._steps:
            self._write_line(*(self._line_end or (self._clock(), self._now())))

    def _write_line(self, end: float, time_of_day: float) -> None:
        """Write the line of the steps and records since the last one."""
        seconds, self._line_start, self._line_end = end - self._line_start, end, None
        steps, self._steps = self._steps, []
        finish_reasons, self._finish_reasons = self._finish_reasons, Counter()
        rewards, self._rewards = self._rewards, []
        last = steps[-1]
        tokens = sum(step.new_tokens for step in steps)
        # While no row waits, the number of live rows does not show how many could be live.
        under_load = [step.live_rows for step in steps if step.waiting_rows]
        self._on_line(
            {
                "time": round(time_of_day, 3),
                "seconds": round(seconds, 3),
                "steps": len(steps),
                "live_rows": last.live_rows,
                "live_rows_min": min(under_load) if under_load else None,
                "live_rows_max": max(step.live_rows for step in steps),
                "paused_rows": round(sum(step.paused_rows for step in steps) / len(steps), 1),
                "waiting_rows": last.waiting_rows,
                "row_target": last.row_target,
                "reason": last.reason,
                "reasons": Counter(step.reason for step in steps),
                "kv_tokens": last.kv_tokens,
                "kv_bytes": last.kv_bytes,
                "kv_bytes_max": max(step.kv_bytes for step in steps),
                "headroom_bytes": last.headroom_bytes,
                "prefill_tokens": sum(step.prefill_tokens for step in steps),
                "new_tokens": tokens,
                "preempted_rows": sum(step.preempted_rows for step in steps),
                "out_of_memory_events": sum(step.out_of_memory_events for step in steps),
                "step_ms": round(sum(step.step_ms for step in steps) / len(steps), 3),
                "step_ms_max": round(max(step.step_ms for step in steps), 3),
                "step_ms_counts": _step_time_counts(step.step_ms for step in steps),
                "finish_reasons": finish_reasons,
                "rewards": len(rewards),
                "reward_sum": sum(rewards),
                "tok_s": round(tokens / seconds, 1) if seconds else 0.0,
            }
        )


def _step_time_counts(times_ms: Iterable[float]) -> dict[float, int]:
    """Count steps by their time in milliseconds, rounded up to two digits.

    Unlike percentiles per second, counts can be summed over a whole run.
    """
    counts = Counter(float(_TWO_DIGITS.create_decimal(repr(round(ms, 3)))) for ms in times_ms)
    return dict(sorted(counts.items()))

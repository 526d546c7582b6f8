"""Parse lines of metrics: a line is either valid or rejected, whatever the file holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rollout.run_dir.metrics import read_lines
from rollout.run_dir.paths import RunPaths

_LARGEST = 1e15
_LATEST = 1e11
"""Seconds since 1970; later times cannot be converted to dates."""
_LEAST_SECONDS = 0.001
"""Times are rounded to it, so the last line of a short run may have 0 seconds."""

_NUMBERS = (
    *("time", "seconds", "worker", "attempt", "steps", "live_rows", "row_target", "kv_tokens", "kv_bytes"),
    *("prefill_tokens", "new_tokens", "preempted_rows", "step_ms", "step_ms_max"),
)


_LATER_NUMBERS = ("paused_rows", "out_of_memory_events", "rewards")
"""Missing in lines of earlier versions, and then 0."""


@dataclass(frozen=True, slots=True)
class Span:
    """An interval of time, in seconds since 1970."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Line:
    """One valid line of metrics: numbers are finite and, except headroom and rewards, not negative."""

    worker: int
    attempt: int
    memory: str
    """The host and device whose memory the worker uses; workers with equal names share it. Empty in old lines."""
    span: Span
    """The time it covers; the lines of one worker and attempt follow each other without gaps."""
    steps: float
    live_rows: float
    paused_rows: float
    row_target: float
    reasons: dict[str, float]
    """Steps by the reason of their decision."""
    kv_tokens: float
    kv_bytes: float
    headroom_bytes: float
    prefill_tokens: float
    new_tokens: float
    preempted_rows: float
    out_of_memory_events: float
    step_ms: float
    """Mean."""
    step_ms_max: float
    step_ms_counts: dict[float, float]
    """Steps by step time in milliseconds, rounded up; empty in lines of earlier versions."""
    finish_reasons: dict[str, float]
    """Finished samples by reason; empty in lines of earlier versions."""
    rewards: float
    """Finished samples with a reward."""
    reward_sum: float

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Line | None:
        """Parse a line; None if `rollout.run_dir.metrics.MetricsWriter` would not have written it."""
        try:
            number = {name: _number(values[name]) for name in _NUMBERS}
            number |= {name: _number(values.get(name, 0)) for name in _LATER_NUMBERS}
            end = number.pop("time")
            seconds = max(number.pop("seconds"), _LEAST_SECONDS)
            reasons = values["reasons"] if "reasons" in values else {values["reason"]: number["steps"]}
            if not (reasons and seconds <= end < _LATEST):
                return None
            return cls(
                worker=int(number.pop("worker")),
                attempt=int(number.pop("attempt")),
                memory=f"{values['host']} {values['device']}" if "host" in values and "device" in values else "",
                span=Span(end - seconds, end),
                reasons={str(name): _number(steps) for name, steps in reasons.items()},
                headroom_bytes=_signed(values["headroom_bytes"]),
                reward_sum=_signed(values.get("reward_sum", 0)),
                finish_reasons={
                    str(name): _number(samples) for name, samples in values.get("finish_reasons", {}).items()
                },
                step_ms_counts={
                    _number(float(ms)): _number(steps) for ms, steps in values.get("step_ms_counts", {}).items()
                },
                **number,
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            return None


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LARGEST:
        raise ValueError(value)
    return float(value)


def _signed(value: Any) -> float:
    return math.copysign(_number(abs(value)), value)


def lines_of(paths: RunPaths) -> Iterator[Line | None]:
    """Yield the lines of all workers of a run; None for a line that is torn or not metrics."""
    return (None if values is None else Line.of(values) for values in read_lines(paths))

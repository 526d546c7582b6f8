"""Metrics of the engine's steps: about one line per second, in one file per worker."""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import ROUND_CEILING, Context
from pathlib import Path
from types import TracebackType
from typing import Any

from rollout.records import Record
from rollout.requests import StepReport
from rollout.run_dir.paths import RunPaths

LINE_SECONDS = 1.0
ACTIVE_SECONDS = 60.0
"""A worker that has written no line for so long counts as gone."""
_TWO_DIGITS = Context(prec=2, rounding=ROUND_CEILING)


class MetricsWriter:
    """Sum up steps, and append a line to the worker's file every second and when closed.

    Args:
        attempt: number stored in each line, because a file holds the lines of all attempts.
        device: the device whose memory the headroom is of; workers with one host and device share it.
        on_line: called with each line.
    """

    def __init__(
        self,
        path: Path,
        worker: int,
        attempt: int,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        *,
        device: str = "cpu",
        on_line: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self._worker = worker
        self._attempt = attempt
        self._host = socket.gethostname()
        self._device = device
        self._on_line = on_line
        self._clock = clock
        self._now = now
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  # closed by __exit__
        if self._file.tell() and not _ends_line(self._file.fileno(), self._file.tell()):
            # An earlier attempt was killed while writing its last line; start a new one.
            self._file.write(b"\n")
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

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._steps:
            self._write_line(*(self._line_end or (self._clock(), self._now())))
        self._file.close()

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
        line = {
            "time": round(time_of_day, 3),
            "worker": self._worker,
            "attempt": self._attempt,
            "host": self._host,
            "device": self._device,
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
        # A single write to a file opened for appending, so that lines of two processes do not mix.
        self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        if self._on_line is not None:
            self._on_line(line)


def active_workers(paths: RunPaths) -> int:
    """Count the workers whose last line is about as recent as the newest; 1 if there are no lines.

    Files are compared with each other, because the clock of their file system may differ from this machine's.
    """
    written = [path.stat().st_mtime for path in (paths.root / "metrics").glob("rank-*.jsonl")]
    return max(1, sum(time_written > max(written) - ACTIVE_SECONDS for time_written in written))


def _ends_line(descriptor: int, size: int) -> bool:
    return os.pread(descriptor, 1, size - 1) == b"\n"


def _step_time_counts(times_ms: Iterable[float]) -> dict[float, int]:
    """Count steps by their time in milliseconds, rounded up to two digits.

    Unlike percentiles per second, counts can be summed over a whole run.
    """
    counts = Counter(float(_TWO_DIGITS.create_decimal(repr(round(ms, 3)))) for ms in times_ms)
    return dict(sorted(counts.items()))


def read_metrics(paths: RunPaths) -> Iterator[dict[str, Any]]:
    """Yield the lines of all workers, skipping lines torn by a kill."""
    return (values for values in read_lines(paths) if values is not None)


def read_lines(paths: RunPaths) -> Iterator[dict[str, Any] | None]:
    """Yield the lines of all workers in file order; None for a line torn by a kill."""
    for path in sorted((paths.root / "metrics").glob("rank-*.jsonl")):
        with open(path, "rb") as file:
            for line in file:
                try:
                    values = json.loads(line)
                except (ValueError, RecursionError):
                    values = None
                yield values if isinstance(values, dict) else None

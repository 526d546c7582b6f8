"""Metrics of the engine's steps: about one line per second, in one file per worker."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rollout.run_dir.paths import RunPaths
from rollout.tracking.step_metrics import StepMetrics

ACTIVE_SECONDS = 60.0
"""A worker that has written no line for so long counts as gone."""
_NUMBERS = (
    *("attempt", "time", "seconds", "steps", "step_ms"),
    *("new_tokens", "prefill_tokens", "live_rows_max"),
)
_LARGEST = 1e15
"""Larger numbers, NaN and infinities are in no line that was written."""


class MetricsWriter:
    """Append a line of the steps to the worker's file every second and when closed.

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
        self._place = {"worker": worker, "attempt": attempt, "host": socket.gethostname(), "device": device}
        self._on_line = on_line
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  # closed by __exit__
        if self._file.tell() and not _ends_line(self._file.fileno(), self._file.tell()):
            # An earlier attempt was killed while writing its last line; start a new one.
            self._file.write(b"\n")
        self._metrics = StepMetrics(self._write, clock, now)
        self.step = self._metrics.step
        self.record = self._metrics.record

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._metrics.close()
        self._file.close()

    def _write(self, numbers: Mapping[str, Any]) -> None:
        line = {"time": numbers["time"]} | self._place | dict(numbers)
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


def read_metrics(paths: RunPaths) -> Iterator[dict[str, Any]]:
    """Yield the lines of all workers that have all numbers of a line, skipping those that are torn or damaged."""
    return (values for values in read_lines(paths) if values is not None and _is_whole(values))


def _is_whole(line: Mapping[str, Any]) -> bool:
    """Return whether a line has what is added up of it, with values of the right types."""
    numbers = [line.get(name) for name in _NUMBERS]
    fewest = line.get("live_rows_min", "")
    return (
        all(_is_number(value) for value in numbers)
        and type(line["attempt"]) is int
        and isinstance(line.get("device"), str)
        and (fewest is None or _is_number(fewest))
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


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

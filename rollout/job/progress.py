"""Progress of a running job: a live line on a terminal, otherwise a plain line every few seconds."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from rollout.requests import StepReport

PLAIN_SECONDS = 10.0
LIVE_SECONDS = 0.25
RATE_SECONDS = 30.0
"""Length of the window that rates are measured over."""


class _Progress(NamedTuple):
    time: float
    tokens: int
    samples: int
    """Finished samples."""


class Progress:
    """Show the progress of the whole run from one worker.

    Args:
        total: samples of the run.
        done: returns how many samples all workers have finished.
        console: where to draw; stderr by default.
    """

    def __init__(
        self,
        total: int,
        done: Callable[[], int],
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._done = done
        self._clock = clock
        self._console = console or Console(stderr=True)
        is_terminal = self._console.is_terminal
        self._live = Live(console=self._console, auto_refresh=False, transient=True) if is_terminal else None
        self._drawn_at = clock()
        self._tokens = 0
        self._recent: deque[_Progress] = deque()
        """Progress at some moments of the last `RATE_SECONDS`."""

    def step(self, report: StepReport) -> None:
        """Add one step of the engine, and draw the line if it is due."""
        self._tokens += report.new_tokens
        now = self._clock()
        if not self._recent:
            self._recent.append(_Progress(now, self._tokens, self._done()))
        if now - self._drawn_at >= (LIVE_SECONDS if self._live else PLAIN_SECONDS):
            self._drawn_at = now
            self._draw(self.line(report, now))

    def line(self, report: StepReport, now: float) -> str:
        """Format the progress line after a step."""
        done = self._done()
        self._recent.append(_Progress(now, self._tokens, done))
        while len(self._recent) > 2 and self._recent[0].time < now - RATE_SECONDS:
            self._recent.popleft()
        first = self._recent[0]
        seconds = max(now - first.time, 1e-9)
        samples_per_s = (done - first.samples) / seconds
        left = _duration((self._total - done) / samples_per_s) if samples_per_s else "?"
        return (
            f"{done}/{self._total} samples · live {report.live_rows}/{report.row_target} ({report.reason})"
            f" · {(self._tokens - first.tokens) / seconds:.0f} tok/s · {left} left"
        )

    def _draw(self, line: str) -> None:
        if self._live:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        else:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

"""How far a job is, while it runs: a live line on a terminal, else a plain line every now and then."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from rollout.requests import StepReport

PLAIN_SECONDS = 10.0
LIVE_SECONDS = 0.25
RATE_SECONDS = 30.0
"""The rates shown are those of this last while."""


class Progress:
    """The progress of a run, as the worker sees it that draws it.

    Args:
        total: samples of the run.
        done: returns how many of them are finished, by whichever worker.
        console: where to draw; stderr unless a test says otherwise.
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
        self._live = Live(console=self._console, auto_refresh=False, transient=True) if self._is_live else None
        self._drawn = clock()
        self._tokens = 0
        self._recent: deque[tuple[float, int, int]] = deque()
        """Time, tokens and finished samples, as of some moments of the last while."""

    @property
    def _is_live(self) -> bool:
        return self._console.is_terminal

    def step(self, report: StepReport) -> None:
        """One step of the engine."""
        self._tokens += report.new_tokens
        now = self._clock()
        if not self._recent:
            self._recent.append((now, self._tokens, self._done()))
        if now - self._drawn >= (LIVE_SECONDS if self._live else PLAIN_SECONDS):
            self._drawn = now
            self._draw(self.line(report, now))

    def line(self, report: StepReport, now: float) -> str:
        """The line after a step."""
        done = self._done()
        self._recent.append((now, self._tokens, done))
        while len(self._recent) > 2 and self._recent[0][0] < now - RATE_SECONDS:
            self._recent.popleft()
        then, tokens, finished = self._recent[0]
        seconds = max(now - then, 1e-9)
        rate = (done - finished) / seconds
        left = _duration((self._total - done) / rate) if rate else "?"
        return (
            f"{done}/{self._total} samples · live {report.live_rows}/{report.row_target} ({report.reason})"
            f" · {(self._tokens - tokens) / seconds:.0f} tok/s · {left} left"
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

"""The progress of a job or a library call, with the time that it still takes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Generic, NamedTuple, Self, TypeVar

from rich.console import Console

from rollout.batcher.estimators.time_left import TimeLeft
from rollout.progress.displays import StderrConsole, View, display_on
from rollout.requests import StepReport

T = TypeVar("T")

RATE_SECONDS = 30.0
"""Length of the window that the rate of tokens is measured over."""
_SPARING_SECONDS = 1.0
#: What is called sparingly takes at most this share of the time.
_SPARING_SHARE = 0.01


class Done(NamedTuple):
    """Finished samples of a run."""

    own: int
    """Those of this worker that other workers do not know of."""
    committed: int = 0
    """All others."""
    workers: int = 1
    """Workers at work."""
    others: float = 0.0
    """Unfinished samples that other workers work on, or are expected to take."""


class _Estimate(NamedTuple):
    at: float
    seconds: float | None


class _Sparing(Generic[T]):
    """A value that is made anew once a second, or less often where that would take much of the time."""

    def __init__(self, make: Callable[[], T], clock: Callable[[], float]) -> None:
        self._make = make
        self._clock = clock
        self._next = clock()
        self._value: T | None = None

    def __call__(self, now: float) -> T:
        if self._value is None or now >= self._next:
            begun = self._clock()
            self._value = self._make()
            cost = self._clock() - begun
            self._next = now + max(_SPARING_SECONDS, cost / _SPARING_SHARE)
        return self._value


class Progress:
    """Draw the progress of the whole run from one worker.

    Of other workers, only what they have begun and committed is known. Each is assumed to be as fast as this one.

    Args:
        total: samples of the run; None if unknown.
        done: returns the finished samples.
        console: where to draw; stderr by default.
    """

    def __init__(
        self,
        total: int | None,
        done: Callable[[], Done],
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._done = done
        self._clock = clock
        self._display = display_on(console or StderrConsole())
        self._time_left = TimeLeft()
        # Counting reads the folders of a run, and an estimate is calculated for milliseconds.
        self._counted = _Sparing(done, clock)
        self._estimated = _Sparing(self._estimate, clock)
        self._drawn_at = self._begun_at = clock()
        self._begun_share = 0.0
        self._tokens = 0
        self._recent: deque[tuple[float, int]] = deque()
        """Times of the last `RATE_SECONDS`, and the tokens until then."""
        self._last: StepReport | None = None

    def step(self, report: StepReport) -> None:
        """Add one step of the engine, and draw if it is time to."""
        now = self._clock()
        if self._last is None:
            self._recent.append((now, 0))
        self._last = report
        self._tokens += report.new_tokens
        self._time_left.observe(report.observation, report.row_target)
        if now - self._drawn_at >= self._display.seconds:
            self._drawn_at = now
            self._display.draw(self.view(now))

    def waiting(self) -> None:
        """Draw that only other workers still work."""
        now = self._clock()
        if now - self._drawn_at >= self._display.seconds:
            self._drawn_at = now
            done = self._done()
            view = View(self._share(done, None, now), f"{self._samples(done)} · waiting for other workers")
            self._display.draw(view)

    def view(self, now: float) -> View:
        """Return what to draw after the last step."""
        last = self._last
        assert last is not None, "step comes first"
        done = self._counted(now)
        at, seconds = self._estimated(now)
        # It counts down between two estimates.
        left = None if seconds is None else max(0.0, seconds - (now - at))
        self._recent.append((now, self._tokens))
        while len(self._recent) > 2 and self._recent[0][0] < now - RATE_SECONDS:
            self._recent.popleft()
        since, tokens = self._recent[0]
        rate = _rate(self._tokens - tokens, now - since)
        live = f"{last.live_rows} live" + (f" of {last.row_target} ({last.reason})" if last.waiting_rows else "")
        # What is wanted most stands first: narrow terminals cut the end.
        line = f"{self._samples(done)} · {_duration(left)} left · {_here(done)}{rate} tok/s · {live}"
        return View(self._share(done, left, now), line)

    def _samples(self, done: Done) -> str:
        count = done.own + done.committed
        return f"{count:,} samples" if self._total is None else f"{count:,}/{self._total:,} samples"

    def _estimate(self) -> _Estimate:
        now, last = self._clock(), self._last
        if self._total is None or last is None:
            return _Estimate(now, None)
        done = self._counted(now)
        waiting = max(0.0, self._total - done.committed - done.own - done.others - last.live_rows)
        left_ms = self._time_left.milliseconds(waiting, 1e3 * now)
        return _Estimate(now, None if left_ms is None else left_ms / 1e3)

    def _share(self, done: Done, left: float | None, now: float) -> float:
        """Return the done share: of the time if it is known, which counts unfinished samples too, else of samples."""
        if not self._total:
            return 0.0
        share = (done.own + done.committed) / self._total
        if left is None:
            return share
        elapsed = now - self._begun_at
        return self._begun_share + (1 - self._begun_share) * elapsed / max(elapsed + left, 1e-9)

    def __enter__(self) -> Self:
        self._begun_at = self._clock()
        done = self._done()
        self._begun_share = (done.own + done.committed) / self._total if self._total else 0.0
        self._display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._last is not None:
            now, done = self._clock(), self._done()
            elapsed = now - self._begun_at
            rate = f"{_here(done)}{_rate(self._tokens, elapsed)}"
            line = f"{self._samples(done)} · {_duration(elapsed)} in all · {rate} tok/s"
            self._display.draw(View(self._share(done, None, now), line))
        self._display.stop()


def _here(done: Done) -> str:
    """Return what stands before the numbers that are known of this worker alone."""
    return "this worker: " if done.workers > 1 else ""


def _rate(tokens: int, seconds: float) -> str:
    if seconds <= 0:
        return "–"
    rate = tokens / seconds
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

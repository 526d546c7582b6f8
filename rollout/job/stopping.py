"""When a job stops before it is complete: at a signal, at its deadline, or because another rank of its launch stops."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from statistics import median
from typing import Protocol

from rollout.job.stop_signals import StopSignals
from rollout.job.time_limit import TimeLimit
from rollout.records import Record
from rollout.requests import Request, StepReport
from rollout.stop_conditions import CallProgress, StopConditions

#: Seconds that are kept for the save beyond what is measured, for a disk that is slow just then.
_LEAST_SECONDS = 5.0
#: Seconds between two looks at what other ranks say.
_LISTEN_SECONDS = 1.0
_WAIT_SECONDS = 0.1
#: Share of a new step in the mean, and of itself that the slowest step keeps: a compilation is forgotten in time.
_NEW_SHARE, _KEPT_SHARE = 0.02, 0.999
_RECENT_COMPLETIONS = 512


class Launch(Protocol):
    """The ranks of a launch, which stop together."""

    def announce_stop(self, reason: str) -> None:
        """Tell the other ranks that this one stops."""

    def announced_stop(self) -> str | None:
        """Return why another rank stops, None if none does."""


class Stopping:
    """Says when a job is to stop, and whether it may begin more until then.

    The time that a save takes is measured: how late a stop may be noticed, which is between two steps, and how long it
    takes to store so many tokens.

    Args:
        signals: those that have arrived.
        limit: time that the job has from now on; None: no limit.
        clock: in seconds; never set back.
    """

    def __init__(
        self,
        signals: StopSignals,
        limit: TimeLimit | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.signals = signals
        self._limit = limit
        self._clock = clock
        self._sleep = sleep
        self._ends_at = None if limit is None else clock() + limit.seconds
        self._launch: Launch | None = None
        self._listened_at = clock()
        self._reason: str | None = None
        self._admits = True
        self._looked_at = 0.0
        self._steps = 0
        self._step_seconds = 0.0
        self._slowest_step = 0.0
        self._stored_tokens = 0
        self._stored_seconds = 0.0
        self._live_tokens = 0
        self._lengths: deque[int] = deque(maxlen=_RECENT_COMPLETIONS)

    def join(self, launch: Launch) -> None:
        """Stop when another rank of the launch does, and tell it when this one does."""
        self._launch = launch

    # -- what the job asks ---------------------------------------------------------------------------

    @property
    def reason(self) -> str | None:
        """What stops the job, as the end of ``Stopped by …``; None if nothing does."""
        if self._reason is None and not self._admits and self._limit is not None:
            return self._limit.name
        return self._reason

    def now(self) -> bool:
        """Return whether the job is to save what is under way, and end."""
        if self._reason is None:
            self._reason = self._own_reason()
            if self._launch is not None:
                if self._reason is not None:
                    self._launch.announce_stop(self._reason)
                elif self._clock() - self._listened_at >= _LISTEN_SECONDS:
                    self._listened_at = self._clock()
                    self._reason = self._launch.announced_stop()
        return self._reason is not None

    def _own_reason(self) -> str | None:
        if self.signals.received is not None:
            return self.signals.received.name
        if self._limit is not None and self._time_left() <= 0:
            return self._limit.name
        return None

    def admits(self) -> bool:
        """Return whether a completion that begins now is likely to end in time; once False, it stays so."""
        if self.now():
            self._admits = False
        elif self._admits and self._limit is not None and self._lengths:
            self._admits = self._time_left() >= median(self._lengths) * self._step_seconds
        return self._admits

    def admitted(self, requests: Iterable[Request | None]) -> Iterator[Request | None]:
        """Yield requests, and that there are none now, while they are admitted."""
        for request in requests:
            yield request
            if not self.admits():
                return

    def wait(self, seconds: float, meanwhile: Callable[[], None]) -> None:
        """Sleep, but no longer than until the job is to stop.

        Args:
            meanwhile: called several times a second.
        """
        end = self._clock() + seconds
        while not self.now() and (left := end - self._clock()) > 0:
            meanwhile()
            self._sleep(min(left, _WAIT_SECONDS))

    @property
    def conditions(self) -> StopConditions:
        """End a call of the engine when the job is to stop."""
        return StopConditions(of_call=(self._look,))

    # -- what the job says ---------------------------------------------------------------------------

    def step(self, report: StepReport) -> None:
        """Note a step of the engine."""
        self._live_tokens = report.kv_tokens

    def finished(self, record: Record) -> None:
        """Note a completion that has ended."""
        if record.finished:
            self._lengths.append(len(record.completion_ids))

    def stored(self, tokens: int, seconds: float) -> None:
        """Note that records of so many tokens were stored in so many seconds."""
        self._stored_tokens += tokens
        self._stored_seconds += seconds

    # -- time ----------------------------------------------------------------------------------------

    def _look(self, progress: CallProgress) -> bool:
        now = self._clock()
        # A call begins with a look, at no step, and after records there are two looks with none between them.
        if progress.steps > self._steps:
            taken, mean = now - self._looked_at, self._step_seconds
            self._step_seconds = taken if not mean else mean + _NEW_SHARE * (taken - mean)
            self._slowest_step = max(taken, _KEPT_SHARE * self._slowest_step)
        if progress.steps != self._steps or not progress.steps:
            self._steps, self._looked_at = progress.steps, now
        return self.now()

    def _time_left(self) -> float:
        """Return the seconds until the save has to begin."""
        assert self._ends_at is not None
        return self._ends_at - self._clock() - self.margin

    @property
    def margin(self) -> float:
        """Seconds before the deadline at which the job stops: twice what a stop and the save would take now."""
        save = self._live_tokens * self._stored_seconds / max(1, self._stored_tokens)
        return _LEAST_SECONDS + 2 * (self._slowest_step + save)

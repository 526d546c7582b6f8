"""The signals that stop a job: the first asks it to save and end, a second one ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rollout.errors import Exit

#: Those that people, terminals and schedulers send before they kill.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
#: A launcher passes on the signal that the terminal or the scheduler has sent to all of its processes.
_SAME_SECONDS = 1.0
_PARTING = b"Stopped at once: the same command resumes the run.\n"


class Stopped(KeyboardInterrupt):
    """A job has stopped before it was complete; the same command resumes it.

    Args:
        sentence: for its user; empty where another process says it, None where there is nothing special to say.
    """

    def __init__(self, sentence: str | None = None) -> None:
        super().__init__(sentence)
        self.sentence = sentence


class StopSignals:
    """Notes the first signal that has arrived. The handler takes no lock and writes nothing while the process goes on.

    A second SIGINT or SIGTERM ends the process with status 75; what is finished is on disk by then. A warning (SIGUSR1,
    SIGUSR2, SIGHUP) is no first one of two, since a scheduler sends SIGTERM after it, and in a SLURM job or under
    torchrun a second SIGTERM is none either. SLURM repeats it when the time of grace is over, and torchrun sends it as
    soon as one rank has ended, while others may still save; both kill by themselves.

    Args:
        environment: says whether SLURM or torchrun has started the process.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._killed_by_others = bool({"SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"} & environment.keys())
        self.received: signal.Signals | None = None
        """The first signal, which asks the job to stop."""
        self._ending_since: float | None = None
        """When the first SIGINT or SIGTERM arrived."""
        self._raises = True
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Replace the handlers of `SIGNALS`; a SIGHUP that is ignored, as under nohup, stays so."""
        for number in SIGNALS:
            previous = signal.getsignal(number)
            if number != signal.SIGHUP or previous != signal.SIG_IGN:
                self._previous[number] = previous
                signal.signal(number, self._note)

    def restore(self) -> None:
        """Put the handlers back."""
        for number, previous in self._previous.items():
            # None: it was not set from Python, and cannot be set from there.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._previous.clear()

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Let the block look at `received` by itself; outside of such a block, the first signal raises `Stopped`."""
        raises, self._raises = self._raises, False
        try:
            yield
        finally:
            self._raises = raises

    def _note(self, number: int, _: FrameType | None) -> None:
        first = self.received is None
        if first:
            self.received = signal.Signals(number)
        if number in (signal.SIGINT, signal.SIGTERM):
            now = time.monotonic()
            if self._ending_since is None:
                self._ending_since = now
            elif now - self._ending_since > _SAME_SECONDS and not (self._killed_by_others and number == signal.SIGTERM):
                os.write(2, _PARTING)
                os._exit(Exit.RESUMABLE)
        if first and self._raises:
            raise Stopped

    # It need not wait until a borrowed module is given back.
    _note.never_held = True  # type: ignore[attr-defined]


_installed: StopSignals | None = None
"""Those of this process; the jobs of a sweep have them in common."""


@contextmanager
def stop_signals(environment: Mapping[str, str] = os.environ) -> Iterator[StopSignals]:
    """Note the signals that arrive inside the block; in a block inside another one, those of the outer one.

    In other threads than the main thread, where Python runs no handlers, none is noted.
    """
    global _installed
    if _installed is not None:
        yield _installed
        return
    signals = StopSignals(environment)
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    _installed = signals
    try:
        signals.install()
        yield signals
    finally:
        signals.restore()
        _installed = None


def _forget_in_child() -> None:
    """Put the handlers back in a forked process, as one of a pool, which is ended by a signal."""
    global _installed
    if _installed is not None:
        _installed.restore()
        _installed = None


os.register_at_fork(after_in_child=_forget_in_child)

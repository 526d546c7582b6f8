"""Hold signals back while a module is switched, so that an interrupt never leaves it half restored.

Python runs signal handlers between any two instructions of the main thread, and handlers such as that of Ctrl-C raise.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]

#: Signals that people and schedulers send, and timers.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2)
#: Seconds after which a repeated signal is no longer held back, so that a block that hangs can be interrupted.
_PATIENCE_S = 5.0


class _Held:
    """Signals that arrived while their handlers are replaced."""

    def __init__(self) -> None:
        self._handlers: dict[int, Handler] = {}
        self._arrived: list[tuple[int, FrameType | None]] = []
        self._since = 0.0
        self._note_handler: Handler = self._note

    def hold(self) -> None:
        """Replace the handlers that are Python functions, but for those that disturb nothing (``never_held``)."""
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler) and not getattr(handler, "never_held", False):
                self._handlers[number] = handler  # before it is replaced: the next line may be interrupted
                signal.signal(number, self._note_handler)

    def release(self) -> None:
        """Put the handlers back; those that were replaced in the meantime stay."""
        for number, handler in reversed(self._handlers.items()):
            if signal.getsignal(number) is self._note_handler:
                signal.signal(number, handler)

    def deliver(self) -> None:
        """Run the handlers of the signals that arrived."""
        arrived, self._arrived = self._arrived, []
        for number, frame in arrived:
            self._handlers[number](number, frame)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._arrived:
            self._since = now
        self._arrived.append((number, frame))
        if now - self._since > _PATIENCE_S:
            self.deliver()


_held: _Held | None = None
"""What the main thread holds back; None if it does not."""


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold back signals inside the block, and deliver them after it; `deliver_signals` delivers them earlier.

    A signal that is repeated five seconds after the first is delivered at once. Does nothing in a block inside another
    one, and in other threads than the main thread, where Python runs no handlers.
    """
    global _held
    if _held is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    held = _Held()
    try:
        held.hold()
        _held = held
        yield
    finally:
        _held = None
        held.release()
        held.deliver()


def _forget_in_child() -> None:
    """Put the handlers back in a process forked inside the block, which may never leave it, as a data loader's."""
    global _held
    if _held is not None:
        _held.release()
        _held = None


os.register_at_fork(after_in_child=_forget_in_child)


def deliver_signals() -> None:
    """Run the handlers of the signals that were held back; call it where an exception may be raised."""
    if _held is not None and threading.current_thread() is threading.main_thread():
        _held.deliver()

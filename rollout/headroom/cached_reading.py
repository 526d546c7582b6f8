"""A number that others change, and that takes time to read."""

from __future__ import annotations

from collections.abc import Callable


class CachedReading:
    """Reads a number at most every so many seconds, and believes it in between.

    Args:
        read: gives the number.
        seconds: for which it is believed.
        clock: monotonic seconds.
    """

    def __init__(self, read: Callable[[], int], seconds: float, clock: Callable[[], float]) -> None:
        self._read, self._seconds, self._clock = read, seconds, clock
        self._number = 0
        self._read_at = -float("inf")

    def __call__(self) -> int:
        """The number, as it was then or is now."""
        now = self._clock()
        if now - self._read_at >= self._seconds:
            self._number, self._read_at = self._read(), now
        return self._number

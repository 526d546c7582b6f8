"""Cache a reading that is slow to take."""

from __future__ import annotations

from collections.abc import Callable


class CachedReading:
    """Reads a number at most once per interval and returns the cached one in between.

    Args:
        read: returns the number.
        seconds: age at which the cached number is read again.
        clock: monotonic seconds.
    """

    def __init__(self, read: Callable[[], int], seconds: float, clock: Callable[[], float]) -> None:
        self._read = read
        self._seconds = seconds
        self._clock = clock
        self._number = 0
        self._read_at = -float("inf")

    def __call__(self) -> int:
        """Return the number, at most ``seconds`` old."""
        now = self._clock()
        if now - self._read_at >= self._seconds:
            self._number, self._read_at = self._read(), now
        return self._number

"""What a worker's time goes into besides the engine's steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Effort:
    """Seconds that a worker waits and commits, and its slowest shard."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting = 0.0
        self._committing = 0.0
        self._slowest: tuple[float, int] | None = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block as time without work."""
        begun = self._clock()
        try:
            yield
        finally:
            self._waiting += self._clock() - begun

    def commit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function that commits a shard; one thread alone does so."""
        begun = self._clock()
        try:
            return function(*args, **kwargs)
        finally:
            self._committing += self._clock() - begun

    def committed(self, shard: int, seconds: float) -> None:
        """Note that a shard is committed, so many seconds after it was opened."""
        self._slowest = max(self._slowest or (seconds, shard), (seconds, shard))

    def measured(self) -> dict[str, Any]:
        """Return what stands in the attempt's file."""
        slowest = self._slowest and {"shard": self._slowest[1], "seconds": round(self._slowest[0], 3)}
        return {
            "waiting_seconds": round(self._waiting, 3),
            "committing_seconds": round(self._committing, 3),
            "slowest_shard": slowest,
        }

"""A simulated device, for tests and for memory-pressure runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class FakeHeadroom:
    """A simulated device.

    ``taken_bytes`` is the memory of other processes, and may be set; ``held`` returns the bytes of the code under test.
    """

    total_bytes: int
    taken_bytes: int = 0
    held: Callable[[], int] = lambda: 0

    def free_bytes(self) -> int:
        return self.total_bytes - self.taken_bytes - self.held()

"""A device made of numbers, for tests and for squeezing a job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class FakeHeadroom:
    """A device made of numbers, for tests and for squeezing a job.

    ``taken_bytes`` is what others use, to be set at will; ``held`` returns what the code under test holds.
    """

    total_bytes: int
    taken_bytes: int = 0
    held: Callable[[], int] = lambda: 0

    def free_bytes(self) -> int:
        return self.total_bytes - self.taken_bytes - self.held()

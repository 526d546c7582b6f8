"""The waiting queue of a simulated job."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from rollout.batcher.simulation.workloads import Workload


class SimulatedQueue:
    """Waiting rows in admission order, and the prompt tokens that they will need.

    Args:
        workload: all rows of the job; they wait in its order.
    """

    def __init__(self, workload: Workload) -> None:
        self._prompts: list[int] = workload.prompt_tokens.tolist()
        self._groups: list[int] = workload.groups.tolist()
        self._rows: deque[int] = deque()
        self._waiting_of: dict[int, int] = {}
        """Number of waiting rows of each group that has any."""
        self.prompt_tokens = 0
        """Prompt tokens of the waiting rows; the prompt of a group counts once."""
        self.moves = 0
        """Number of changes by `pop` and `put_back`."""
        self.put_back(range(len(workload)))
        self.moves = 0

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    def row(self, place: int) -> int:
        """Return the row before which ``place`` others wait."""
        return self._rows[place]

    def pop(self, place: int = 0) -> int:
        """Remove and return the row before which ``place`` others wait."""
        self.moves += 1
        row = self._rows[place]
        del self._rows[place]
        group = self._groups[row]
        self._waiting_of[group] -= 1
        if not self._waiting_of[group]:
            self.prompt_tokens -= self._prompts[row]
            del self._waiting_of[group]
        return row

    def put_back(self, rows: Sequence[int]) -> None:
        """Insert rows before all others."""
        self.moves += 1
        self._rows.extendleft(reversed(rows))
        for row in rows:
            group = self._groups[row]
            if group not in self._waiting_of:
                self.prompt_tokens += self._prompts[row]
            self._waiting_of[group] = self._waiting_of.get(group, 0) + 1

    def reorder(self, rows: Sequence[int]) -> None:
        """Put the waiting rows, all of which are in ``rows``, into another order."""
        self._rows = deque(rows)

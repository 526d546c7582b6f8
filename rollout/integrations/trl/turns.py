"""What is left of each row's budget in the turns of one generation."""

from __future__ import annotations

from collections.abc import Sequence


class Turns:
    """Follows the rows of a generation from turn to turn.

    TRL cuts a row's turns, with what its tools said, to one limit after it has generated them. Tokens that it would
    cut are not generated.
    """

    def __init__(self) -> None:
        self._rows: list[tuple[list[int], int]] = []

    def restart(self) -> None:
        """Forget the rows of an earlier generation."""
        self._rows = []

    def left(self, prompts: Sequence[list[int]], limit: int) -> list[int]:
        """Return how many tokens of each row TRL would keep, at least 1.

        Args:
            prompts: of a turn: all rows, or in the same order those that go on, each with its sequence so far.
            limit: tokens after the first turn's prompt.
        """
        earlier = iter(self._rows)
        self._rows = []
        for prompt in prompts:
            first = next((start for row, start in earlier if prompt[: len(row)] == row), len(prompt))
            self._rows.append((prompt, first))
        return [max(1, limit - len(prompt) + first) for prompt, first in self._rows]

    def ended(self, completions: Sequence[list[int]]) -> None:
        """Note what the rows of the turn generated."""
        self._rows = [(row + ids, first) for (row, first), ids in zip(self._rows, completions, strict=True)]

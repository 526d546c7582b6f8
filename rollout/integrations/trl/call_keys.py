"""Keys of the noise: one for each row that a trainer generates, on any rank, in any call, resumed or not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Mode = Literal["train", "eval"]


@dataclass(slots=True)
class CallKeys:
    """Counts a trainer's generations, and names the rows of each call.

    A row's key holds only what a resumed run finds again: the trainer's global step, and how many generations came
    before in that step. Generations of training and of evaluations are counted apart.
    """

    turn: int = -1
    """The turn of the current generation, from 0; -1 before its first."""
    _generation: str = ""
    _counts: dict[Mode, tuple[int, int]] = field(default_factory=dict)

    def restart(self, mode: Mode) -> None:
        """Count from the start, when training begins or resumes, or when an evaluation begins."""
        self._counts.pop(mode, None)

    def begin_generation(self, mode: Mode, global_step: int) -> None:
        """Begin a generation of one turn or several.

        Args:
            mode: what generates.
            global_step: optimizer steps that were taken before.
        """
        step, earlier = self._counts.get(mode, (global_step, 0))
        if step != global_step:
            earlier = 0
        self._counts[mode] = (global_step, earlier + 1)
        self._generation, self.turn = f"{mode}-step{global_step}-generation{earlier}", -1

    def next_turn(self, rank: int, rows: int) -> list[str]:
        """Return the keys of the next turn's rows, by their positions in the call."""
        self.turn += 1
        return [f"{self._generation}-turn{self.turn}-rank{rank}-row{row}" for row in range(rows)]

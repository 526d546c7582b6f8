"""The number that tokens carry of the weights they were drawn with."""

from __future__ import annotations


class WeightVersion:
    """Counts the changes of the weights; the caller may name a change instead, by setting ``number``.

    A change is counted once: if the caller has set the number since the engine looked last, it stays as it was set.
    """

    def __init__(self) -> None:
        self._number = 0
        self._named = False

    @property
    def number(self) -> int:
        """Version of the weights as they were when the engine looked last."""
        return self._number

    @number.setter
    def number(self, number: int) -> None:
        self._number = number
        self._named = True

    def look(self, changed: bool) -> int:
        """Count a change unless the caller has named it, and return the number to stamp on the next tokens."""
        if changed and not self._named:
            self._number += 1
        self._named = False
        return self._number

"""Which live row makes way when memory runs out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rollout.batcher.types import IntArray

Victim = Callable[[IntArray, IntArray, int], int]
"""(tokens that each live row would have to compute again, pages that each would free, pages needed) to an index;
arrays are oldest row first."""


def youngest(recompute_tokens: IntArray, freed_pages: IntArray, needed_pages: int) -> int:  # noqa: ARG001
    """The row that was admitted last."""
    return len(recompute_tokens) - 1


def cheapest(recompute_tokens: IntArray, freed_pages: IntArray, needed_pages: int) -> int:
    """The row that costs least to compute again, among those that free enough; the youngest of equals."""
    enough = freed_pages >= needed_pages
    costs = np.where(enough, recompute_tokens, np.iinfo(np.int64).max) if enough.any() else -freed_pages
    return len(costs) - 1 - int(np.argmin(costs[::-1]))

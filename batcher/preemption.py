"""Choice of the live row to preempt when memory runs out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rollout.batcher.types import IntArray

Victim = Callable[[IntArray], int]
"""Maps [live rows] tokens that each row would recompute, oldest row first, to the index of the row to preempt."""


def youngest(recompute_tokens: IntArray) -> int:
    """Return the row that was admitted last."""
    return len(recompute_tokens) - 1


def cheapest(recompute_tokens: IntArray) -> int:
    """Return the row with the fewest tokens to recompute, the youngest of equals.

    The memory that it frees does not matter: one row that frees enough costs as much to recompute as several short
    rows that free the same together, and usually frees more than is needed.
    """
    return len(recompute_tokens) - 1 - int(np.argmin(recompute_tokens[::-1]))

"""Which live row makes way when memory runs out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rollout.batcher.types import IntArray

Victim = Callable[[IntArray], int]
"""Tokens that each live row would have to compute again, oldest row first, to an index."""


def youngest(recompute_tokens: IntArray) -> int:
    """The row that was admitted last."""
    return len(recompute_tokens) - 1


def cheapest(recompute_tokens: IntArray) -> int:
    """The row with the fewest tokens to compute again; the youngest of equals.

    What it frees is no matter: a row that frees enough at once costs as much as the short ones that free it together,
    and mostly more than is needed.
    """
    return len(recompute_tokens) - 1 - int(np.argmin(recompute_tokens[::-1]))

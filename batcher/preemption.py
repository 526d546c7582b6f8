"""Choice of the live row to preempt when memory runs out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rollout.batcher.types import IntArray, SharedPages

Victim = Callable[[IntArray], int]
"""Maps [live rows] tokens that each row would recompute, oldest row first, to the index of the row to preempt."""


def recompute_tokens(computed: IntArray, shared: SharedPages) -> IntArray:
    """[decoding rows] Return the tokens that each row would recompute: those in pages that no other live row holds.

    Args:
        computed: [decoding rows] tokens of each row that are in pages, oldest row first.
        shared: pages that several live rows hold; further live rows may follow the decoding ones.
    """
    live = max(len(computed), int(shared.rows.max(initial=-1)) + 1)
    return computed - shared.tokens_per_row(live)[: len(computed)]


def youngest(recompute_tokens: IntArray) -> int:
    """Return the row that was admitted last."""
    return len(recompute_tokens) - 1


def cheapest(recompute_tokens: IntArray) -> int:
    """Return the row with the fewest tokens to recompute, the youngest of equals.

    The memory that it frees does not matter: one row that frees enough costs as much to recompute as several short
    rows that free the same together, and usually frees more than is needed. Tokens in pages that other rows hold stay,
    so a row with a long prompt of which it shares the most is cheap.
    """
    return len(recompute_tokens) - 1 - int(np.argmin(recompute_tokens[::-1]))

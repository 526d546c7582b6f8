"""The memory that rows will need at the worst moment to come, where their lengths are known."""

from __future__ import annotations

import numpy as np

from rollout.batcher.estimators.row_memory import RowMemory, Shared
from rollout.batcher.types import FloatArray


def future_peak(held: FloatArray, grows: FloatArray, remaining: FloatArray) -> float:
    """Most tokens held at once from now on, if each entry grows until it ends and then leaves.

    Entries end one after the other, so the peak is just before one of them does:
    max over k of sum(held_j + grows_j * r_k) over the entries that last at least r_k. This is LightLLM's estimator
    (the Past-Future scheduler, arXiv 2507.10150), with a growth of its own for each entry: shared prompts have none.

    Args:
        held: [n] tokens held now.
        grows: [n] tokens added a step.
        remaining: [n] steps until it leaves.
    """
    if not len(held):
        return 0.0
    order = np.argsort(-remaining, kind="stable")
    totals = np.cumsum(held[order]) + remaining[order] * np.cumsum(grows[order])
    return float(totals.max())


def fitting_exactly(live: RowMemory, shared: Shared, waiting: RowMemory, tokens: float) -> int:
    """How many of the waiting rows may join for the peak to stay within ``tokens``, if every row reaches its limit."""
    held = np.concatenate((shared.tokens, live.own_tokens, waiting.own_tokens))
    lives, starts = live.remaining.astype(np.float64), waiting.remaining.astype(np.float64)
    remaining = np.concatenate((shared.longest(lives), lives, starts))
    grows = np.ones(len(held))
    grows[: len(shared)] = 0
    low, high = 0, len(waiting)
    while low < high:
        middle = (low + high + 1) // 2
        count = len(shared) + len(live) + middle
        if future_peak(held[:count], grows[:count], remaining[:count]) <= tokens:
            low = middle
        else:
            high = middle - 1
    return low

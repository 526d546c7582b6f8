"""Peak memory of rows whose remaining lengths are known."""

from __future__ import annotations

import numpy as np

from rollout.batcher.estimators.row_memory import RowMemory
from rollout.batcher.types import FloatArray, SharedPages


def future_peak(held: FloatArray, growth: FloatArray, remaining: FloatArray) -> float:
    """Return the most tokens held at any future step, if each entry grows until it ends and then frees its memory.

    Memory falls only when an entry ends, so the peak is just before one of the ends: max over k of
    sum(held_j + growth_j * r_k) over the entries with r_j >= r_k. This is the estimator of LightLLM's Past-Future
    scheduler (arXiv 2507.10150), with a growth per entry because shared pages do not grow.

    Args:
        held: [n] tokens held now.
        growth: [n] tokens added per step.
        remaining: [n] steps until the entry ends.
    """
    if not len(held):
        return 0.0
    order = np.argsort(-remaining, kind="stable")
    totals = np.cumsum(held[order]) + remaining[order] * np.cumsum(growth[order])
    return float(totals.max())


def rows_that_fit(live: RowMemory, shared: SharedPages, waiting: RowMemory, kv_tokens: float) -> int:
    """Return how many waiting rows keep the peak within ``kv_tokens`` if every row reaches its limit."""
    held = np.concatenate((shared.tokens.astype(np.float64), live.own_tokens, waiting.own_tokens))
    live_steps = live.remaining.astype(np.float64)
    waiting_steps = waiting.remaining.astype(np.float64)
    remaining = np.concatenate((shared.max_over_holders(live_steps), live_steps, waiting_steps))
    growth = np.ones(len(held))
    growth[: len(shared)] = 0
    # The peak never falls with another row, so bisection finds the largest number that fits.
    low, high = 0, len(waiting)
    while low < high:
        middle = (low + high + 1) // 2
        count = len(shared) + len(live) + middle
        if future_peak(held[:count], growth[:count], remaining[:count]) <= kv_tokens:
            low = middle
        else:
            high = middle - 1
    return low

"""The memory that live rows will need at the worst moment to come, where their lengths are known."""

from __future__ import annotations

import numpy as np

from rollout.batcher.types import FloatArray, IntArray


def future_peak(held: FloatArray, grows: FloatArray, remaining: FloatArray) -> float:
    """Most tokens held at once from now on, if each entry grows until it ends and then leaves.

    Entries end one after the other, so the peak is just before one of them does:
    max over k of sum(held_j + grows_j * r_k) over the entries that last at least r_k. LightLLM's estimator
    (Past-Future scheduler, arXiv 2507.10150), with a growth of each entry's own for shared prompts, which do
    not grow.

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


def shared_entries(groups: IntArray, shared: FloatArray, remaining: FloatArray) -> tuple[FloatArray, FloatArray]:
    """What groups of rows hold together: tokens, and steps until the last row of each leaves. [groups] each."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    last = np.zeros(len(first))
    np.maximum.at(last, inverse, remaining)
    return shared[first], last

"""In which order rows that wait are admitted: rows of a prompt together, long ones early enough."""

from __future__ import annotations

import numpy as np

from rollout.batcher.types import FloatArray, IntArray

# A row is started early enough to last so many times what is expected: expectations are wrong, and to be early by a
# row's length costs less than to be alone at the end.
_CAUTION = 2.0


def together(groups: IntArray) -> IntArray:
    """The order of arrival, but for rows of a group, which follow the first of theirs. Indices, [rows]."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    return np.argsort(first[inverse], kind="stable")


def steady_rows(kv_tokens: int, prompt_tokens: IntArray, output_tokens: FloatArray) -> float:
    """Rows that memory holds when rows of all ages live: each takes E[prompt] + E[output^2] / (2 E[output])."""
    return float(kv_tokens / (prompt_tokens.mean() + (output_tokens**2).mean() / (2 * output_tokens.mean())))


def early_enough(groups: IntArray, expected_tokens: FloatArray, rows: float) -> IntArray:
    """The order of arrival, but long rows before their latest start, so that none is left alone at the end.

    With so many rows alive, a job takes about T = sum(expected) / rows steps, and a row of expected length l should
    start within the first s = T - 2 * l of them. Where s is positive, the key is its share of the arrivals times s:
    start times are spread evenly over what each row may choose from. So what is nearly as long as the job goes first,
    longest before, short rows keep their place, and at the end only short ones are left; until then the mix of lengths
    stays what it is. Longest-first order does not leave it so: memory then holds long rows only, and whoever learns
    lengths while the job runs is misled.

    Rows of a group go together, at their mean. Rows of which nothing is expected (NaN) count as the mean of the others,
    and without any expectation the order is that of `together`.

    Args:
        groups: [rows] equal in rows with the same prompt.
        expected_tokens: [rows] outputs to come, NaN where nobody knows.
        rows: that live at a time, about.

    Returns:
        [rows] indices, first to be admitted first.
    """
    known = ~np.isnan(expected_tokens)
    if not known.any():
        return together(groups)
    lengths = np.where(known, expected_tokens, expected_tokens[known].mean())
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    of_group = np.bincount(inverse, lengths) / np.bincount(inverse)
    slack = lengths.sum() / max(rows, 1.0) - _CAUTION * of_group
    arrived = (np.argsort(np.argsort(first)) + 1) / len(first)
    keys = np.where(slack > 0, arrived * slack, slack)
    return np.lexsort((np.arange(len(groups)), first[inverse], keys[inverse]))

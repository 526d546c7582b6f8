"""Survival estimate of row lengths: a life table by age, in which live rows are censored observations."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from rollout.batcher.types import FinishedRow, FloatArray, IntArray

# Bins are 4 tokens wide up to an age of 128 tokens, and about 3 % of the age beyond.
_FINE_WIDTH, _FINE_UP_TO, _COARSE_RATIO = 4, 128, 1.03
_MAX_AGE = 1 << 17


def _bin_edges() -> IntArray:
    edges = list(range(0, _FINE_UP_TO, _FINE_WIDTH))
    while edges[-1] < _MAX_AGE:
        edges.append(max(edges[-1] + _FINE_WIDTH, round(edges[-1] * _COARSE_RATIO)))
    return np.array(edges, np.int64)


EDGES = _bin_edges()
"""[bins + 1] ages, in generated tokens, at which bins begin; the last edge ends the last bin."""
_BIN_OF_AGE = np.repeat(np.arange(len(EDGES) - 1), np.diff(EDGES))
_MIDDLES: FloatArray = (EDGES[:-1] + EDGES[1:]) / 2


def bins_of(ages: IntArray) -> IntArray:
    """Return the bin of each age."""
    return _BIN_OF_AGE[np.minimum(ages, len(_BIN_OF_AGE) - 1)]


class Survival:
    """Probability that a row survives each bin of ages.

    This is the actuarial estimator (Cutler and Ederer, 1958): among the rows that reached a bin, the share that
    ended in it, where a row that is still in the bin counts half. Live rows and rows cut at their limit are such
    censored rows. Without them a young job, in which short rows finish first, would look like a job of short rows.

    The prior is the hazard 1 / (a + max_new_tokens / 16) at age a, so that half of the rows end by
    max_new_tokens / 16. It weighs as much as ``_PRIOR_ROWS`` rows in each bin. Finished rows fade, so that the
    estimate follows a drift: after ``memory_rows`` further rows, a row counts 1/e.

    Args:
        memory_rows: number of finished rows after which a row has faded to 1/e.
    """

    _PRIOR_ROWS = 0.5

    def __init__(self, memory_rows: int = 4096) -> None:
        self._decay = 1 - 1 / memory_rows
        self._ended = np.zeros(len(EDGES) - 1)
        self._cut = np.zeros(len(EDGES) - 1)
        self._survival = np.ones(len(EDGES))

    @property
    def finished(self) -> float:
        """Return the weight of the rows that ended before their limit."""
        return float(self._ended.sum())

    def learn(self, finished: Iterable[FinishedRow]) -> None:
        """Add rows that finished."""
        for row in finished:
            self._ended *= self._decay
            self._cut *= self._decay
            # A row of n tokens was still alive at age n - 1, and ended from there.
            last_age = max(0, row.output_tokens - 1)
            last_bin = _BIN_OF_AGE[min(last_age, len(_BIN_OF_AGE) - 1)]
            counts = self._cut if row.cut else self._ended
            counts[last_bin] += 1

    def estimate(self, ages: IntArray, max_new_tokens: float) -> None:
        """Estimate survival from the finished rows and the live rows.

        Args:
            ages: [live rows] generated tokens.
            max_new_tokens: limit of a typical row, for the prior.
        """
        bins = len(EDGES) - 1
        censored = self._cut + np.bincount(bins_of(ages), minlength=bins)
        at_risk = np.cumsum((self._ended + censored)[::-1])[::-1] - censored / 2
        prior_scale = max(1.0, max_new_tokens / 16)
        prior = np.diff(EDGES) / (EDGES[1:] + prior_scale)
        hazard = (self._ended + self._PRIOR_ROWS * prior) / (at_risk + self._PRIOR_ROWS)
        np.cumprod(1 - np.minimum(hazard, 1 - 1e-9), out=self._survival[1:])

    def quantile(self, share: float) -> float:
        """Return the length that ``share`` of the rows do not exceed."""
        return float(EDGES[np.argmax(self._survival <= 1 - share)] or EDGES[-1])

    def survival(self, steps: FloatArray) -> FloatArray:
        """[bins, len(steps)] Return the probability that a row in a bin survives ``steps`` more tokens."""
        now = np.interp(_MIDDLES, EDGES, self._survival)
        then = np.interp(_MIDDLES[:, None] + steps, EDGES, self._survival)
        return then / np.maximum(now, 1e-300)[:, None]

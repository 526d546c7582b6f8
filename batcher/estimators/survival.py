"""How long rows last, learned while they run: a life table by age, with running rows as censored lives."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from rollout.batcher.types import FinishedRow, FloatArray, IntArray

# Ages are told apart by four tokens where they are small and by three in a hundred where they are not.
_FINE, _FINE_UP_TO, _COARSE = 4, 128, 1.03
_OLDEST = 1 << 17


def _edges() -> IntArray:
    edges = list(range(0, _FINE_UP_TO, _FINE))
    while edges[-1] < _OLDEST:
        edges.append(max(edges[-1] + _FINE, round(edges[-1] * _COARSE)))
    return np.array(edges, np.int64)


EDGES = _edges()
"""[bins + 1] the ages, in generated tokens, at which bins begin; the last one ends the last bin."""
_BIN_OF_AGE = np.repeat(np.arange(len(EDGES) - 1), np.diff(EDGES))
_MIDDLES: FloatArray = (EDGES[:-1] + EDGES[1:]) / 2


def bins_of(ages: IntArray) -> IntArray:
    """The bin of each age."""
    return _BIN_OF_AGE[np.minimum(ages, len(_BIN_OF_AGE) - 1)]


class Survival:
    """The probability that a row of an age ends, for each bin of ages.

    The actuarial estimator (Cutler and Ederer, 1958): of the rows that came to a bin, those that ended in it,
    where a row that is still within it counts half. Running rows are such rows, so that a young job, in which
    short rows finish first, is not taken for one of short rows; rows cut at their limit are too.

    Before anything is known, a row of age a ends with the hazard 1 / (a + max_new_tokens / 16), half of them
    by max_new_tokens / 16; this prior weighs as much as ``_PRIOR_ROWS`` rows in each bin and fades.
    Old rows fade too, so that a drift is followed: after ``memory_rows`` more, one counts for 1/e.

    Args:
        memory_rows: finished rows to remember, about.
    """

    _PRIOR_ROWS = 0.5

    def __init__(self, memory_rows: int = 4096) -> None:
        self._keep = 1 - 1 / memory_rows
        self._ended = np.zeros(len(EDGES) - 1)
        self._cut = np.zeros(len(EDGES) - 1)
        self._survival = np.ones(len(EDGES))

    @property
    def finished(self) -> float:
        """Rows that ended by themselves and are remembered."""
        return float(self._ended.sum())

    def learn(self, finished: Iterable[FinishedRow]) -> None:
        """Rows that ended."""
        for row in finished:
            self._ended *= self._keep
            self._cut *= self._keep
            # Of age a - 1 it had not ended yet.
            at = _BIN_OF_AGE[min(max(0, row.output_tokens - 1), len(_BIN_OF_AGE) - 1)]
            (self._cut if row.cut else self._ended)[at] += 1

    def estimate(self, ages: IntArray, max_new_tokens: float) -> None:
        """Survival from what has ended, and from live rows of these ages.

        Args:
            ages: [live rows] generated tokens.
            max_new_tokens: of a typical row, for the prior.
        """
        bins = len(EDGES) - 1
        left = self._cut + np.bincount(bins_of(ages), minlength=bins)
        came = np.cumsum((self._ended + left)[::-1])[::-1] - left / 2
        scale = max(1.0, max_new_tokens / 16)
        prior = np.diff(EDGES) / (EDGES[1:] + scale)
        ends = (self._ended + self._PRIOR_ROWS * prior) / (came + self._PRIOR_ROWS)
        np.cumprod(1 - np.minimum(ends, 1 - 1e-9), out=self._survival[1:])

    def length(self, share: float) -> float:
        """The length that this share of rows does not exceed."""
        return float(EDGES[np.argmax(self._survival <= 1 - share)] or EDGES[-1])

    def survival(self, steps: FloatArray) -> FloatArray:
        """[bins, len(steps)] the probability that a row in a bin lives on for so many tokens more."""
        now = np.interp(_MIDDLES, EDGES, self._survival)
        then = np.interp(_MIDDLES[:, None] + steps, EDGES, self._survival)
        return then / np.maximum(now, 1e-300)[:, None]

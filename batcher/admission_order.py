"""Admission order of waiting rows: rows of a prompt together, and long rows early enough."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from rollout.batcher.types import FloatArray, IntArray

# A row starts early enough to last twice its expected length even if expectations are exact: starting too early costs
# less than running alone at the end.
_CAUTION = 2.0
# It starts earlier by three standard deviations of the error of expectations.
_DEVIATIONS = 3.0
# Expectations count as exact until 16 rows have finished.
_MIN_FINISHED = 16
# Expectations are used if their slope is three standard errors above zero.
_SLOPE_STANDARD_ERRORS = 3.0
# Rows are reordered when slope or error have changed by 0.1.
_MIN_CHANGE = 0.1
_DECAY = 1 - 1 / 4096


def by_group(groups: IntArray) -> IntArray:
    """[rows] Return indices in order of arrival, except that rows of a group follow the first row of the group."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    return np.argsort(first[inverse], kind="stable")


def steady_rows(kv_tokens: int, prompt_tokens: IntArray, output_tokens: FloatArray) -> float:
    """Return how many rows fit when rows of all ages are live, at E[prompt] + E[output^2] / (2 E[output]) per row."""
    return float(kv_tokens / (prompt_tokens.mean() + (output_tokens**2).mean() / (2 * output_tokens.mean())))


def by_latest_start(groups: IntArray, expected_tokens: FloatArray, rows: float, caution: float = _CAUTION) -> IntArray:
    """[rows] Return indices in order of arrival, with long rows moved before their latest start.

    With ``rows`` live rows, a job takes about T = sum(expected) / rows steps, and a row of expected length l must
    start within its slack, the first s = T - caution * l steps, or it runs alone at the end. Where s is positive,
    the sort key is s times the row's rank of arrival in (0, 1], which spreads start times evenly over the slack.
    Rows almost as long as the job thus go first, longest first. Short rows keep their place, and only short rows are
    left at the end. Until then the mix of lengths is that of the job, so that estimators which learn lengths
    meanwhile are not misled, as they are in longest-first order. More caution brings the order closer to
    longest-first.

    Rows of a group stay together, as early as the longest of them requires. Rows without expectation (NaN) count as
    the mean of the others. Without any expectation the order is ``by_group``.

    Args:
        groups: [rows] equal for rows with the same prompt.
        expected_tokens: [rows] expected outputs, NaN where unknown.
        rows: number of live rows, approximately.
        caution: multiple of its expected length that a row may last without running alone at the end.
    """
    known = ~np.isnan(expected_tokens)
    if not known.any():
        return by_group(groups)
    lengths = np.where(known, expected_tokens, expected_tokens[known].mean())
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    longest = np.zeros(int(inverse.max()) + 1)
    np.maximum.at(longest, inverse, lengths)
    slack = lengths.sum() / max(rows, 1.0) - caution * longest
    arrival = (np.argsort(np.argsort(first)) + 1) / len(first)
    keys = np.where(slack > 0, arrival * slack, slack)
    return np.lexsort((np.arange(len(groups)), first[inverse], keys[inverse]))


class _Fit(NamedTuple):
    """Regression log(length) = intercept + slope * log(expected); a slope of 0 means that expectations are useless."""

    intercept: float
    slope: float
    error: float
    """Standard deviation of the residuals."""


_EXACT = _Fit(intercept=0.0, slope=1.0, error=0.0)
_USELESS = _Fit(intercept=0.0, slope=0.0, error=0.0)


class Ordering:
    """Order rows ``by_latest_start``, with expectations corrected from the rows that have finished.

    Over the finished rows, the logarithm of the length is regressed on that of the expectation: log(length) =
    a + b * log(expected), with residuals of standard deviation s. The regression corrects the expectations of
    waiting rows, so hints may count words, or be off by a factor. The caution is 2 * exp(3 * s): exact hints spread
    long rows over their slack, and vague hints move the longest to the front, because any of them may be longer
    still. Where b is not significantly above zero, hints are useless and the order is that of arrival.

    Expectations count as exact until 16 rows have finished. Short rows finish first, which biases an early
    regression against the hints, but the end of the job, where the order matters, is ordered by a late one.
    """

    def __init__(self) -> None:
        self._sums = np.zeros(6)
        """Decayed sums of 1, x, y, x * x, x * y, y * y over the finished rows."""
        self._finished = 0
        self._next_check = 0
        self._used: _Fit | None = None
        """The fit of the last order."""

    def learn(self, expected_tokens: float, tokens: int) -> None:
        """Add a finished row; an unknown expectation (NaN) is ignored."""
        if math.isnan(expected_tokens):
            return
        x, y = math.log(max(1.0, expected_tokens)), math.log(max(1, tokens))
        self._sums *= _DECAY
        self._sums += (1.0, x, y, x * x, x * y, y * y)
        self._finished += 1

    def changed(self) -> bool:
        """Return True if the fit has changed since the last ``order``; checked only at growing intervals."""
        if self._finished < self._next_check:
            return False
        self._next_check = max(_MIN_FINISHED, self._finished + max(8, self._finished // 8))
        if self._used is None:
            return True
        fit = self._fit()
        return max(abs(fit.slope - self._used.slope), abs(fit.error - self._used.error)) > _MIN_CHANGE

    def order(
        self,
        groups: IntArray,
        prompt_tokens: IntArray,
        expected_tokens: FloatArray,
        kv_tokens: int,
        most_rows: float = math.inf,
    ) -> IntArray:
        """[rows] Return the indices of the waiting rows in the order of admission.

        Args:
            groups: [rows] equal for rows with the same prompt.
            prompt_tokens: [rows] prompt lengths.
            expected_tokens: [rows] expected outputs, NaN where unknown.
            kv_tokens: tokens that memory holds.
            most_rows: greatest number of live rows.
        """
        fit = self._used = self._fit()
        known = ~np.isnan(expected_tokens)
        if not fit.slope or not known.any():
            return by_group(groups)
        corrected = np.exp(fit.intercept + fit.slope * np.log(np.maximum(1.0, expected_tokens)) + fit.error**2 / 2)
        rows = min(steady_rows(kv_tokens, prompt_tokens, corrected[known]), most_rows)
        return by_latest_start(groups, corrected, rows, _CAUTION * math.exp(_DEVIATIONS * fit.error))

    def _fit(self) -> _Fit:
        if self._finished < _MIN_FINISHED:
            return _EXACT
        n = self._sums[0]
        x, y, xx, xy, yy = (self._sums[1:] / n).tolist()
        x_variance, covariance = xx - x * x, xy - x * y
        if x_variance < 1e-9:
            return _USELESS
        slope = covariance / x_variance
        variance = max(0.0, yy - y * y - slope * covariance) * n / (n - 2)
        if slope <= _SLOPE_STANDARD_ERRORS * math.sqrt(variance / (n * x_variance)):
            return _USELESS
        return _Fit(intercept=y - slope * x, slope=slope, error=math.sqrt(variance))

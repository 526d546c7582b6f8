"""The distribution of row lengths, from finished and live rows, with an extrapolation beyond the ages seen so far."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from math import erfc, sqrt
from typing import NamedTuple

import numpy as np

from rollout.batcher.estimators.survival import EDGES, bins_of
from rollout.batcher.types import FinishedRow, FloatArray, IntArray

_SCALES = np.geomspace(2.0, 1 << 17, 120)
#: Lognormal distributions: medians are the scales.
_SIGMAS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.1, 1.4, 1.8)
#: Weibull distributions, whose tails are lighter.
_SHAPES = (0.6, 0.8, 1.0, 1.25, 1.6, 2.2, 3.5)
#: Samples of a prompt are alike, and no distribution is quite right, so evidence counts half.
_EVIDENCE = 0.5
_ODD_SHARE = 1e-5
_LEAST_WEIGHT = 0.01
#: Rows in a bin of ages that the fitted distributions weigh as much as.
_FITTED_ROWS = 4.0


class LengthPosterior:
    """Survival of row lengths: a life table, and fitted distributions where few rows have been seen.

    Live rows and rows cut at their limit are censored: their lengths are at least their ages. All
    distributions of a grid are weighted by their likelihood, so that what lies beyond keeps its uncertainty.
    """

    def __init__(self) -> None:
        self._ended = np.zeros(len(EDGES) - 1)
        """[bins] rows that ended, by the bin of their last token."""
        self._cut = np.zeros(len(EDGES))
        """[edges] rows that were cut, shared between the edges around their age."""
        self._survival = np.ones(len(EDGES))
        self._at_risk = np.zeros(len(EDGES) - 1)
        self._weights = np.ones(1)
        self._beyond = np.zeros((1, len(EDGES)))
        """[likely distributions, edges] log-probabilities to reach an edge from the age of the oldest live row."""

    def learn(self, finished: Iterable[FinishedRow]) -> None:
        """Add rows that finished."""
        rows = list(finished)
        last_bins = bins_of(np.array([max(0, row.output_tokens - 1) for row in rows], np.int64))
        cut = np.array([row.cut for row in rows], bool)
        self._ended += np.bincount(last_bins[~cut], minlength=len(self._ended))
        self._cut += _at_edges(np.array([row.output_tokens for row in rows if row.cut], np.int64))

    def estimate(self, ages: IntArray, limit: float) -> None:
        """Weigh the distributions by the finished rows and the live rows, and select the middle of them.

        Args:
            ages: [live rows] generated tokens.
            limit: ``max_new_tokens`` of a typical row; lengths of far more tokens count as unlikely.
        """
        censored = self._cut + _at_edges(ages)
        fits = _distributions()
        likelihood = _EVIDENCE * (fits.log_ending @ self._ended + fits.log_reaching @ censored)
        # Users choose a limit with lengths in mind: medians far above it are unlikely.
        likelihood -= 2 * np.log(np.maximum(1.0, fits.scales / limit))
        weights = np.exp(likelihood - likelihood.max())
        likely = np.flatnonzero(weights > _LEAST_WEIGHT)
        self._weights = weights[likely]
        reached = int(bins_of(ages.max(keepdims=True, initial=0))[0])
        self._beyond = fits.log_survival[likely] - fits.log_survival[likely, reached][:, None]
        # A row that ended was at risk in its bin; one at an age between two edges for its part of the bin.
        self._at_risk = np.cumsum(self._ended[::-1])[::-1] + np.cumsum(censored[::-1])[::-1][1:]
        self.select(0.5)

    def select(self, quantile: float) -> None:
        """Use a quantile of what the distributions say about the ages to come: above 0.5 for longer rows."""
        fitted = _weighted_quantile(self._beyond, self._weights, quantile)
        hazard = (self._ended - _FITTED_ROWS * np.expm1(np.diff(fitted))) / (self._at_risk + _FITTED_ROWS)
        np.cumprod(1 - np.minimum(hazard, 1 - 1e-9), out=self._survival[1:])

    def lengths(self, spread: FloatArray, ages: FloatArray) -> FloatArray:
        """Return lengths by inverting the estimate.

        Args:
            spread: [rows] numbers in (0, 1): the share of rows of that age that live longer.
            ages: [rows] ages that the rows have reached.
        """
        reached = np.interp(ages, EDGES, self._survival) * spread
        return np.interp(reached, self._survival[::-1], EDGES[::-1].astype(np.float64))


class _Fits(NamedTuple):
    """Distributions of lengths; arrays of [distributions, bins or edges] unless stated otherwise."""

    scales: FloatArray
    """[distributions] their scales, in tokens."""
    log_ending: FloatArray
    """Log-probability to end in a bin."""
    log_reaching: FloatArray
    """Log-probability to reach an edge."""
    log_survival: FloatArray
    """The same without the share of any lengths."""


@lru_cache(maxsize=1)
def _distributions() -> _Fits:
    edges = np.maximum(EDGES, 0.5).astype(np.float64)
    reaching = np.concatenate(
        [_normal_tail(np.log(edges / _SCALES[:, None]) / sigma) for sigma in _SIGMAS]
        + [np.exp(-np.minimum((edges / _SCALES[:, None]) ** shape, 700.0)) for shape in _SHAPES]
    )
    reaching[:, 0] = 1.0
    # A small share of any lengths, so that one odd row rules out no distribution.
    tolerant = (1 - _ODD_SHARE) * reaching + _ODD_SHARE * np.linspace(1.0, 0.0, len(EDGES))
    scales = np.tile(_SCALES, len(_SIGMAS) + len(_SHAPES))
    return _Fits(
        scales, np.log(-np.diff(tolerant)), np.log(np.maximum(tolerant, 1e-12)), np.log(np.maximum(reaching, 1e-300))
    )


def _at_edges(ages: IntArray) -> FloatArray:
    """[edges] Count ages, each shared between the edges around it."""
    bins = bins_of(ages)
    share = np.clip((ages - EDGES[bins]) / (EDGES[bins + 1] - EDGES[bins]), 0.0, 1.0)
    lower = np.bincount(bins, weights=1 - share, minlength=len(EDGES))
    return np.asarray(lower + np.bincount(bins + 1, weights=share, minlength=len(EDGES)))


def _normal_tail(scores: FloatArray) -> FloatArray:
    """Return the probability that a standard normal number exceeds each score."""
    table = np.linspace(-8.0, 36.0, 4401)
    tails = np.log([0.5 * erfc(score / sqrt(2)) for score in table.tolist()])
    return np.exp(np.interp(scores, table, tails))


def _weighted_quantile(values: FloatArray, weights: FloatArray, quantile: float) -> FloatArray:
    """[columns] Return the quantile of each column of ``values`` [rows, columns], whose rows have weights."""
    order = np.argsort(values, axis=0)
    cumulative = np.cumsum(weights[order], axis=0)
    first = np.argmax(cumulative >= quantile * cumulative[-1], axis=0)
    sorted_values: FloatArray = np.take_along_axis(values, order, axis=0)
    quantiles: FloatArray = sorted_values[first, np.arange(values.shape[1])]
    return quantiles

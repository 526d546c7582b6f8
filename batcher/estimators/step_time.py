"""Online fit of the step time as a linear function of rows, attended tokens and prefilled tokens."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from rollout.batcher.types import FloatArray, StepSample

# Scales that bring the four terms to a similar size: a step, 100 rows, 100,000 attended tokens, 1,000 prefilled tokens.
_ROWS, _KV_TOKENS, _PREFILL = 1e-2, 1e-5, 1e-3
_SCALES = np.array([1.0, _ROWS, _KV_TOKENS, _PREFILL])
_RIDGE = 1e-6
_IDENTITY = np.eye(4)
_REGIMES = 12
_RECENT_STEPS = 16
# Beyond 64 steps a single step hardly moves the solution, so the equations are solved once per 8 steps.
_SAMPLES_BEFORE_LAZY_SOLVE = 64
_STEPS_PER_SOLUTION = 8
# A step within 10 % is never an outlier, however small the deviation is, because the linear model is only approximate.
_MIN_OUTLIER_ERROR = 0.1
_OUTLIER_DEVIATIONS = 4.0
# The margin, in standard deviations: its first value, and how far an overrun raises it. It settles within some hundred
# steps, and then varies by about a seventh of a standard deviation.
_FIRST_MARGIN = 2.6
_MARGIN_GAIN = 0.1


class Coefficients(NamedTuple):
    """Milliseconds per step, per decoding row, per attended token and per prefilled token."""

    step: float
    row: float
    kv_token: float
    prefill_token: float


class StepTime:
    """Fit ms = c0 + c1 * rows + c2 * kv_tokens + c3 * prefill_tokens, all c >= 0, by recursive least squares.

    The recursion keeps the sums of the normal equations rather than their inverse, so that the solution can be kept
    non-negative. Sums are kept per regime, the power of two of the rows, and those of a regime decay only with new
    steps of that regime. A job spends most steps at one batch size, where c0 and c1 cannot be told apart, so the
    evidence of its first steps must last.

    Errors are relative to the step time, because noise is proportional to it; a step of a hundred times the usual
    time thus has almost no weight. A step off by more than four standard deviations is an outlier (a compilation, an
    allocation, another process) and is ignored, unless most of the last 16 steps are outliers. Then the conditions
    have changed, and the fit restarts from those steps.

    The margin against overruns follows from quantile tracking (Angelopoulos, Candes, Tibshirani, arXiv 2307.16895).
    Each step that exceeds the margin raises it and each other step lowers it, in the ratio that makes
    ``overrun_share`` of the steps exceed it in the long run, for any noise and any error of the model. The margin is
    kept in standard deviations, which adapt faster. Outliers raise it at most to the outlier limit.

    Args:
        overrun_share: share of the steps that may exceed ``overrun_margin``.
        memory_steps: number of steps of its regime after which a step has decayed to 1/e.
    """

    def __init__(self, overrun_share: float = 0.009, memory_steps: int = 512) -> None:
        self._overrun_share = overrun_share
        self._decay = 1 - 1 / memory_steps
        self._recent: deque[StepSample] = deque(maxlen=_RECENT_STEPS)
        self._outliers: deque[bool] = deque(maxlen=_RECENT_STEPS)
        self._clear()

    def _clear(self) -> None:
        self._solution: Coefficients | None = None
        # [regimes, 5, 5] of the four terms and the milliseconds, all over the milliseconds: the left side of the normal
        # equations, and the right side as the last column.
        self._sums = np.zeros((_REGIMES, 5, 5))
        self._squared_errors = 0.0
        self._error_weight = 0.0
        self._margin = _FIRST_MARGIN
        self._outliers.clear()
        self.samples = 0
        """Number of steps in the fit."""

    @property
    def coefficients(self) -> Coefficients:
        """Return c0 to c3; zeros before the first step."""
        if self._solution is None:
            sums = self._sums.sum(0)
            scaled = _solve_non_negative(sums[:4, :4], sums[:4, 4])
            self._solution = Coefficients(*(scaled * _SCALES).tolist())
        return self._solution

    def with_prior(self, step: StepSample, weight: float) -> Coefficients:
        """Return c0 to c3 with a supposed step that counts as ``weight`` steps: it tells what the steps leave open."""
        sums = self._sums.sum(0) + weight * _products(step)
        return Coefficients(*(_solve_non_negative(sums[:4, :4], sums[:4, 4]) * _SCALES).tolist())

    @property
    def deviation(self) -> float:
        """Return the relative standard deviation of the error, with a prior of 5 %."""
        prior_weight = 4.0
        return math.sqrt((self._squared_errors + prior_weight * 0.05**2) / (self._error_weight + prior_weight))

    @property
    def overrun_margin(self) -> float:
        """Return the margin above the prediction that only ``overrun_share`` of the steps exceed: 0.05 means 5 %."""
        return self._margin * self.deviation

    def predict(self, rows: int, kv_tokens: int, prefill_tokens: int) -> float:
        """Return the predicted milliseconds of a step."""
        c = self.coefficients
        return c.step + c.row * rows + c.kv_token * kv_tokens + c.prefill_token * prefill_tokens

    def learn(self, steps: Iterable[StepSample]) -> None:
        """Add steps to the fit."""
        for step in steps:
            if step.ms > 0 and (step.rows or step.prefill_tokens):
                self._learn(step)

    def _learn(self, step: StepSample) -> None:
        self._recent.append(step)
        if self.samples < _RECENT_STEPS:
            self._add(step)
            if self.samples == _RECENT_STEPS:
                self._restart(tuple(self._recent))
            return
        error = self._error(step)
        deviation = self.deviation
        outlier_error = max(_MIN_OUTLIER_ERROR, _OUTLIER_DEVIATIONS * deviation)
        self._track_margin(error, deviation, outlier_error)
        outlier = abs(error) > outlier_error
        self._outliers.append(outlier)
        if not outlier:
            self._squared_errors = self._decay * self._squared_errors + error**2
            self._error_weight = self._decay * self._error_weight + 1
            self._add(step)
        elif self._outliers.count(True) > _RECENT_STEPS // 2:
            self._restart(tuple(self._recent))

    def _track_margin(self, error: float, deviation: float, outlier_error: float) -> None:
        """Move the margin by quantile tracking, within [0, ``outlier_error``]."""
        overrun = 1.0 if error > self._margin * deviation else 0.0
        margin = self._margin + _MARGIN_GAIN * (overrun - self._overrun_share)
        self._margin = min(max(margin, 0.0), outlier_error / deviation)

    def _restart(self, steps: Sequence[StepSample]) -> None:
        """Fit these steps alone, without the outliers among them."""
        self._clear()
        for step in steps:
            self._add(step)
        errors = np.abs([self._error(step) for step in steps])
        outlier_error = max(_MIN_OUTLIER_ERROR, 6 * float(np.median(errors)))
        self._clear()
        for step, error in zip(steps, errors.tolist(), strict=True):
            if error <= outlier_error:
                self._add(step)
        self.samples = max(self.samples, _RECENT_STEPS)

    def _error(self, step: StepSample) -> float:
        """Return the relative error of the prediction; positive if the step was slower."""
        predicted = self.predict(step.rows, step.kv_tokens, step.prefill_tokens)
        return step.ms / max(predicted, 1e-9) - 1

    def _add(self, step: StepSample) -> None:
        sums = self._sums[min(int(step.rows).bit_length(), _REGIMES - 1)]
        sums *= self._decay
        sums += _products(step)
        self.samples += 1
        if self.samples < _SAMPLES_BEFORE_LAZY_SOLVE or self.samples % _STEPS_PER_SOLUTION == 0:
            self._solution = None


def _products(step: StepSample) -> FloatArray:
    """Return [5, 5] the products of the terms and the milliseconds of a step, all over the milliseconds."""
    rows, kv_tokens, prefill_tokens = step.rows * _ROWS, step.kv_tokens * _KV_TOKENS, step.prefill_tokens * _PREFILL
    terms = np.array([1.0, rows, kv_tokens, prefill_tokens, step.ms])
    terms /= step.ms
    products: FloatArray = terms[:, None] * terms
    return products


def _solve_non_negative(left: FloatArray, right: FloatArray) -> FloatArray:
    """Solve the normal equations, fixing negative terms at zero one by one, the most negative first."""
    left = left + _RIDGE * max(float(left.trace()), 1e-12) * _IDENTITY
    free = np.arange(4)
    solution = np.zeros(4)
    while len(free):
        candidate = np.linalg.solve(left, right)
        lowest = candidate.argmin()
        if candidate[lowest] >= 0:
            solution[free] = candidate
            break
        kept = np.arange(len(free)) != lowest
        free, left, right = free[kept], left[kept][:, kept], right[kept]
    return solution

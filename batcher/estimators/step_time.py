"""What a step takes, learned while steps run: a fit over rows, tokens attended to and tokens prefilled."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from rollout.batcher.types import FloatArray, StepSample

# Terms are scaled to be of similar size: a step, 100 rows, 100,000 tokens attended to, 1,000 prefilled.
_SCALES = np.array([1.0, 1e-2, 1e-5, 1e-3])
_RIDGE = 1e-6
_REGIMES = 12
_RECENT = 16
# The sums change with each step; after some steps a single one no longer changes what follows from them.
_YOUNG = 64
_STEPS_PER_SOLUTION = 8
# No step is an outlier that is off by less, however regular the others are: the model is linear, the world is not.
_LEAST_OUTLIER = 0.1
_OUTLIER = 4.0
# In standard deviations: what few steps go beyond at first guess, and by how much one that does so moves it. It settles
# in some hundred steps, and then swings by a seventh of one.
_FIRST_BOUND = 2.6
_BOUND_GAIN = 0.1


class Coefficients(NamedTuple):
    """Milliseconds a step, a decoding row, a token attended to and a prefilled token."""

    step: float
    row: float
    kv_token: float
    prefill_token: float


class StepTime:
    """ms = c0 + c1 * rows + c2 * kv_tokens + c3 * prefill_tokens, all c >= 0, by recursive least squares.

    The recursion keeps the sums of the normal equations and not their inverse, so that coefficients can be kept
    from being negative, and forgets by regime: sums are kept apart by the power of two of the rows, and those of
    a regime fade only as new steps of that regime come. A job spends most of its time at one size, where a step
    and its rows cannot be told apart; what its first steps showed must last.

    Errors are relative to what the step took, for noise is in proportion to it; a step of a hundred times the
    usual therefore weighs next to nothing. A step that is off by more than four standard deviations is an outlier
    (a compilation, an allocation, a burst of another process): it is set aside, and counts only if most of the
    last 16 steps are like it. Then the world has changed, and everything is learned anew from these.

    How late steps are is followed by quantile tracking (Angelopoulos, Candes, Tibshirani, arXiv 2307.16895): each
    step beyond the bound raises it, each other one lowers it by so much less that the wanted share goes beyond in
    the long run, whatever the noise is like and whatever the model of it lacks. It is counted in standard deviations,
    which follow sooner; outliers, which no bound could hold, raise it to where they begin at most.

    Args:
        late_share: share of the steps that may take longer than ``late`` says.
        memory_steps: after so many more steps of its regime, a step counts for 1/e.
    """

    def __init__(self, late_share: float = 0.009, memory_steps: int = 512) -> None:
        self._late_share = late_share
        self._keep = 1 - 1 / memory_steps
        self._recent: deque[StepSample] = deque(maxlen=_RECENT)
        self._outliers: deque[bool] = deque(maxlen=_RECENT)
        self._clear()

    def _clear(self) -> None:
        self._solved: Coefficients | None = None
        self._left = np.zeros((_REGIMES, 4, 4))
        self._right = np.zeros((_REGIMES, 4))
        self._square = 0.0
        self._weight = 0.0
        self._bound = _FIRST_BOUND
        self._outliers.clear()
        self.samples = 0
        """Steps that the fit rests on."""

    @property
    def coefficients(self) -> Coefficients:
        """c0 to c3; zeros before the first step."""
        if self._solved is None:
            self._solved = Coefficients(*(_not_negative(self._left.sum(0), self._right.sum(0)) * _SCALES).tolist())
        return self._solved

    @property
    def deviation(self) -> float:
        """Relative standard deviation of the error; taken for 5 % while little is known."""
        prior = 4.0
        return math.sqrt((self._square + prior * 0.05**2) / (self._weight + prior))

    @property
    def late(self) -> float:
        """By how much of what was predicted a step may take longer, but for ``late_share`` of them: 0.05 is 5 %."""
        return self._bound * self.deviation

    def predict(self, rows: int, kv_tokens: int, prefill_tokens: int) -> float:
        """Milliseconds of a step."""
        c = self.coefficients
        return c.step + c.row * rows + c.kv_token * kv_tokens + c.prefill_token * prefill_tokens

    def learn(self, steps: Iterable[StepSample]) -> None:
        """Steps that ran."""
        for step in steps:
            if step.ms > 0 and (step.rows or step.prefill_tokens):
                self._learn(step)

    def _learn(self, step: StepSample) -> None:
        self._recent.append(step)
        if self.samples < _RECENT:
            self._add(step)
            if self.samples == _RECENT:
                self._start_from(tuple(self._recent))
            return
        error = self._error(step)
        deviation = self.deviation
        usual = max(_LEAST_OUTLIER, _OUTLIER * deviation)
        moved = self._bound + _BOUND_GAIN * ((error > self._bound * deviation) - self._late_share)
        self._bound = min(max(moved, 0.0), usual / deviation)
        outlier = abs(error) > usual
        self._outliers.append(outlier)
        if not outlier:
            self._square = self._keep * self._square + error**2
            self._weight = self._keep * self._weight + 1
            self._add(step)
        elif sum(self._outliers) > _RECENT // 2:
            self._start_from(tuple(self._recent))

    def _start_from(self, steps: Sequence[StepSample]) -> None:
        """Everything anew from these steps, without those that the others make outliers of."""
        self._clear()
        for step in steps:
            self._add(step)
        errors = np.abs([self._error(step) for step in steps])
        usual = max(_LEAST_OUTLIER, 6 * float(np.median(errors)))
        self._clear()
        for step, error in zip(steps, errors.tolist(), strict=True):
            if error <= usual:
                self._add(step)
        self.samples = max(self.samples, _RECENT)

    def _error(self, step: StepSample) -> float:
        return step.ms / max(self.predict(step.rows, step.kv_tokens, step.prefill_tokens), 1e-9) - 1

    def _add(self, step: StepSample) -> None:
        terms = np.array([1.0, step.rows, step.kv_tokens, step.prefill_tokens]) * _SCALES
        regime = min(int(step.rows).bit_length(), _REGIMES - 1)
        self._left[regime] = self._keep * self._left[regime] + np.outer(terms, terms) / step.ms**2
        self._right[regime] = self._keep * self._right[regime] + terms / step.ms
        self.samples += 1
        if self.samples < _YOUNG or self.samples % _STEPS_PER_SOLUTION == 0:
            self._solved = None


def _not_negative(left: FloatArray, right: FloatArray) -> FloatArray:
    """Solves the normal equations; terms that come out negative are left out, the most negative one first."""
    left = left + _RIDGE * max(float(np.trace(left)), 1e-12) * np.eye(4)
    free = [0, 1, 2, 3]
    solution = np.zeros(4)
    while free:
        found = np.linalg.solve(left[np.ix_(free, free)], right[free])
        if found.min() >= 0:
            solution[free] = found
            break
        del free[int(np.argmin(found))]
    return solution

"""Rows from a step-latency budget: Algorithm 2 of arXiv 2503.05248."""

from __future__ import annotations

import math
from statistics import fmean, median

from rollout.batcher.types import OVER_BUDGET, Bounds, Decision, Observation, StepSample, within


class SlaPolicy:
    """A noisy binary search for the batch whose decode step takes ``latency_budget_ms``.

    Algorithm 2 keeps an interval [b_low, b_high] and runs its middle. Above the budget the interval's top
    comes down to the batch that ran, below it the bottom comes up. Without a budget the policy never restricts.

    Where the paper leaves room:

    - The update period and the averaging window are one: an update takes the ``step_window`` decode steps since
      the update before, so that it sees what that update did. A decode step is one in which a row decoded,
      with or without prefill beside it, for that is the latency between a row's tokens.
    - The recent latency is the median of those steps, not their mean: one compilation or one allocation is
      no reason to shrink. The recent batch size is their mean.
    - ``alpha`` and ``delta`` default to the values of SGLang's pull request 28365, ``epsilon_d`` to a fifth of
      the budget, which is its 10 ms at its 50 ms. A fixed 10 ms could never raise the batch on small budgets.

    Where the printed lines go wrong, all within ``alpha`` rows of a bound:

    - b_low (line 9) and b_high (line 6) may leave the bounds; here they are clamped.
    - The interval, never narrower than alpha, keeps its middle alpha/2 away from both bounds, so that one row
      (or all of a small ``max_rows``) is out of reach. When one end rests on its bound and the other one is
      held off by alpha alone, that other end moves on by delta.
    - Within the tolerance (lines 12 and 13), clamping one end moves the middle away from the batch that just
      kept the budget; here both ends give way alike.

    The initial batch is the middle of the bounds. Rows in decode are never shed (line 15), so a batch that
    is too large comes down as its rows finish.

    Reasons: ``latency``, ``cap`` (all of ``max_rows``), ``over_budget`` (``OVER_BUDGET``).

    Args:
        bounds: what the user allows; ``latency_budget_ms`` is the paper's D_SLA.
        alpha: width in rows of the narrowest search interval.
        delta: rows by which the other end of the interval widens at each update, against noise.
        epsilon_d: tolerance around the budget in milliseconds; None is a fifth of the budget.
        step_window: decode steps an update.

    Raises:
        ValueError: a parameter is out of range.
    """

    def __init__(
        self,
        bounds: Bounds,
        alpha: int = 20,
        delta: int = 5,
        epsilon_d: float | None = None,
        step_window: int = 16,
    ) -> None:
        for name, value, least in (
            ("alpha", alpha, 1),
            ("delta", delta, 0),
            ("epsilon_d", epsilon_d, 0),
            ("step_window", step_window, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}.")
        self._bounds = bounds
        self._alpha = alpha
        self._delta = delta
        self._epsilon_d = epsilon_d
        self._step_window = step_window
        self._low = float(bounds.min_rows)
        self._high = float(bounds.max_rows)
        self._steps: list[StepSample] = []
        self._over_at_minimum = False

    def decide(self, observation: Observation) -> Decision:
        bounds = self._bounds
        if bounds.latency_budget_ms is None:
            return Decision(bounds.max_rows, bounds.prefill_tokens, "cap")
        self._steps.extend(step for step in observation.steps if step.rows > 0)
        if len(self._steps) >= self._step_window:
            self._update(self._steps[-self._step_window :], bounds.latency_budget_ms)
            self._steps.clear()
        rows = within(math.floor((self._low + self._high) / 2), observation, bounds)
        if rows <= bounds.min_rows and self._over_at_minimum:
            return Decision(rows, bounds.prefill_tokens, OVER_BUDGET)
        return Decision(rows, bounds.prefill_tokens, "cap" if rows == bounds.max_rows else "latency")

    def _update(self, steps: list[StepSample], budget_ms: float) -> None:
        """Lines 3 to 13, with ``steps`` as the recent past."""
        latency = median(step.ms for step in steps)
        rows = fmean(step.rows for step in steps)
        epsilon = budget_ms / 5 if self._epsilon_d is None else self._epsilon_d
        least, most = float(self._bounds.min_rows), float(self._bounds.max_rows)
        low, high = self._low, self._high
        if latency > budget_ms + epsilon:
            self._high = max(rows, low + self._alpha)
            if low <= least and rows <= low + self._alpha:
                self._high = min(self._high, high - self._delta)
            self._low = low - self._delta
        elif latency < budget_ms - epsilon:
            self._low = min(rows, high - self._alpha)
            if high >= most and rows >= high - self._alpha:
                self._low = max(self._low, low + self._delta)
            self._high = high + self._delta
        else:
            half = max(0.0, min(self._alpha // 2, rows - least, most - rows))
            self._high = rows + half
            self._low = rows - half
        self._low = min(max(self._low, least), most)
        self._high = min(max(self._high, self._low), most)
        self._over_at_minimum = latency > budget_ms and max(step.rows for step in steps) <= least

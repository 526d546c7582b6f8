"""Algorithm 2 of arXiv 2503.05248: the largest batch that keeps the latency budget of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean, median

from rollout.batcher.types import OVER_BUDGET, Bounds, Decision, Observation, StepSample, within


@dataclass
class SlaParameters:
    """Parameters of Algorithm 2; the keys of ``batcher=sla``."""

    alpha: int = field(default=20, metadata={"meaning": "width of the narrowest search interval, in samples"})
    delta: int = field(
        default=5, metadata={"meaning": "samples by which the other end of the interval widens at each update"}
    )
    epsilon_d: float | None = field(
        default=None, metadata={"meaning": "tolerance around the budget in ms; null: a fifth of the budget"}
    )
    step_window: int = field(default=16, metadata={"meaning": "decode steps per update"})


class SlaPolicy:
    """Search for the batch size whose decode step takes ``latency_budget_ms``: a noisy binary search.

    Algorithm 2 keeps an interval [b_low, b_high] and runs its midpoint. Steps above the budget lower b_high to the
    batch that ran; steps below it raise b_low to that batch. Without a budget the policy allows ``max_rows``.

    Choices where the paper leaves room:

    - Update period and averaging window are the same: an update uses the ``step_window`` decode steps since the
      last update, all of which ran with the interval of that update. A decode step is one in which a row decoded,
      with or without prefill, since its duration is the latency between two tokens of a row.
    - The recent latency is the median of those steps rather than their mean, so that a single compilation or
      allocation does not shrink the batch. The recent batch size is their mean.
    - ``alpha`` and ``delta`` default to the values of SGLang's pull request 28365. ``epsilon_d`` defaults to a
      fifth of the budget, which is that request's 10 ms at its 50 ms; a fixed 10 ms could never raise the batch
      under a small budget.

    Corrections to the printed lines, all within ``alpha`` rows of a bound:

    - b_low (line 9) and b_high (line 6) may leave the bounds, so both are clamped.
    - The interval is never narrower than alpha, which keeps its midpoint alpha/2 away from both bounds, so that a
      single row (or all of a small ``max_rows``) cannot be reached. When one end rests on its bound and only alpha
      stops the other, that other end moves by delta.
    - Within the tolerance (lines 12 and 13), clamping one end would move the midpoint away from the batch that just
      kept the budget, so both ends move by the same amount.

    The first batch is the midpoint of the bounds. Rows in decode are never preempted (line 15), so a batch that is
    too large shrinks as its rows finish.

    Reasons: ``latency``, ``cap`` (``max_rows``), ``over_budget`` (``OVER_BUDGET``).

    Args:
        bounds: limits set by the user; ``latency_budget_ms`` is the paper's D_SLA.
        parameters: None means the defaults.

    Raises:
        ValueError: a parameter is out of range.
    """

    def __init__(self, bounds: Bounds, parameters: SlaParameters | None = None) -> None:
        parameters = parameters or SlaParameters()
        for name, minimum in (("alpha", 1), ("delta", 0), ("epsilon_d", 0), ("step_window", 1)):
            value = getattr(parameters, name)
            if value is not None and not value >= minimum:
                raise ValueError(f"{name} must be at least {minimum}, not {value}.")
        self._bounds = bounds
        self._parameters = parameters
        self._low = float(bounds.min_rows)
        self._high = float(bounds.max_rows)
        self._steps: list[StepSample] = []
        self._minimum_over_budget = False
        """True if the last update saw ``min_rows`` rows exceed the budget."""

    def decide(self, observation: Observation) -> Decision:
        """Return the midpoint of the search interval."""
        bounds, window = self._bounds, self._parameters.step_window
        if bounds.latency_budget_ms is None:
            return Decision(bounds.max_rows, bounds.prefill_tokens, "cap")
        self._steps.extend(step for step in observation.steps if step.rows > 0)
        if len(self._steps) >= window:
            self._update(self._steps[-window:], bounds.latency_budget_ms)
            self._steps.clear()
        rows = within(math.floor((self._low + self._high) / 2), observation, bounds)
        if rows <= bounds.min_rows and self._minimum_over_budget:
            return Decision(rows, bounds.prefill_tokens, OVER_BUDGET)
        return Decision(rows, bounds.prefill_tokens, "cap" if rows == bounds.max_rows else "latency")

    def _update(self, steps: list[StepSample], budget_ms: float) -> None:
        """Move the interval by lines 3 to 13, with ``steps`` as the recent past."""
        alpha, delta = self._parameters.alpha, self._parameters.delta
        epsilon = budget_ms / 5 if self._parameters.epsilon_d is None else self._parameters.epsilon_d
        latency = median(step.ms for step in steps)
        rows = fmean(step.rows for step in steps)
        min_rows, max_rows = float(self._bounds.min_rows), float(self._bounds.max_rows)
        low, high = self._low, self._high
        if latency > budget_ms + epsilon:
            self._high = max(rows, low + alpha)
            if low <= min_rows and rows <= low + alpha:
                self._high = min(self._high, high - delta)
            self._low = low - delta
        elif latency < budget_ms - epsilon:
            self._low = min(rows, high - alpha)
            if high >= max_rows and rows >= high - alpha:
                self._low = max(self._low, low + delta)
            self._high = high + delta
        else:
            half_width = max(0.0, min(alpha // 2, rows - min_rows, max_rows - rows))
            self._high = rows + half_width
            self._low = rows - half_width
        self._low = min(max(self._low, min_rows), max_rows)
        self._high = min(max(self._high, self._low), max_rows)
        self._minimum_over_budget = latency > budget_ms and max(step.rows for step in steps) <= min_rows

"""How much of a step the budget pays for: rows that decode, tokens prefilled beside them, rows that may come."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rollout.batcher.estimators.step_time import StepTime
from rollout.batcher.types import Bounds, Observation, decoding_rows

# What is left free against steps that take longer than the fit says is at most half of the budget.
_MOST_LATE = 1.0
# A step is at most so much larger than any that was seen: the fit is not trusted far from what it rests on.
_GROWTH = 2
# Before so many steps ran, nobody is told that a row cannot keep the budget: the first ones load, compile and allocate.
_TOLD_AFTER = 16


@dataclass(frozen=True, slots=True)
class Share:
    """What the next step may hold."""

    decode_rows: int
    prefill_tokens: int
    rows: int
    """That may live, for all of them to decode."""
    over_budget: bool
    """Whether one row alone is known to take longer than the budget."""


class LatencyBudget:
    """Inverts the fit of step times (``StepTime``) for the largest step within the budget.

    Decoding rows go first, oldest first; those that no longer fit are paused until older ones have ended. What they
    leave of the budget is spent on prefill. Nothing is admitted while rows are paused. Steps are filled so far that few
    of them take longer than the budget (``StepTime.late``).

    Args:
        bounds: with a ``latency_budget_ms``.
        steps: the fit, which its owner keeps learning.
    """

    def __init__(self, bounds: Bounds, steps: StepTime) -> None:
        assert bounds.latency_budget_ms is not None
        self._bounds = bounds
        self._budget_ms = bounds.latency_budget_ms
        self._steps = steps
        self._most_rows = 2
        self._most_prefill = 64

    def share(self, observation: Observation) -> Share:
        """What the next step may hold, given the steps that ran."""
        for step in observation.steps:
            self._most_rows = max(self._most_rows, _GROWTH * step.rows)
            self._most_prefill = max(self._most_prefill, _GROWTH * step.prefill_tokens)
        c = self._steps.coefficients
        left = self._budget_ms / (1 + min(self._steps.late, _MOST_LATE)) - c.step
        decoding = decoding_rows(observation)
        lengths = (observation.prompt_tokens + observation.generated_tokens)[:decoding]
        costs = c.row * np.arange(1, decoding + 1) + c.kv_token * np.cumsum(lengths)
        fitting = int(np.searchsorted(costs, left, side="right"))
        decode = min(decoding, max(1, min(fitting, self._most_rows)))
        if decode:
            left -= float(costs[decode - 1])
        over = left < 0 and decode <= 1
        prefill = min(self._bounds.prefill_tokens, self._most_prefill)
        if c.prefill_token > 0:
            prefill = min(prefill, max(0, int(left / c.prefill_token)))
        if not decode:
            # Somebody must go on; what is over the budget anyway may as well take twice as long.
            least = c.step / c.prefill_token if over and c.prefill_token > 0 else 0
            prefill = max(prefill, min(self._bounds.prefill_tokens, max(observation.page_tokens, int(least))))
        known = over and self._steps.samples >= _TOLD_AFTER
        if decode < decoding:
            return Share(decode, prefill, observation.live_rows, known)
        typical = float(lengths.mean()) if decode else 0.0
        starting = observation.live_rows - decoding
        a_row = max(c.row + c.kv_token * typical, 1e-9)
        more = max(0, int(left / a_row) - starting)
        rows = 1 if over else min(observation.live_rows + more, max(self._most_rows, observation.live_rows))
        return Share(decode, prefill, rows, known)

"""Largest step within the latency budget: decoding rows, prefill tokens, and rows that may be admitted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rollout.batcher.estimators.step_time import StepTime
from rollout.batcher.types import Bounds, Observation, decoding_rows

# The safety margin for steps slower than the fit is at most the predicted time, that is half of the budget.
_MAX_MARGIN = 1.0
# A step is at most twice the largest step seen, because the fit does not extrapolate far.
_GROWTH = 2
# The first steps load, compile and allocate, so the budget is not reported as unreachable before 16 steps.
_STEPS_BEFORE_REPORT = 16


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Limits of the next step."""

    decode_rows: int
    prefill_tokens: int
    rows: int
    """Most live rows for which a step that decodes all of them fits the budget."""
    over_budget: bool
    """True if a step of a single row is known to exceed the budget."""


class LatencyBudget:
    """Invert the fit of step times (``StepTime``) for the largest step within the budget.

    The budget goes to decoding rows first, oldest first; rows that do not fit are paused until older rows finish.
    Prefill gets the remainder. No row is admitted while rows are paused. ``StepTime.overrun_margin`` is kept free,
    so that few steps exceed the budget.

    Args:
        bounds: limits set by the user; ``latency_budget_ms`` is not None.
        step_time: the fit; the caller feeds it with steps.
    """

    def __init__(self, bounds: Bounds, step_time: StepTime) -> None:
        assert bounds.latency_budget_ms is not None
        self._bounds = bounds
        self._budget_ms = bounds.latency_budget_ms
        self._step_time = step_time
        self._max_rows = 2
        self._max_prefill = 64

    def limits(self, observation: Observation) -> StepLimits:
        """Return the limits of the next step, after the steps in ``observation``."""
        for step in observation.steps:
            self._max_rows = max(self._max_rows, _GROWTH * step.rows)
            self._max_prefill = max(self._max_prefill, _GROWTH * step.prefill_tokens)
        costs = self._step_time.coefficients
        left_ms = self._budget_ms / (1 + min(self._step_time.overrun_margin, _MAX_MARGIN)) - costs.step
        decoding = decoding_rows(observation)
        lengths = (observation.prompt_tokens + observation.generated_tokens)[:decoding]
        # [decoding] milliseconds of the oldest 1, 2, ... rows.
        row_ms = costs.row * np.arange(1, decoding + 1) + costs.kv_token * np.cumsum(lengths)
        fitting = int(np.searchsorted(row_ms, left_ms, side="right"))
        decode_rows = min(decoding, max(1, min(fitting, self._max_rows)))
        if decode_rows:
            left_ms -= float(row_ms[decode_rows - 1])
        over = left_ms < 0 and decode_rows <= 1
        prefill_tokens = self._prefill_tokens(
            left_ms, page_tokens=observation.page_tokens, over=over, idle=not decode_rows
        )
        over_budget = over and self._step_time.samples >= _STEPS_BEFORE_REPORT
        if decode_rows < decoding:
            rows = observation.live_rows
        elif over:
            rows = 1
        else:
            mean_length = float(lengths.mean()) if decode_rows else 0.0
            ms_per_row = max(costs.row + costs.kv_token * mean_length, 1e-9)
            prefilling = observation.live_rows - decoding
            more = max(0, int(left_ms / ms_per_row) - prefilling)
            rows = min(observation.live_rows + more, max(self._max_rows, observation.live_rows))
        return StepLimits(decode_rows=decode_rows, prefill_tokens=prefill_tokens, rows=rows, over_budget=over_budget)

    def _prefill_tokens(self, left_ms: float, *, page_tokens: int, over: bool, idle: bool) -> int:
        """Return the prefill tokens that ``left_ms`` pays for, and more than none if no row decodes (``idle``)."""
        costs = self._step_time.coefficients
        tokens = min(self._bounds.prefill_tokens, self._max_prefill)
        if costs.prefill_token > 0:
            tokens = min(tokens, max(0, int(left_ms / costs.prefill_token)))
        if idle:
            # The job must make progress, and a step that exceeds the budget anyway may take twice as long.
            minimum = costs.step / costs.prefill_token if over and costs.prefill_token > 0 else 0
            tokens = max(tokens, min(self._bounds.prefill_tokens, max(page_tokens, int(minimum))))
        return tokens

"""As many rows as memory will hold in future steps, from lengths and step times learned while the job runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

from rollout.batcher.estimators.latency_budget import LatencyBudget
from rollout.batcher.estimators.memory_forecast import MemoryForecast, MemoryForecaster
from rollout.batcher.estimators.peak_memory import rows_that_fit
from rollout.batcher.estimators.row_memory import TYPICAL_MAX_NEW, live_rows, waiting_rows
from rollout.batcher.estimators.step_time import StepTime
from rollout.batcher.estimators.survival import Survival
from rollout.batcher.types import (
    NONE_WAITING,
    OVER_BUDGET,
    BoolArray,
    Bounds,
    Decision,
    FloatArray,
    Observation,
    decoding_rows,
)

# Lengths and costs change slowly, so their estimates are refreshed once per 16 decisions.
_DECISIONS_PER_ESTIMATE = 16
_GRID_STEPS = 48
_MAX_HORIZON = 4096
_MAX_UNKNOWN_ROWS = 256
# Weight of the prior on lengths, in finished rows. With 8, a first wave of rows of equal length leaves so much memory
# idle that another wave is needed at the end; with 32, short jobs outgrow memory.
_PRIOR_ROWS = 16
_FIRST_ROW = np.zeros(1, np.int64)


@dataclass
class PredictiveParameters:
    """Parameters of the predictive policy; the keys of ``batcher=predictive``."""

    memory_rows: int = field(
        default=4096, metadata={"meaning": "finished samples that lengths are learned from; older ones fade"}
    )


class PredictivePolicy:
    """Admit rows while the memory forecast fits, accepting the overflow risk that pays off.

    A row is admitted if, with it, mean + theta * sd of the tokens held stays within memory at every step of a
    horizon. Lengths come from a life table over finished and live rows (``Survival``), or are known where only
    ``max_new_tokens`` ends a row. The variance includes the uncertainty of the mean itself:
    (tokens that rows are expected to free)^2 / (finished rows + 16). All rows may be longer than estimated, which
    matters in proportion to the memory they are expected to free, and most while no row has finished.

    The accepted risk weighs the cost of a preemption against the cost of an idle slot. With step times fitted as
    c0 + c1 * rows + c2 * kv_tokens + c3 * prefill_tokens, rho = c3 * rows / c0 is the cost of recomputing a token
    in units of one row's share of a step. Then theta = Phi^-1(1 - 0.045 / (rho + 0.15)), and the horizon is
    512 * rho steps. Both rules were chosen in simulations of machines like those of
    ``jobs/bench/policies_simulated.py``.

    With a latency budget, ``LatencyBudget`` limits the decoding rows, the prefill tokens beside them and the rows
    that may be admitted.

    Reasons: ``memory``, ``cap`` (``max_rows``), ``latency``, ``over_budget`` (``OVER_BUDGET``), ``queue``
    (``NONE_WAITING``).

    Args:
        bounds: limits set by the user.
        parameters: None means the defaults.

    Raises:
        ValueError: a parameter is out of range.
    """

    def __init__(self, bounds: Bounds, parameters: PredictiveParameters | None = None) -> None:
        parameters = parameters or PredictiveParameters()
        if parameters.memory_rows < 1:
            raise ValueError(f"memory_rows must be at least 1, not {parameters.memory_rows}.")
        self._bounds = bounds
        self._survival = Survival(parameters.memory_rows)
        self._step_time = StepTime()
        self._latency = None if bounds.latency_budget_ms is None else LatencyBudget(bounds, self._step_time)
        self._decisions = 0
        self._theta = 0.0
        self._admitted = 0
        """Rows allowed by memory at the last decision, before the bounds."""
        self._forecaster: MemoryForecaster | None = None

    def decide(self, observation: Observation) -> Decision:
        """Return the rows that memory and the latency budget allow."""
        bounds = self._bounds
        self._survival.learn(observation.finished)
        self._step_time.learn(observation.steps)
        if self._forecaster is None or self._decisions % _DECISIONS_PER_ESTIMATE == 0:
            self._forecaster = self._estimate(observation)
        self._decisions += 1
        max_rows, reason = bounds.max_rows, "cap"
        decode_rows, prefill_tokens = None, bounds.prefill_tokens
        if self._latency is not None:
            limits = self._latency.limits(observation)
            decode_rows, prefill_tokens = limits.decode_rows, limits.prefill_tokens
            if limits.over_budget or limits.rows < max_rows:
                max_rows, reason = limits.rows, OVER_BUDGET if limits.over_budget else "latency"
        rows = min(observation.live_rows, max_rows)
        if rows < max_rows:
            # The forecast dominates the cost of a decision, so it is skipped where no row may be admitted anyway.
            rows += self._admissible(observation, self._forecaster, max_rows - rows)
            if rows < max_rows:
                reason = "memory" if observation.waiting_rows else NONE_WAITING
        self._admitted = rows
        rows = min(max(rows, decoding_rows(observation), bounds.min_rows), bounds.max_rows)
        return Decision(rows, prefill_tokens, reason, decode_rows)

    # -- estimates -----------------------------------------------------------------------------------

    def _estimate(self, observation: Observation) -> MemoryForecaster:
        """Refresh the survival estimate and theta; return a forecaster over the horizon."""
        max_new_tokens = observation.max_new_tokens
        if not len(max_new_tokens) and observation.waiting is not None:
            max_new_tokens = observation.waiting.max_new_tokens
        typical = float(max_new_tokens.mean()) if len(max_new_tokens) else float(TYPICAL_MAX_NEW)
        self._survival.estimate(observation.generated_tokens, typical)
        rho = self._recompute_price(max(observation.live_rows, self._admitted))
        self._theta = NormalDist().inv_cdf(1 - 0.045 / (rho + 0.15))
        horizon = min(max(16.0, 512 * rho), _MAX_HORIZON)
        steps = _forecast_steps(horizon, dense_until=min(horizon, self._survival.quantile(0.9)))
        return MemoryForecaster(self._survival, steps)

    def _recompute_price(self, rows: int) -> float:
        """Return rho, the cost of recomputing a token in units of one row's share of a step.

        It is 1 until step times are known: a job starts with many rows of unknown lengths, and a few careful steps
        cost little.
        """
        costs = self._step_time.coefficients
        if costs.step <= 0 or self._step_time.samples < 8:
            return 1.0
        return min(costs.prefill_token * max(rows, 1) / costs.step, 64.0)

    # -- admission -----------------------------------------------------------------------------------

    def _admissible(self, observation: Observation, forecaster: MemoryForecaster, max_rows: int) -> int:
        """Return how many waiting rows fit in memory, at most ``max_rows``.

        When all known waiting rows fit, further rows are assumed to be like them.
        """
        live, shared = live_rows(observation)
        waiting = waiting_rows(observation)
        eta = observation.kv_tokens_total
        if not len(waiting):
            return 0
        if len(waiting) > max_rows:
            waiting = waiting.select(np.arange(max_rows))
        if live.ends_at_limit.all() and waiting.ends_at_limit.all():
            repeated = np.arange(min(max_rows, len(waiting) + _MAX_UNKNOWN_ROWS)) % len(waiting)
            return rows_that_fit(live=live, shared=shared, waiting=waiting.select(repeated), kv_tokens=eta)
        held = forecaster.total(live)
        if len(shared):
            held += forecaster.shared_pages(shared, live)
        elif observation.groups is None and observation.shared is None:
            # The policy does not know which rows share prompts, but it knows how many tokens they hold in total.
            held = held.minus(max(0.0, float(live.own_tokens.sum()) - observation.kv_tokens_held))
        # Usually not even one more row fits, so the first is checked before all others are forecast.
        if not self._fits(held + forecaster.per_row(waiting.select(_FIRST_ROW)), eta)[0]:
            return 0
        if max_rows == 1:
            return 1
        admitted = forecaster.per_row(waiting)
        fits = self._fits(held + admitted.cumulative(), eta)
        if not fits.all():
            return int(np.argmin(fits))
        if len(waiting) == max_rows:
            return max_rows
        unknown = min(max_rows - len(waiting), _MAX_UNKNOWN_ROWS)
        further = admitted.average_rows(np.arange(1, unknown + 1))
        fits = self._fits(held + admitted.cumulative().last_row() + further, eta)
        return len(waiting) + (unknown if fits.all() else int(np.argmin(fits)))

    def _fits(self, needed: MemoryForecast, eta: int) -> BoolArray:
        """[rows] True where the forecast [rows, grid] stays within ``eta`` tokens at every step of the grid."""
        variance_of_mean = (needed.without_exits - needed.mean) ** 2 / (self._survival.finished + _PRIOR_ROWS)
        upper = needed.mean + self._theta * np.sqrt(needed.variance + variance_of_mean)
        return np.asarray((upper <= eta).all(1))


def _forecast_steps(horizon: float, dense_until: float) -> FloatArray:
    """[grid] future steps: evenly spaced while most rows finish, then geometrically spaced up to the horizon."""
    steps = np.linspace(0.0, dense_until, _GRID_STEPS * 2 // 3)
    if dense_until < horizon:
        sparse = np.geomspace(max(dense_until, 1.0), horizon, _GRID_STEPS // 3 + 1)[1:]
        steps = np.concatenate((steps, sparse))
    return steps
